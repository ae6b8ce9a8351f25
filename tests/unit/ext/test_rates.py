"""The counters of a copy add up, by batch size too, and stay bounded."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from mmcore._ext.rates import TIME_BOUNDS_NS, Duration, ModelStatistics, now_ns

NS = st.integers(0, 10**12)


def test_new_counters_are_zero() -> None:
    snapshot = ModelStatistics().snapshot()
    assert snapshot.success == snapshot.fail == snapshot.queue == Duration(0, 0)
    assert (snapshot.inference_count, snapshot.execution_count, snapshot.last_inference_ms) == (0, 0, 0)
    assert snapshot.batches == ()


@given(st.lists(st.tuples(st.integers(1, 40), NS, NS, NS, NS), max_size=60), st.lists(NS, max_size=10))
def test_counters_are_the_sums_of_what_was_recorded(
    answered: list[tuple[int, int, int, int, int]], failed: list[int]
) -> None:
    statistics = ModelStatistics()
    for one in answered:
        statistics.record(*one)
    for total_ns in failed:
        statistics.fail(total_ns)
    found = statistics.snapshot()
    count = len(answered)
    sums = [sum(one[part] for one in answered) for part in range(5)]
    assert found.inference_count == sums[0]
    assert found.execution_count == count
    parts = (found.queue, found.compute_input, found.compute_infer, found.compute_output)
    assert parts == tuple(Duration(count, one) for one in sums[1:])
    assert found.success == Duration(count, sum(sums[1:]))
    assert found.fail == Duration(len(failed), sum(failed))
    assert [batch.batch_size for batch in found.batches] == sorted({one[0] for one in answered})
    for batch in found.batches:
        same = [one for one in answered if one[0] == batch.batch_size]
        assert batch.compute_input == Duration(len(same), sum(one[2] for one in same))
        assert batch.compute_infer == Duration(len(same), sum(one[3] for one in same))
        assert batch.compute_output == Duration(len(same), sum(one[4] for one in same))


def test_batch_sizes_are_kept_up_to_a_limit() -> None:
    statistics = ModelStatistics()
    for size in range(1, 2001):
        statistics.record(size, 1, 1, 1, 1)
    snapshot = statistics.snapshot()
    assert len(snapshot.batches) == 256
    assert snapshot.execution_count == 2000
    assert snapshot.inference_count == sum(range(2001))


def test_the_last_inference_is_now_in_unix_milliseconds() -> None:
    statistics = ModelStatistics()
    before = time.time_ns() // 1_000_000
    statistics.record(1, 0, 0, 0, 0)
    after = time.time_ns() // 1_000_000
    assert before <= statistics.snapshot().last_inference_ms <= after


def test_the_clock_is_the_monotonic_one() -> None:
    before = time.monotonic_ns()
    now = now_ns()
    assert before <= now <= time.monotonic_ns()


def test_requests_are_counted_by_their_whole_time() -> None:
    statistics = ModelStatistics()
    statistics.record(1, 1_000_000, 0, 3_000_000, 0)
    statistics.record_part(8, 2, True, 0, 0, 400_000_000_000, 0)
    statistics.hit(10_000)
    statistics.fail(10_000)
    counts = statistics.times_by_bound()
    assert len(counts) == len(TIME_BOUNDS_NS) + 1
    assert {at: count for at, count in enumerate(counts) if count} == {
        0: 1,
        TIME_BOUNDS_NS.index(5_000_000): 1,
        len(TIME_BOUNDS_NS): 1,
    }
