"""What is remembered of loads that failed, and for how long."""

from __future__ import annotations

from mmcore.cache.failures import FIRST_EXPIRY_S, Failures
from mmcore.errors import LoadFailed
from tests.unit.models_in_memory import Clock


def test_a_failure_is_answered_until_it_expires_and_told_after_that() -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.remember("m", "1", LoadFailed("broken"))
    clock.now += FIRST_EXPIRY_S - 1
    assert str(failures.current("m", "1")) == "broken"
    clock.now += 1
    assert failures.current("m", "1") is None
    assert failures.last("m", "1") == "broken"
    failures.clear("m")
    assert failures.last("m", "1") == ""


def test_a_failure_can_be_kept_for_longer() -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.remember("m", "1", LoadFailed("crashed 5 times"), first_s=60)
    clock.now += 59
    assert failures.current("m", "1") is not None
    clock.now += 1
    assert failures.current("m", "1") is None
