"""Model files on the local disk: what a folder holds, what its settings say, and a root of them kept in step.

The surface: :func:`detect` and :func:`inspect` look at one model, :class:`ModelFolder` watches a root of many, and an
:class:`Origin` gives the source of a version when it is to be loaded.
"""

from mmcore.storage.folder import Change, ModelFolder
from mmcore.storage.layout import Layout, detect, inspect
from mmcore.storage.origin import FileOrigin, Origin

__all__ = ["Change", "FileOrigin", "Layout", "ModelFolder", "Origin", "detect", "inspect"]
