"""The exposition format by Prometheus's own parser, and what counters and histograms count."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mmcore._ext.rates import BATCH_BOUNDS, TIME_BOUNDS_NS, ModelStatistics, totals
from mmcore.metrics import SECONDS, SIZES, Exposition, Histogram


def test_what_is_written_is_read_by_prometheus() -> None:
    out = Exposition()
    out.value("a_total", "counter", "Some text.", 2**53 + 1, {"path": 'C:\\"x"\n', "kind": ""})
    out.values("b", "gauge", "Two.", [({"x": "1"}, 0.1), ({"x": "2"}, 1e-9)])
    histogram = Histogram((0.5, 1.0))
    for value in (0.5, 0.6, 1.0, 7.0):
        histogram.observe(value)
    out.histogram("c_seconds", "Some.", histogram, {"y": "z"})
    families = {family.name: family for family in text_string_to_metric_families(out.text().decode())}
    assert families["a"].type == "counter"
    [sample] = families["a"].samples
    assert (sample.value, sample.labels) == (2**53 + 1, {"path": 'C:\\"x"\n', "kind": ""})
    assert [(sample.labels, sample.value) for sample in families["b"].samples] == [
        ({"x": "1"}, 0.1),
        ({"x": "2"}, 1e-9),
    ]
    found = [(sample.name, sample.labels.get("le"), sample.value) for sample in families["c_seconds"].samples]
    assert found == [
        ("c_seconds_bucket", "0.5", 1), ("c_seconds_bucket", "1", 3), ("c_seconds_bucket", "+Inf", 4),
        ("c_seconds_sum", None, pytest.approx(9.1)), ("c_seconds_count", None, 4),
    ]  # fmt: skip


def test_a_histogram_in_another_unit_counts_the_same() -> None:
    histogram = Histogram(SECONDS)
    histogram.observe(0.003)
    scaled = histogram.scaled(1000)
    assert (scaled.bounds[:3], scaled.total, scaled.counts) == ([0.5, 1.0, 2.0], 3.0, histogram.counts)


def test_bounds_are_those_of_the_archived_stack_among_others() -> None:
    assert {round(bound * 1e9) for bound in SECONDS} <= set(TIME_BOUNDS_NS)
    assert SIZES[:2] == (262144, 1048576)
    assert sorted(BATCH_BOUNDS) == list(BATCH_BOUNDS)


def test_all_copies_count_together_and_stay_counted() -> None:
    before = totals()
    first, second = ModelStatistics(), ModelStatistics()
    first.record(3, 10_000, 1, 10_001, 2)
    second.record_part(8, 5, True, 400 * 10**9, 0, 0, 0)
    second.record_part(8, 3, False, 0, 0, 0, 0)
    second.fail(7)
    second.hit(7)
    second.miss(7)
    del first, second
    after = totals()

    def added(field: str) -> list[int]:
        old, new = getattr(before, field), getattr(after, field)
        old, new = (old, new) if isinstance(new, list) else (old.counts, new.counts)
        return [at for at, (was, now) in enumerate(zip(old, new, strict=True)) for _ in range(now - was)]

    last = len(TIME_BOUNDS_NS)
    assert added("queue") == [0, 0, last]
    assert added("infer") == [0, 0, 1]
    assert added("total") == [0, 1, last]
    assert [BATCH_BOUNDS[at] for at in added("batch_counts")] == [4, 8]
    assert after.executed_rows - before.executed_rows == 11
    assert after.rows - before.rows == 11
    assert after.infer.sum_ns - before.infer.sum_ns == 10_001
    for field in ("failed", "hits", "misses"):
        assert getattr(after, field) - getattr(before, field) == 1
