"""The origin of registered models whose files a runtime reads: they are pulled and handed on as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mmcore.errors import NotFound
from mmcore.model import ModelInfo, ModelSource
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.places import stated_format
from mmcore.storage.puller import Pulls


class WholeOrigin:
    """The files of all registered models. Satisfies :class:`mmcore.storage.origin.Origin`.

    ``find`` tells how a model is registered, None when it is not. Nothing of the files is looked at: which formats and
    layouts there are is the runtime's business.
    """

    def __init__(self, puller: Pulls, find: Callable[[str], ModelInfo | None]) -> None:
        self._puller = puller
        self._find = find

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        """Pull the model's files, see :class:`mmcore.storage.origin.Origin`; they stay while the source is held."""
        info = self._find(name)
        if info is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        pulled = self._puller.pull(info, cancelled=cancelled)
        return ModelSource(
            name,
            version,
            stated_format(info) or "",
            _itself(pulled.path, info.path),
            info=info,
            schema=pulled.schema,
            lease=pulled.lease,
        )

    def confirm(self, name: str) -> None:
        """The files are the runtime's to judge, see :class:`mmcore.storage.origin.Origin`."""


def _itself(path: Path, registered: str) -> Path:
    """The model's file where the pulled folder holds that file alone, else the folder."""
    name = PurePosixPath(registered).name
    if path.is_dir() and name and (path / name).is_file() and len(list(path.iterdir())) == 1:
        return path / name
    return path
