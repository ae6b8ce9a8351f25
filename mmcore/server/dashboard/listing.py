"""The models of the instance as a page of a table: filtered, sorted and cut here, however many there are."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mmcore.cache import Copy, CopyState
from mmcore.errors import InvalidRequest
from mmcore.registry import Registry
from mmcore.routing import IndexRow, ModelState, Registered, Router
from mmcore.routing.registered import FIRST_VERSION
from mmcore.server.dashboard.merging import best_state, figure_of, rounded
from mmcore.server.dashboard.recent import Recent

STATES: Final = ("loaded", "loading", "unloading", "failed", "not loaded", "withdrawn")
SORTS: Final = ("name", "state", "copies", "bytes", "rate", "p50_ms", "p99_ms", "failed", "last_used_ms")
#: Rows of one answer, and how far into the table it may begin: beyond, a search is what helps.
MOST_ROWS: Final = 200
DEEPEST: Final = 50_000

#: Models looked at between two turns of the loop.
_AT_ONCE: Final = 1000
#: What a registered model's record holds only when an instance has tried to load it.
_TRIED: Final = (b'"copies"', b'"failures"')

_STATES: Final = {
    ModelState.LOADED: "loaded",
    ModelState.LOADING: "loading",
    ModelState.LOADING_FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a page shows: names that hold ``search`` (whatever their case), of a state, sorted, from a row on."""

    search: str = ""
    state: str = ""
    sort: str = "name"
    descending: bool = False
    offset: int = 0
    limit: int = 50

    @classmethod
    def of(cls, query: dict[str, str]) -> Asked:
        """As a query says: ``search``, ``state``, ``sort`` (a minus before it for descending), ``offset``, ``limit``.

        Raises:
            InvalidRequest: a value that cannot be; the text names it.
        """
        sort = query.get("sort", "name")
        asked = cls(
            search=query.get("search", "").casefold(),
            state=query.get("state", ""),
            sort=sort.removeprefix("-"),
            descending=sort.startswith("-"),
            offset=_number(query, "offset", 0, 0, DEEPEST),
            limit=_number(query, "limit", 50, 1, MOST_ROWS),
        )
        if asked.state and asked.state not in STATES:
            raise InvalidRequest(f"state must be one of {', '.join(STATES)}, got '{asked.state}'")
        if asked.sort not in SORTS:
            raise InvalidRequest(f"sort must be one of {', '.join(SORTS)}, got '{asked.sort}'")
        return asked


def _number(query: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise InvalidRequest(f"{name} must be a number from {least} to {most}, got '{text}'")
    return int(text)


class InUse(NamedTuple):
    """A model that a worker has loaded, or tried to; ``figure`` is what the page is sorted by."""

    name: str
    state: str
    figure: float | None


Elsewhere = Mapping[str, Sequence[InUse]]


class Listing:
    """The models that ``router`` knows, of the folder and of the registry."""

    def __init__(self, registry: Registry, router: Router, registered: Registered, recent: Recent) -> None:
        self._registry = registry
        self._router = router
        self._registered = registered
        self._recent = recent

    async def page(self, asked: Asked, elsewhere: Elsewhere | None = None) -> dict[str, Any]:
        """One page: ``models`` by name, how many there are (``total``) and match (``matched``), and these by state.

        ``elsewhere`` is what other workers have of them: states and figures by name.
        """
        elsewhere = elsewhere or {}
        names = self._router.names()
        kept: list[tuple[Any, str]] = []
        states: Counter[str] = Counter()
        most = asked.offset + asked.limit
        for start in range(0, len(names), _AT_ONCE):
            for name in names[start : start + _AT_ONCE]:
                if asked.search and asked.search not in name.casefold():
                    continue
                state, figures = self.state(name), elsewhere.get(name, ())
                if figures:
                    state = best_state((state, *(one.state for one in figures)), STATES)
                states[state] += 1
                if not asked.state or state == asked.state:
                    kept.append((self._key(name, state, asked, figures), name))
            kept.sort(key=lambda one: one[0], reverse=asked.descending and asked.sort in ("name", "state"))
            del kept[most:]
            await asyncio.sleep(0)
        return {
            "total": len(names),
            "matched": states[asked.state] if asked.state else states.total(),
            "states": {state: states[state] for state in STATES},
            "offset": asked.offset,
            "models": [name for _, name in kept[asked.offset :]],
        }

    async def in_use(self, asked: Asked) -> list[InUse]:
        """What another worker wants to know of a page's models: of those that are not merely not loaded."""
        found = []
        names = self._router.names()
        for start in range(0, len(names), _AT_ONCE):
            for name in names[start : start + _AT_ONCE]:
                if asked.search and asked.search not in name.casefold():
                    continue
                state = self.state(name)
                if state != "not loaded":
                    # Copies of registered models are known to each worker.
                    known = asked.sort in ("name", "state") or (asked.sort == "copies" and self._everywhere(name))
                    found.append(InUse(name, state, None if known else self._figure(name, asked.sort)))
            await asyncio.sleep(0)
        return found

    def state(self, name: str) -> str:
        """One of :data:`STATES`: that of the model's best copy, wherever it is."""
        if name in self._router.table or self._router.in_folder(name):
            own = best_state((self._own_state(row) for row in self._router.rows(name)), STATES)
            if own in ("loaded", "loading", "withdrawn") or self._router.in_folder(name):
                return own
        else:
            own = "not loaded"
            entry = self._registry.models.entry(name)
            # Reading a record takes twenty times as long as finding that there is nothing to be read in it. A failure
            # here may not have been written yet.
            if entry is None or not (
                any(tried in entry.value for tried in _TRIED) or self._router.cache.failures.last(name, FIRST_VERSION)
            ):
                return own
        return _STATES.get(self._registered.status(name).state, own)

    def _own_state(self, row: IndexRow) -> str:
        if row.state == "READY":
            return "loaded"
        if row.state in ("LOADING", "UNLOADING"):
            return row.state.lower()
        registration = self._router.table.get(row.name)
        if registration is not None and registration.withdrawn:
            return "withdrawn"
        failed = self._router.cache.failures.last(row.name, row.version)
        return "failed" if failed or (registration is not None and registration.problems) else "not loaded"

    def _key(self, name: str, state: str, asked: Asked, elsewhere: Sequence[InUse]) -> tuple[Any, ...]:
        """Smaller comes first; what has no figure comes last either way."""
        if asked.sort == "name":
            return (name,)
        if asked.sort == "state":
            return (STATES.index(state), name)
        figure: float | None = None
        if state != "not loaded":
            own = self._figure(name, asked.sort)
            figure = figure_of(asked.sort, (own, *(one.figure for one in elsewhere))) if elsewhere else own
        if figure is None:
            return (math.inf, name)
        return (-figure if asked.descending else figure, name)

    def _figure(self, name: str, sort: str) -> float | None:
        copy = self._copy(name)
        if sort == "copies":
            return self._copies(name)
        if copy is None:
            return None
        if sort == "bytes":
            return copy.weight
        if sort == "rate":
            # One that has not been looked at yet still comes before those that are not loaded.
            return self._recent.rate(copy) or 0.0
        if sort in ("p50_ms", "p99_ms"):
            return self._recent.times_ms(copy)[sort == "p99_ms"]
        counted = copy.statistics.snapshot()
        return counted.fail.count if sort == "failed" else counted.last_inference_ms or None

    def _copy(self, name: str) -> Copy | None:
        """The copy here that answers where no version is asked for."""
        registration = self._router.table.get(name)
        here = registration.here if registration is not None else None
        return here if isinstance(here, Copy) else None

    def _copies(self, name: str) -> int:
        """Loaded copies of the model, of every instance."""
        if self._everywhere(name):
            return self._registered.loaded_copies(name, self._registry.models.get(name))
        return int(self._copy(name) is not None)

    def _everywhere(self, name: str) -> bool:
        """Whether its copies are known wherever they are."""
        return name in self._registered and not self._router.in_folder(name)

    def row(self, name: str) -> dict[str, Any]:
        """What the table shows of a model; figures are this instance's, None where it has no copy.

        ``everywhere`` and ``late`` are for other workers: whether its copies are those of all instances, and its times
        counted by bound.
        """
        state = self.state(name)
        copy = self._copy(name)
        told: dict[str, Any] = {
            "name": name,
            "state": state,
            "reason": self.reason(name) if state in ("failed", "withdrawn") else "",
            "copies": self._copies(name),
            "here": copy is not None,
            "everywhere": self._everywhere(name),
            "late": self._recent.late(copy) if copy is not None else [],
        }
        if copy is None:
            record = self._registry.models.get(name) if name in self._registered else None
            told |= dict.fromkeys(("rate", "p50_ms", "p99_ms", "requests", "failed", "last_used_ms"))
            told |= {"version": "", "bytes": (record.size_bytes or None) if record is not None else None}
            return told
        counted = copy.statistics.snapshot()
        p50_ms, p99_ms = self._recent.times_ms(copy)
        return told | {
            "version": copy.version,
            "bytes": copy.weight,
            "rate": rounded(self._recent.rate(copy)),
            "p50_ms": rounded(p50_ms),
            "p99_ms": rounded(p99_ms),
            "requests": counted.success.count + counted.fail.count,
            "failed": counted.fail.count,
            "last_used_ms": counted.last_inference_ms or None,
        }

    def reason(self, name: str) -> str:
        """Why it is not loaded."""
        for row in reversed(self._router.rows(name)):
            if row.state == "UNAVAILABLE" and self._own_state(row) in ("failed", "withdrawn"):
                return row.reason
        if name in self._registered:
            errors = self._registered.status(name).errors
            return errors[0] if errors else ""
        return ""

    def whole(self, name: str) -> dict[str, Any] | None:
        """A model with its versions here and its copies everywhere; None for an unknown one."""
        if not self._router.knows(name):
            return None
        told = self.row(name)
        loaded = {copy.version: copy for copy in self._router.copies(name)}
        told["versions"] = [
            {
                "version": row.version,
                "state": self._fine_state(row),
                "reason": "" if row.state == "READY" and not row.reason else row.reason,
                "bytes": loaded[row.version].weight if row.version in loaded else None,
                "in_flight": loaded[row.version].in_flight if row.version in loaded else None,
                "format": loaded[row.version].source.format if row.version in loaded else "",
            }
            for row in self._router.rows(name)
        ]
        told["copies_at"] = []
        record = self._registry.models.get(name) if name in self._registered else None
        if record is not None and not self._router.in_folder(name):
            status = self._registered.status(name)
            told["registered"] = {"type": record.type, "path": record.path}
            told["errors"] = list(status.errors)
            told["copies_at"] = [
                {"instance": copy.location, "state": _STATES.get(copy.state, "not loaded"), "since_ms": copy.since_ms}
                for copy in status.copies
            ]
        return told

    def _fine_state(self, row: IndexRow) -> str:
        state = self._router.cache.state(row.name, row.version)
        if state in (CopyState.QUEUED, CopyState.PULLING, CopyState.LOADING):
            return state.value.lower()
        return self._own_state(row)
