"""Runs one fuzz target under libFuzzer: ``python -m tests.fuzz.one TARGET [OPTIONS OF LIBFUZZER] [FOLDERS]``.

A process for itself, since libFuzzer ends it. It needs modules built by ``MMCORE_FUZZ=1`` and atheris with its
sanitizers preloaded; ``make fuzz`` sees to both.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any, Final

from tests.fuzz.targets import target

#: Modules whose Python is instrumented: parsers, our own and others'. The compiled ones have counters anyway.
INSTRUMENTED: Final = (
    *("mmcore.storage", "mmcore.server.rest", "mmcore.server.dataplane", "mmcore.server.static_models"),
    *("mmcore.registry.records", "mmcore.runtimes.isolation.frames"),
    *("google.protobuf.text_format", "google.protobuf.json_format", "tarfile", "zipfile", "yaml"),
)


def instrument(atheris: Any, module: ModuleType) -> None:
    """Let the functions of a module, and of its classes, tell which of their branches were taken."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for one in vars(value).values() if inspect.isclass(value) else [value]:
            function = getattr(one, "__func__", one)
            if inspect.isfunction(function):
                atheris.instrument_func(function)


def main(arguments: list[str]) -> int:
    """Fuzz until an option of libFuzzer says to end."""
    name, *options = arguments
    if name.startswith("native_"):
        native: Any = importlib.import_module("tests.fuzz.native")
        return int(native.fuzz(name, [name, *options]))
    atheris: Any = importlib.import_module("atheris")
    fuzz = target(name)
    for imported, module in list(sys.modules.items()):
        if imported.startswith(INSTRUMENTED):
            instrument(atheris, module)
    # What is there now stays; the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    atheris.Setup([name, *options], fuzz)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
