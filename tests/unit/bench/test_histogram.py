"""The generator's histogram keeps its promise on precision, and its counts when merged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.load.histogram import MAX_BITS, Histogram


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    histogram.record(values)
    return histogram


def test_small_values_are_exact() -> None:
    histogram = filled(list(range(101)))
    assert histogram.percentile_ns(50) == 50
    assert histogram.percentile_ns(100) == 100
    assert histogram.count == 101


@pytest.mark.parametrize("value", [1, 127, 128, 129, 255, 256, 1000, 123_456, 10**9, 2**39, 2**40 - 1])
def test_a_value_is_reported_within_its_sixty_fourth_and_never_below(value: int) -> None:
    histogram = filled([value, 2**40 - 1])
    reported = histogram.percentile_ns(50)
    assert value <= reported <= value * (1 + 1 / 64)


def test_percentiles_follow_numpy_s_on_latencies_of_many_magnitudes() -> None:
    values = np.random.default_rng(3).lognormal(11, 1.5, 50_001).astype(np.int64)
    histogram = Histogram()
    histogram.record(values)
    for percent in (1, 50, 90, 99, 99.9):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert exact <= histogram.percentile_ns(percent) <= exact * (1 + 1 / 64)
    assert histogram.percentile_ns(100) == histogram.max_ns == values.max()


def test_merging_equals_recording_everything_in_one() -> None:
    first, second = filled([5, 1000, 70_000]), filled([3, 1_000_000])
    first.merge(second)
    together = filled([5, 1000, 70_000, 3, 1_000_000])
    assert first.count == together.count == 5
    assert [first.percentile_ns(p) for p in (10, 50, 90, 100)] == [together.percentile_ns(p) for p in (10, 50, 90, 100)]


def test_values_outside_the_range_are_counted_at_its_ends() -> None:
    histogram = filled([-5, 1 << (MAX_BITS + 3)])
    assert histogram.count == 2
    assert histogram.percentile_ns(50) == 0


def test_an_empty_histogram_has_no_percentile() -> None:
    histogram = filled([])
    assert histogram.count == 0
    assert math.isnan(histogram.percentile_ns(99))
