"""Rates and latencies as the dashboard tells them."""

from __future__ import annotations

import pytest

from mmcore._ext.rates import TIME_BOUNDS_NS
from mmcore.server.dashboard.recent import Recent, quantile_ms
from tests.unit.cache.test_cache import Clock, Fixture

MS = 1_000_000


def test_a_quantile_lies_between_the_bounds_that_its_value_lies_between() -> None:
    counts = [0] * (len(TIME_BOUNDS_NS) + 1)
    assert quantile_ms(counts, 0.5) is None
    counts[TIME_BOUNDS_NS.index(5 * MS)] = 100
    assert quantile_ms(counts, 0.5) == pytest.approx(3.5)
    assert quantile_ms(counts, 0.99) == pytest.approx(4.97)
    counts[-1] = 10_000
    assert quantile_ms(counts, 0.99) == TIME_BOUNDS_NS[-1] / MS


async def test_the_rate_of_a_copy_follows_its_requests() -> None:
    fixture, clock = Fixture(), Clock()
    copies = await fixture.loaded("a", "b")
    recent = Recent(lambda: copies, clock)
    await recent.look_at_each()
    assert recent.rate(copies[0]) == 0
    for _ in range(50):
        fixture.cache.lru.touch(copies[0])
        copies[0].statistics.record(1, 0, 0, 4 * MS, 0)
    clock.now += 5
    await recent.look_at_each()
    assert recent.rate(copies[0]) == pytest.approx(10)
    for _ in range(50):
        fixture.cache.lru.touch(copies[0])
        copies[0].statistics.record(1, 0, 0, 4 * MS, 0)
    clock.now += 5
    await recent.look_at_each()
    assert recent.rate(copies[0]) == pytest.approx(10)
    assert recent.rate(copies[1]) == 0
    p50, p99 = recent.times_ms(copies[0])
    assert p50 is not None
    assert p99 is not None
    assert 2 < p50 < p99 <= 5
    for _ in range(12):
        clock.now += 5
        await recent.look_at_each()
    assert recent.rate(copies[0]) == pytest.approx(0, abs=0.02)
    assert recent.times_ms(copies[0]) == (p50, p99)
    await fixture.cache.close()


async def test_what_all_models_did_since_the_last_look() -> None:
    fixture, clock = Fixture(), Clock()
    copies = await fixture.loaded("a")
    recent = Recent(lambda: copies, clock)
    for _ in range(20):
        copies[0].statistics.record(1, 0, 0, 4 * MS, 0)
    copies[0].statistics.fail(MS)
    clock.now += 2
    recent.look_at_all()
    clock.now += 2
    recent.look_at_all()
    busy, idle = recent.looks
    assert busy.requests_per_s == pytest.approx(10)
    assert busy.failures_per_s == pytest.approx(0.5)
    assert busy.p99_ms == pytest.approx(4.97)
    assert idle == (0, 0, None, None)
    await fixture.cache.close()
