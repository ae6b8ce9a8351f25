"""Importing a model's ``model.py`` as a package of its own.

Two models may both hold ``model.py`` and ``tokens.py``: each folder becomes a package under a name no other has, and
``from .tokens import split`` finds the file beside it. ``sys.path`` stays as it is. No bytecode is written into the
folder (it is watched, and may be read-only) or read from it (a rewrite within a second, at equal size, would not be
seen).
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from mmcore.errors import LoadFailed

_PREFIX: Final = "mmcore_model_"
_numbers = itertools.count(1)


class _SourceLoader(SourceFileLoader):
    """Compiles from source always."""

    def path_stats(self, path: Any) -> Any:
        """Say that nothing is known of the source's age, which keeps bytecode out of it both ways."""
        raise OSError(f"no bytecode for {path}")


class _ModelFinder(MetaPathFinder):
    """Finds what a model's package imports relative to itself, and answers for nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or not fullname.startswith(_PREFIX):
            return None
        for folder in path:
            spec = FileFinder(folder, (_SourceLoader, SOURCE_SUFFIXES)).find_spec(fullname, target)
            if spec is not None:
                return spec
        return None


_finder = _ModelFinder()


def import_model_file(name: str, file: Path) -> ModuleType:
    """Execute ``file`` as the root of a new package; ``name`` is the model's, for tracebacks.

    Raises:
        LoadFailed: a helper beside the file is imported by an absolute name.
        Exception: whatever the file raises.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    package = f"{_PREFIX}{next(_numbers)}_{re.sub(r'[^0-9A-Za-z]', '_', name)}"
    loader = _SourceLoader(package, str(file))
    spec = importlib.util.spec_from_file_location(
        package, file, loader=loader, submodule_search_locations=[str(file.parent)]
    )
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    try:
        loader.exec_module(module)
    except ModuleNotFoundError as error:
        forget(module)
        helper = (error.name or "").partition(".")[0]
        if helper and ((file.parent / f"{helper}.py").exists() or (file.parent / helper).is_dir()):
            raise LoadFailed(
                f"{file.name!r} imports {helper!r}, which lies beside it: write 'from . import {helper}'"
                f" or 'from .{helper} import …'"
            ) from error
        raise
    except BaseException:
        forget(module)
        raise
    return module


def forget(module: ModuleType) -> None:
    """Take a model's package and what it imported relative to itself out of ``sys.modules``."""
    package = module.__name__
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
