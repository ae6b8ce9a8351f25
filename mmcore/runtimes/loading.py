"""From a model's files to a model that answers: which format is read by what.

A framework is imported when the first model of its format is loaded and not before: importing one costs up to a
second and 70 MB.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mmcore.errors import LoadFailed, MmcoreError
from mmcore.model import ModelSource
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import LoadedModel
from mmcore.runtimes.load_warnings import logged_for
from mmcore.runtimes.size import Growth, uncounted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Format:
    module: str
    #: The extra of this package that installs the framework; None where nothing is needed.
    extra: str | None = None
    #: Whether it allocates in threads of its own while it loads.
    own_threads: bool = False


_FORMATS: Final[dict[str, _Format]] = {
    "lightgbm": _Format("mmcore.runtimes.lightgbm", "lightgbm"),
    "onnx": _Format("mmcore.runtimes.onnx", "onnx"),
    "openvino": _Format("mmcore.runtimes.openvino", "openvino", own_threads=True),
    "python": _Format("mmcore.runtimes.python"),
    "sklearn": _Format("mmcore.runtimes.sklearn", "sklearn"),
    "tensorflow": _Format("mmcore.runtimes.tensorflow", "tensorflow", own_threads=True),
    "torchscript": _Format("mmcore.runtimes.torchscript", "torch"),
    "xgboost": _Format("mmcore.runtimes.xgboost", "xgboost"),
}

#: The values of ``ModelSource.format`` that can be loaded.
FORMATS: Final[tuple[str, ...]] = tuple(_FORMATS)

#: What a loaded model takes beyond its load: its copy, signature, lane, statistics, its entries in tables, the disk
#: cache and the registry, and the pages that all of it does not fill.
OWN_BYTES: Final = 10 * 1024

_import_lock = threading.Lock()
#: Modules of ours that are there whole.
_imported: Final[set[str]] = set()

# OpenMP's threads sleep when they have nothing to do, and do not spin, which burnt 6 of the 8 ms that loading a small
# XGBoost model took. The library reads this when a framework brings it in.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# OpenVINO tells its maker of its use, from a thread that forks this process, unless this module cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def load_model(source: ModelSource) -> LoadedModel:
    """Load one version of one model; blocks for as long as the framework takes, so call it in a loader thread.

    Raises:
        LoadFailed: the format, the file, the framework or the model's settings are at fault; the text says which and,
            where something can be installed or changed, what.
    """
    load = _loader(source)
    if not source.path.exists():
        raise LoadFailed(f"model {source.name!r}: {source.path.name!r} does not exist")
    modules = len(sys.modules)
    try:
        with logged_for(source.name), Growth() as growth:
            model = load(source)
    except MmcoreError as error:
        raise LoadFailed(f"model {source.name!r}: {error}") from error
    except MemoryError as error:
        raise LoadFailed(f"model {source.name!r}: out of memory while loading {source.path.name!r}") from error
    except ModuleNotFoundError as error:
        raise LoadFailed(
            f"model {source.name!r}: {source.path.name!r} needs the Python module {error.name!r},"
            " which is not installed"
        ) from error
    except Exception as error:  # whatever a framework raises on a bad file
        log.info("loading model %r failed", source.name, exc_info=error)
        raise LoadFailed(f"model {source.name!r}: cannot load {source.path.name!r}: {describe(error)}") from error
    # A pickle that was the first to import a part of its framework is not what takes all that.
    measured = len(sys.modules) == modules and not loads_elsewhere(source.format)
    if measured and growth.bytes is not None and source.settings.size_bytes is None:
        model.size_bytes = max(growth.bytes, 0) + OWN_BYTES
    return model


def loads_elsewhere(name: str) -> bool:
    """Whether a format's framework allocates in threads of its own, so that the loading thread's growth says little."""
    return _FORMATS[name].own_threads


def _loader(source: ModelSource) -> Callable[[ModelSource], LoadedModel]:
    served = _FORMATS.get(source.format)
    if served is None:
        raise LoadFailed(
            f"model {source.name!r}: the format {source.format!r} is not served; these are: {', '.join(FORMATS)}"
        )
    module = sys.modules.get(served.module)
    load: Callable[[ModelSource], LoadedModel]
    if module is not None and served.module in _imported:
        load = module.load
        return load
    try:
        # Frameworks are imported one at a time: they import one another (xgboost takes sklearn in), and two threads
        # in a cycle of imports see half-made modules.
        with _import_lock, uncounted():
            module = importlib.import_module(served.module)
    except ImportError as error:
        raise LoadFailed(
            f"model {source.name!r}: the format {source.format!r} needs a framework that cannot be imported ({error});"
            f" install it with: pip install 'mmcore[{served.extra}]'"
        ) from error
    _imported.add(served.module)
    load = module.load
    return load
