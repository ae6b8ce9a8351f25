"""vmodels: names that stand for one model and are moved to another one without a request being lost.

Every change is one transaction over the vmodel's record and those of the models it refers to, whoever makes it. The
leader carries transitions out (:mod:`mmcore.routing.transitions`); any instance may start one and wait for its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final

from mmcore.errors import InvalidRequest
from mmcore.registry import ModelRecord, Registry, Table, VModelRecord
from mmcore.routing.registered import Registered, wall_ms
from mmcore.routing.replica import catch_up
from mmcore.routing.status import ModelStatus
from mmcore.routing.vmodel_changes import Changes, Wanted, delete_vmodel, in_transition, set_vmodel, switch, touched

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VModelStatus:
    """What a vmodel is: its record, and the state of the models it refers to; ``target`` during a transition only."""

    record: VModelRecord
    active: ModelStatus
    target: ModelStatus | None


class _Incomplete(Exception):
    """A transaction needs the records of these models as well."""

    def __init__(self, models: set[str]) -> None:
        super().__init__(models)
        self.models = models


class VModels:
    """The vmodels as one instance sees and changes them. ``default_owner`` owns those that are set without an owner."""

    def __init__(
        self,
        registry: Registry,
        registered: Registered,
        *,
        default_owner: str = "",
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._registry: Final = registry
        self._registered: Final = registered
        self._default_owner = default_owner
        self._clock_ms = clock_ms

    async def assign(self, name: str, wanted: Wanted, *, sync: bool = False) -> VModelStatus:
        """Give a vmodel its target; ``sync`` waits until that is its active model and loaded, or could not be loaded.

        Raises:
            InvalidRequest, NotFound, AlreadyExists, Conflict: see :func:`mmcore.routing.vmodel_changes.set_vmodel`.
            Unavailable: the registry is away.
        """
        _check_name(name)
        if not wanted.target:
            raise InvalidRequest("Must provide targetModelId")
        if wanted.info is not None and not wanted.info.type:
            raise InvalidRequest("Must provide non-empty model type string")
        served = False

        def change(before: VModelRecord | None, models: dict[str, ModelRecord | None]) -> Changes:
            nonlocal served
            if before is not None:
                served = self._registered.loaded_copies(before.active, models[before.active]) > 0
            changes = set_vmodel(
                name,
                before,
                models,
                wanted,
                loaded=self._registered.loaded_copies,
                default_owner=self._default_owner,
                now_ms=self._clock_ms(),
            )
            if sync and before is not None and before.failed and changes.vmodel == before:
                # Who waits for it wants it tried again.
                return Changes(replace(before, failed=False), changes.models)
            return changes

        record = await self._transact(name, change, {wanted.target})
        assert record is not None
        if wanted.load_now or served:
            # A transition that is waited for waits for the load itself.
            await self._registered.ensure_loaded(wanted.target, sync=sync and not in_transition(record))
        if sync:
            await self._settled(name, wanted.target)
        return self.status(name) or self._status(record)

    async def delete(self, name: str, owner: str = "") -> None:
        """Let a vmodel go, and with it models that nothing else refers to if they were registered so.

        One that is not there, or has another owner than the one given, is no error.

        Raises:
            InvalidRequest: the name is empty.
            Unavailable: the registry is away.
        """
        _check_name(name)

        def change(before: VModelRecord | None, models: dict[str, ModelRecord | None]) -> Changes:
            if before is None or owner not in ("", before.owner):
                return Changes(before, {})
            return delete_vmodel(before, models)

        await self._transact(name, change)

    async def find(self, name: str, owner: str = "") -> VModelStatus | None:
        """The status of a vmodel; None where there is none, or one of another owner than the one given.

        Raises:
            InvalidRequest: the name is empty.
            Unavailable: this instance knows of none, and the registry is away.
        """
        _check_name(name)
        if name not in self._registry.vmodels:
            await catch_up(self._registry.vmodels, name)
        record = self._registry.vmodels.get(name)
        return self._status(record) if record is not None and owner in ("", record.owner) else None

    def status(self, name: str) -> VModelStatus | None:
        """The status of a vmodel by what this instance knows; None where it knows of none."""
        record = self._registry.vmodels.get(name)
        return self._status(record) if record is not None else None

    # For the one who carries transitions out.

    async def complete(self, name: str, seen: VModelRecord) -> None:
        """Make the target of a vmodel its active model, if the vmodel still is as it was seen.

        Raises:
            NotLeader: this instance is not the leader any more.
            Unavailable: the registry is away.
        """

        def change(before: VModelRecord | None, models: dict[str, ModelRecord | None]) -> Changes:
            return switch(before, models) if before is not None and _same(before, seen) else Changes(before, {})

        await self._transact(name, change, fenced=True)

    async def mark_failed(self, name: str, seen: VModelRecord) -> None:
        """Note that the target could not be loaded, if the vmodel still is as it was seen; raises as for a switch."""

        def change(before: VModelRecord | None, models: dict[str, ModelRecord | None]) -> Changes:
            same = before is not None and _same(before, seen)
            return Changes(replace(before, failed=True) if same and before is not None else before, {})

        await self._transact(name, change, fenced=True)

    def copies(self, model: str) -> int:
        """How many copies of a model answer requests."""
        return self._registered.loaded_copies(model, self._registry.models.get(model))

    async def _transact(
        self,
        name: str,
        change: Callable[[VModelRecord | None, dict[str, ModelRecord | None]], Changes],
        models: Collection[str] = (),
        *,
        fenced: bool = False,
    ) -> VModelRecord | None:
        """Change a vmodel's record and its models' in one transaction, and return the vmodel's.

        ``change`` is given the records of ``models`` and of those that the vmodel refers to.
        """
        vmodels, table = self._registry.vmodels, self._registry.models
        wanted = {*models, *touched(vmodels.get(name))}
        while True:
            names = sorted(wanted)

            def change_all(before: list[ModelRecord | VModelRecord | None]) -> list[ModelRecord | VModelRecord | None]:
                vmodel, *records = before
                assert vmodel is None or isinstance(vmodel, VModelRecord)
                found = dict(zip(names, records, strict=True))  # noqa: B023  # called within this turn of the loop
                if missing := touched(vmodel) - found.keys():
                    raise _Incomplete(missing)
                changes = change(vmodel, found)  # type: ignore[arg-type]  # the others are of the models' table
                return [changes.vmodel, *({**found, **changes.models}[one] for one in names)]  # noqa: B023

            keys: list[tuple[Table[Any], str]] = [(vmodels, name), *((table, one) for one in names)]
            try:
                after = await self._registry.commit(keys, change_all, fenced=fenced)
            except _Incomplete as incomplete:
                # Another has pointed it to models that were not read with it.
                wanted |= incomplete.models
                continue
            record = after[0]
            assert record is None or isinstance(record, VModelRecord)
            return record

    async def _settled(self, name: str, target: str) -> None:
        """Wait until the vmodel has made its transition to ``target`` or failed to, or has been given another one."""
        ended = asyncio.get_running_loop().create_future()

        def look(changed: str) -> None:
            record = self._registry.vmodels.get(name)
            moves = record is not None and record.target == target and in_transition(record) and not record.failed
            if not moves and not ended.done():
                ended.set_result(None)

        stop = self._registry.vmodels.listen(lambda changed: look(changed) if changed == name else None)
        try:
            look(name)
            await ended
        finally:
            stop()

    def _status(self, record: VModelRecord) -> VModelStatus:
        target = self._registered.status(record.target) if in_transition(record) else None
        return VModelStatus(record, self._registered.status(record.active), target)


def _same(one: VModelRecord, other: VModelRecord) -> bool:
    return (one.active, one.target) == (other.active, other.target) and in_transition(one)


def _check_name(name: str) -> None:
    if not name:
        raise InvalidRequest("Must provide vModelId")
