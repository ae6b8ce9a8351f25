"""Where a version's files are found when it is to be loaded: asked late, so that a registered model holds no paths."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mmcore.errors import LoadFailed, NotFound, Unavailable
from mmcore.model import ModelSource
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.layout import Layout, inspect
from mmcore.storage.signature import signature
from mmcore.storage.stated import Stated


class Origin(Protocol):
    """Gives the sources of one or many models. All calls may block and are made in loader threads."""

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        """The version's files and settings as they are now; given up when ``cancelled`` is set meanwhile.

        Raises:
            Cancelled: it was given up.
            NotFound: it has no such version any more.
            LoadFailed: its files are no model; the text says why.
            Unavailable: its files are being changed at this moment.
        """

    def confirm(self, name: str) -> None:
        """Raise Unavailable when the model's files are not what they were taken for, so that a load of them is void."""


class FileOrigin:
    """The files of one model in a place of its own, read with settings laid over the folder's.

    ``owned`` says that the folder was made for this origin; :meth:`close` removes it then.
    """

    def __init__(
        self, name: str, path: Path, *, override: Callable[[Path], Stated] | None = None, owned: bool = False
    ) -> None:
        self._name = name
        self._path = path
        self._override = override
        self._owned = owned
        self._signature = b""

    def layout(self) -> Layout:
        """What the files are now. Blocking; InvalidModel as in :func:`mmcore.storage.layout.inspect`."""
        self._signature = signature(self._path).digest
        return inspect(self._path, name=self._name, override=self._override)

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        """The version's source, see :class:`Origin`."""
        return pick(self.layout(), name, version)

    def confirm(self, name: str) -> None:
        """Check the files against those last looked at, see :class:`Origin`."""
        if signature(self._path).digest != self._signature:
            raise Unavailable(f"the files of model '{name}' changed while it was loaded; try again")

    def close(self) -> None:
        """Remove the files if they are this origin's own."""
        if self._owned:
            shutil.rmtree(self._path, ignore_errors=True)


def pick(layout: Layout, name: str, version: str) -> ModelSource:
    """The version's source in a layout.

    Raises:
        NotFound: there is no such version.
        LoadFailed: there is, with a reason why it cannot be loaded.
    """
    source = layout.sources.get(version)
    if source is not None:
        return source
    if version in layout.problems:
        raise LoadFailed(layout.problems[version])
    raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
