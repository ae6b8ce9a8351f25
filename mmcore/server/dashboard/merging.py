"""What several workers tell, as what one would: counts are added, of states the best is told, of times the worst."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

from mmcore.server.dashboard.recent import quantile_ms

#: Events that each worker sees for itself, and how far apart they see the same one.
_SEEN_BY_ALL: Final = ("registered", "unregistered")
_APART_MS: Final = 5000
#: Figures of a model that are added; of others the highest is told.
_ADDED: Final = ("bytes", "rate", "requests", "failed")
_OF_SUMMARY: Final = ("loading", "capacity_bytes", "used_bytes", "evictions", "in_flight")


def best_state(states: Iterable[str], order: Sequence[str]) -> str:
    """The first of ``order`` that is among them, else its \"not loaded\"."""
    return min(states, key=order.index, default="not loaded")


def figure_of(sort: str, figures: Iterable[float | None]) -> float | None:
    """The figure that a model is sorted by; None where nobody has one."""
    told = [one for one in figures if one is not None]
    if not told:
        return None
    return sum(told) if sort in (*_ADDED, "copies") else max(told)


def row_of(rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """One row of those that workers have for a model, the asked one's first; ``late`` are times counted by bound."""
    first = rows[0]
    state = best_state((row["state"] for row in rows), order)
    # Who has a copy knows of it before the others do.
    copies = (max if first["everywhere"] else sum)(row["copies"] for row in rows)
    told: dict[str, Any] = {
        **first,
        "state": state,
        "copies": copies,
        "here": any(row["here"] for row in rows),
        "reason": next((row["reason"] for row in rows if row["state"] == state and row["reason"]), ""),
        "version": next((row["version"] for row in rows if row["version"]), ""),
        "last_used_ms": figure_of("last_used_ms", (row["last_used_ms"] for row in rows)),
    }
    loaded = [row for row in rows if row["here"]] or rows[:1]
    for field in _ADDED:
        told[field] = figure_of(field, (row[field] for row in loaded))
    counts = [sum(counted) for counted in zip_longest(*(row["late"] for row in rows), fillvalue=0)]
    told["p50_ms"], told["p99_ms"] = (rounded(quantile_ms(counts, share)) for share in (0.5, 0.99))
    told["rate"] = rounded(told["rate"])
    return told


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what only other workers want to know."""
    return {field: value for field, value in row.items() if field not in ("late", "everywhere")}


def summary_of(own: dict[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of all workers. Their histories are put side by side by their ends, a few seconds apart at most."""
    all_of = [own, *others.values()]
    failures = {(one["model"], one["version"]): one for part in reversed(all_of) for one in part["failures"]}
    history = own["history"]
    return {
        **own,
        **{field: sum(one[field] for one in all_of) for field in _OF_SUMMARY},
        "loaded": len({name for one in all_of for name in one["loaded_names"]}),
        "failed": max(len(failures), *(one["failed"] for one in all_of)),
        "ready": all(one["ready"] for one in all_of),
        "leader": any(one["leader"] for one in all_of),
        "registry_connected": all(one["registry_connected"] for one in all_of),
        "failures": list(failures.values()),
        "history": {
            field: _side_by_side([one["history"][field] for one in all_of], added=field.endswith("_per_s"))
            for field in history
        },
    }


def _side_by_side(histories: Sequence[list[float | None]], *, added: bool) -> list[float | None]:
    """Of each moment the sum, or the highest."""
    moments = zip_longest(*(reversed(history) for history in histories))
    found = [figure_of("rate" if added else "p99_ms", moment) for moment in moments]
    return [None if one is None else round(one, 3) for one in reversed(found)]


def events_of(parts: Mapping[str, Sequence[dict[str, Any]]], most: int) -> list[dict[str, Any]]:
    """The last events of all, newest first, each with the ``instance`` that tells it.

    What each worker sees for itself, a registration, is told once.
    """
    told = sorted(
        ({**event, "instance": instance} for instance, events in parts.items() for event in events),
        key=lambda event: (-event["at_ms"], event["instance"], -event["number"]),
    )
    found: list[dict[str, Any]] = []
    seen: dict[tuple[str, str], int] = {}
    for event in told:
        if event["what"] in _SEEN_BY_ALL:
            key = (event["model"], event["what"])
            if seen.get(key, event["at_ms"] + 2 * _APART_MS) - event["at_ms"] <= _APART_MS:
                continue
            seen[key] = event["at_ms"]
        found.append(event)
    return found[:most]


def rounded(value: float | None) -> float | None:
    """With four digits that count."""
    return None if value is None else float(f"{value:.4g}")
