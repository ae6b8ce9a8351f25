"""Model files on the local disk: what a folder holds, a root of them kept in step, and models pulled from stores.

The surface: :func:`detect` and :func:`inspect` look at one model, :class:`ModelFolder` watches a root of many, and an
:class:`Origin` gives the source of a version when it is to be loaded. :class:`PulledOrigin` is that of registered
models: a :class:`Puller` finds them by a :class:`StorageConfig` and keeps them in a :class:`DiskCache`. Where a runtime
reads the files itself it is :class:`WholeOrigin`. Where a mesh has pulled them they are :class:`GivenFiles`.
"""

from mmcore.storage.cancellation import Cancellation
from mmcore.storage.disk_cache import DiskCache
from mmcore.storage.folder import Change, ModelFolder
from mmcore.storage.given import GivenFiles
from mmcore.storage.layout import Layout, detect, inspect
from mmcore.storage.origin import FileOrigin, Origin
from mmcore.storage.places import StorageConfig
from mmcore.storage.pulled import PulledOrigin
from mmcore.storage.puller import Pulled, Puller
from mmcore.storage.whole import WholeOrigin

__all__ = [
    "Cancellation",
    "Change",
    "DiskCache",
    "FileOrigin",
    "GivenFiles",
    "Layout",
    "ModelFolder",
    "Origin",
    "Pulled",
    "PulledOrigin",
    "Puller",
    "StorageConfig",
    "WholeOrigin",
    "detect",
    "inspect",
]
