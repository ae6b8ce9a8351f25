from __future__ import annotations

from typing import Any

import pytest

from mmcore._ext.rates import TIME_BOUNDS_NS
from mmcore.server.dashboard.listing import STATES
from mmcore.server.dashboard.merging import events_of, figure_of, row_of, shown, summary_of


def row(**told: Any) -> dict[str, Any]:
    return {
        "name": "m", "state": "not loaded", "reason": "", "copies": 0, "here": False, "everywhere": False, "late": [],
        "version": "", "bytes": None, "rate": None, "p50_ms": None, "p99_ms": None, "requests": None, "failed": None,
        "last_used_ms": None, **told,
    }  # fmt: skip


def loaded(**told: Any) -> dict[str, Any]:
    late = [0] * (len(TIME_BOUNDS_NS) + 1)
    return row(
        **{
            "state": "loaded", "copies": 1, "here": True, "version": "1", "late": late, "bytes": 10, "rate": 1.0,
            "requests": 4, "failed": 1, "last_used_ms": 7, **told,
        }
    )  # fmt: skip


def test_a_models_figures_are_added_and_its_times_are_those_of_all_requests() -> None:
    quick, slow = [0] * (len(TIME_BOUNDS_NS) + 1), [0] * (len(TIME_BOUNDS_NS) + 1)
    quick[2], slow[10] = 90, 10
    told = shown(row_of([loaded(late=quick), loaded(late=slow, rate=2.5, requests=5, last_used_ms=9)], STATES))
    assert (told["copies"], told["rate"], told["requests"], told["failed"], told["bytes"]) == (2, 3.5, 9, 2, 20)
    assert told["last_used_ms"] == 9
    assert TIME_BOUNDS_NS[1] / 1e6 <= told["p50_ms"] <= TIME_BOUNDS_NS[2] / 1e6
    assert TIME_BOUNDS_NS[9] / 1e6 <= told["p99_ms"] <= TIME_BOUNDS_NS[10] / 1e6
    assert "late" not in told and "everywhere" not in told


def test_a_model_that_another_worker_has_is_loaded() -> None:
    told = row_of([row(), loaded()], STATES)
    assert (told["state"], told["here"], told["copies"], told["version"], told["bytes"]) == ("loaded", True, 1, "1", 10)
    told = row_of([row(bytes=3), row(state="failed", reason="why")], STATES)
    assert (told["state"], told["reason"], told["bytes"], told["rate"]) == ("failed", "why", 3, None)


def test_copies_that_each_worker_knows_of_are_not_added() -> None:
    assert row_of([row(everywhere=True, copies=1), loaded(everywhere=True)], STATES)["copies"] == 1
    # The one that is asked may not have heard yet of the copy that another one has loaded.
    assert row_of([row(everywhere=True, copies=0), loaded(everywhere=True, copies=1)], STATES)["copies"] == 1


@pytest.mark.parametrize(
    ("sort", "figures", "expected"),
    [("rate", [1, None, 2], 3), ("p99_ms", [1, None, 2], 2), ("copies", [0, 1], 1), ("bytes", [None, None], None)],
)
def test_models_are_sorted_by_what_is_told_of_them(sort: str, figures: list[float | None], expected: float) -> None:
    assert figure_of(sort, figures) == expected


def summary(**told: Any) -> dict[str, Any]:
    history = {"requests_per_s": [1.0, 2.0], "failures_per_s": [0.0, 0.0], "p50_ms": [None, 1.0], "p99_ms": [3.0, None]}
    return {
        "instance": "a", "ready": True, "leader": False, "registry_connected": True, "models": 9, "loading": 1,
        "loaded_names": ["x", "y"], "failed": 0, "capacity_bytes": 100, "used_bytes": 10, "evictions": 1,
        "in_flight": 2, "failures": [], "history": history, **told,
    }  # fmt: skip


def test_a_summary_is_that_of_all_workers() -> None:
    other = summary(
        instance="b", leader=True, loaded_names=["y", "z"], failures=[{"model": "f", "version": "1", "reason": "why"}],
        failed=1, history={"requests_per_s": [5.0], "failures_per_s": [1.0], "p50_ms": [2.0], "p99_ms": [4.0]},
    )  # fmt: skip
    told = summary_of(summary(), {"b": other})
    assert (told["instance"], told["leader"], told["ready"]) == ("a", True, True)
    assert (told["models"], told["loaded"], told["failed"], told["loading"]) == (9, 3, 1, 2)
    assert (told["capacity_bytes"], told["used_bytes"], told["in_flight"]) == (200, 20, 4)
    # The newest are side by side.
    assert told["history"] == {
        "requests_per_s": [1.0, 7.0], "failures_per_s": [0.0, 1.0], "p50_ms": [None, 2.0], "p99_ms": [3.0, 4.0],
    }  # fmt: skip


def event(at_ms: int, what: str, model: str = "m", number: int = 1) -> dict[str, Any]:
    return {"number": number, "at_ms": at_ms, "model": model, "version": "", "what": what, "detail": ""}


def test_events_are_in_their_order_and_registrations_told_once() -> None:
    parts = {
        "a": [event(300_000, "registered"), event(200, "loaded"), event(100, "registered")],
        "b": [
            event(300_010, "registered"),
            event(250, "loaded"),
            event(103, "registered"),
            event(101, "registered", "n"),
        ],
    }
    told = [(one["at_ms"], one["what"], one["model"], one["instance"]) for one in events_of(parts, 10)]
    assert told == [
        (300_010, "registered", "m", "b"), (250, "loaded", "m", "b"), (200, "loaded", "m", "a"),
        (103, "registered", "m", "b"), (101, "registered", "n", "b"),
    ]  # fmt: skip
    assert len(events_of(parts, 2)) == 2
