"""What calls are counted in."""

from __future__ import annotations

from mmcore._ext.calls import SIZE_BOUNDS_BYTES, TIME_BOUNDS_S, CallCounters
from mmcore.metrics import SECONDS


def test_each_status_is_counted_by_itself() -> None:
    counters = CallCounters()
    assert counters.snapshot() == []
    counters.count(0, 0.0005, 128, 129)
    counters.count(0, 1000.0, 0, 10**9)
    counters.count(16, 0.003, 1, 2)
    ok, refused = counters.snapshot()
    assert (ok.status, refused.status) == (0, 16)
    assert (ok.request_bytes, ok.response_bytes) == (128, 129 + 10**9)
    assert [at for at, count in enumerate(ok.times) if count] == [0, len(TIME_BOUNDS_S)]
    assert [at for at, count in enumerate(ok.requests) if count] == [0]
    assert [at for at, count in enumerate(ok.responses) if count] == [1, len(SIZE_BOUNDS_BYTES)]
    assert abs(ok.time_s - 1000.0005) < 1e-6
    assert refused.times[3] == 1


def test_a_status_that_there_is_not_counts_as_unknown() -> None:
    counters = CallCounters()
    counters.count(99, 0, 0, 0)
    counters.count(-1, 0, 0, 0)
    assert [(counts.status, sum(counts.times)) for counts in counters.snapshot()] == [(2, 2)]


def test_bounds_are_those_of_the_archived_stack() -> None:
    assert [round(bound, 9) for bound in TIME_BOUNDS_S] == list(SECONDS)
    assert SIZE_BOUNDS_BYTES[:2] == (128, 512)
    assert len(SIZE_BOUNDS_BYTES) == 8
