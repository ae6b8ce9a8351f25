"""Models and vmodels that are registered from a file: the file of ``--static-models``.

The file is ModelMesh's: a list of ``{"modelId": …, "modelInfo": {"type": …, "path": …, "key": …}, "vModelId": …,
"retainAfterTransition": …, "ensureLoaded": …}``. They are registered before the instance takes requests, and whenever
the file changes. What a change takes out of the file is unregistered, unless vmodels refer to it: all instances of a
mesh should have the same file. What was taken out while no instance ran is unregistered at the next start, if nobody
but the file of that path has registered it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from mmcore.errors import Conflict, LoadFailed, MmcoreError
from mmcore.model import ModelInfo
from mmcore.registry import ModelRecord, Registry, VModelRecord
from mmcore.registry.table import Table
from mmcore.routing import ModelState, Registered, VModels, Wanted

log = logging.getLogger(__name__)

#: How long a start waits for a model that must be loaded.
LOAD_WAIT_S: Final = 600.0

_FIELDS: Final[dict[str, type]] = {
    "modelId": str, "modelInfo": dict, "vModelId": str, "retainAfterTransition": bool, "ensureLoaded": bool,
}  # fmt: skip
_INFO_FIELDS: Final[dict[str, type]] = {"type": str, "path": str, "key": str}


@dataclass(frozen=True, slots=True)
class StaticModel:
    """One entry of the file.

    Attributes:
        name, info: the model.
        vmodel: a vmodel that shall stand for it; empty for none.
        retained: whether the model stays registered when that vmodel moves on.
        loaded: whether the instance is to be ready only when it is loaded.
    """

    name: str
    info: ModelInfo
    vmodel: str = ""
    retained: bool = False
    loaded: bool = False


def parse_static_models(text: str) -> tuple[StaticModel, ...]:
    """Read the file's JSON.

    Raises:
        ValueError: it is not JSON, or has an unknown field or a value of the wrong kind; the text names it.
    """
    content = json.loads(text)
    if not isinstance(content, list):
        raise ValueError(f"expected a list of models, got {type(content).__name__}")
    return tuple(_entry(number, entry) for number, entry in enumerate(content))


def _entry(number: int, entry: object) -> StaticModel:
    fields = _checked(entry, _FIELDS, f"entry {number}")
    name = fields.get("modelId")
    if not name:
        raise ValueError(f"entry {number}: a modelId is needed")
    info = _checked(fields.get("modelInfo"), _INFO_FIELDS, f"{name}.modelInfo")
    if not info.get("type"):
        raise ValueError(f"{name}.modelInfo: a type is needed")
    return StaticModel(
        name,
        ModelInfo(info["type"], info.get("path", ""), info.get("key", "")),
        fields.get("vModelId", ""),
        fields.get("retainAfterTransition", False),
        fields.get("ensureLoaded", False),
    )


def _checked(value: object, known: dict[str, type], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, got {type(value).__name__}")
    for name, content in value.items():
        if name not in known:
            raise ValueError(f"{what}: unknown field {name!r}; known are {', '.join(known)}")
        if type(content) is not known[name]:
            raise ValueError(f"{what}.{name}: expected {known[name].__name__}, got {type(content).__name__}")
    return value


class StaticModels:
    """Registers the models of a file; ``file`` is its path, by which records tell whose they are."""

    def __init__(self, registry: Registry, registered: Registered, vmodels: VModels, file: str) -> None:
        self._registry = registry
        self._file = file
        self._registered = registered
        self._vmodels = vmodels
        self._applying: asyncio.Task[None] | None = None
        self._known: tuple[StaticModel, ...] = ()

    async def apply(self, models: Sequence[StaticModel]) -> None:
        """Register them, and wait for those that must be loaded; let go of what an earlier file had more than this.

        Raises:
            MmcoreError: one could not be registered, or loaded in time; the text names it.
        """
        self._known = tuple(models)
        for model in models:
            await self._named(model, self._apply)
        vmodels, names = {model.vmodel for model in models}, {model.name for model in models}
        for name in _left(self._registry.vmodels, self._file, vmodels):
            await self._vmodels.delete(name)
        for name in _left(self._registry.models, self._file, names):
            try:
                await self._unregister(name)
            except Conflict as error:
                log.error("static model %s: %s", name, error)

    async def _named(self, model: StaticModel, work: Callable[[StaticModel], Awaitable[None]]) -> None:
        """Do something about an entry, with its name in the error."""
        try:
            await work(model)
        except MmcoreError as error:
            raise type(error)(f"static model {model.name}: {error}") from error

    async def _apply(self, model: StaticModel) -> None:
        if model.vmodel:
            wanted = Wanted(
                model.name, model.info, auto_delete=not model.retained, load_now=model.loaded, static=self._file
            )
            await self._vmodels.assign(model.vmodel, wanted)
        else:
            await self._registered.register(model.name, model.info, static=self._file)
        if not model.loaded:
            return
        try:
            async with asyncio.timeout(LOAD_WAIT_S):
                status = await self._registered.ensure_loaded(model.name, sync=True)
        except TimeoutError:
            raise LoadFailed(f"not loaded within {LOAD_WAIT_S:g} seconds") from None
        if status.state is not ModelState.LOADED:
            raise LoadFailed("; ".join(status.errors) or f"is {status.state.name}")

    def changed(self, models: Sequence[StaticModel]) -> None:
        """The file has changed: register what is new in it and let go of what is not, one change after the other."""
        before = self._applying
        self._applying = asyncio.get_running_loop().create_task(
            self._apply_changed(models, before), name="register the static models"
        )

    async def _apply_changed(self, models: Sequence[StaticModel], before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        known, self._known = self._known, tuple(models)
        for model in models:
            try:
                await self._named(model, self._apply)
            except MmcoreError as error:
                log.error("%s", error)
        names, vmodels = {model.name for model in models}, {model.vmodel for model in models}
        for model in known:
            try:
                await self._named(model, partial(self._remove, names=names, vmodels=vmodels))
            except MmcoreError as error:
                log.error("%s", error)

    async def _remove(self, model: StaticModel, names: set[str], vmodels: set[str]) -> None:
        """Let go of what of an entry is in none of the others, if it still stands for what the entry says."""
        if model.vmodel and model.vmodel not in vmodels:
            status = self._vmodels.status(model.vmodel)
            if status is not None and status.record.target == model.name:
                await self._vmodels.delete(model.vmodel)
        if model.name not in names:
            await self._unregister(model.name)

    async def _unregister(self, name: str) -> None:
        await self._registered.unregister(name)
        log.info("model %s is in the file of static models no more", name)

    async def close(self) -> None:
        """Leave what has not been registered yet."""
        if self._applying is not None:
            self._applying.cancel()
            await asyncio.wait([self._applying])


def _left(table: Table[ModelRecord] | Table[VModelRecord], file: str, wanted: set[str]) -> list[str]:
    """The records that the file of that path has registered and does not want any more."""
    found = []
    for name in table:
        # A hundred thousand are not decoded for the few.
        entry = table.entry(name)
        if entry is None or b'"static"' not in entry.value or name in wanted:
            continue
        record = table.get(name)
        if record is not None and record.static == file:
            found.append(name)
    return found
