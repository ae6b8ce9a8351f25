"""The origin of registered models: their files are pulled when they are to be loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from mmcore.errors import InvalidModel, LoadFailed, NotFound, Unavailable
from mmcore.model import ModelInfo, ModelSource
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.formats import format_of
from mmcore.storage.layout import DEFAULT_VERSION, Layout, inspect
from mmcore.storage.places import stated_format
from mmcore.storage.puller import Pulled, Pulls
from mmcore.storage.settings import read_schema
from mmcore.storage.signature import signature
from mmcore.storage.stated import Stated


class PulledOrigin:
    """The files of all registered models. Satisfies :class:`mmcore.storage.origin.Origin`.

    ``find`` tells how a model is registered, None when it is not. A registered model is one version: the highest of
    those its files have. It is given under whatever version it is asked for.
    """

    def __init__(self, puller: Pulls, find: Callable[[str], ModelInfo | None]) -> None:
        self._puller: Final = puller
        self._find = find
        self._lock = threading.Lock()
        #: Of mounted files, by model: what is loaded, and its signature.
        self._mounted: dict[str, tuple[Path, bytes]] = {}

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        """Pull the model's files, see :class:`mmcore.storage.origin.Origin`; they stay while the source is held."""
        info = self._find(name)
        if info is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        pulled = self._puller.pull(info, cancelled=cancelled)
        taken = None if pulled.lease is not None else (pulled.path, signature(pulled.path).digest)
        layout = layout_of(pulled, name, stated_format(info))
        if not layout.sources:
            raise LoadFailed("; ".join(layout.problems.values()) or "no version is available")
        newest = list(layout.sources.values())[-1]
        with self._lock:
            self._mounted.pop(name, None)
            if taken is not None:
                self._mounted[name] = taken
        return replace(newest, version=version, lease=pulled.lease)

    def confirm(self, name: str) -> None:
        """Check mounted files, see :class:`mmcore.storage.origin.Origin`; pulled ones never change."""
        with self._lock:
            taken = self._mounted.pop(name, None)
        if taken is not None and signature(taken[0]).digest != taken[1]:
            raise Unavailable(f"the files of model '{name}' changed while it was loaded; try again")


def layout_of(pulled: Pulled, name: str, stated: str | None) -> Layout:
    """What pulled files hold; the format they are registered with goes before what the files say.

    Raises:
        InvalidModel: they are no model, or their settings are wrong.
    """
    own = Stated(format=stated)
    if pulled.schema is not None:
        own = read_schema(pulled.schema).over(own)
    if pulled.path.is_dir():
        return inspect(pulled.path, name=name, override=lambda folder: own)
    # A single mounted file: what lies beside it in its folder is not the model's.
    found = stated or format_of(pulled.path)
    if found is None:
        raise InvalidModel(f"{pulled.path.name} is not a model of a known format")
    return Layout(name, {DEFAULT_VERSION: ModelSource(name, DEFAULT_VERSION, found, pulled.path, own.settings())}, {})
