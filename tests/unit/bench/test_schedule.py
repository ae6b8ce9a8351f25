"""An open loop's intended times: the rate asked for, reproducible, inside the window."""

from __future__ import annotations

import numpy as np
import pytest

from bench.load.schedule import intended_times_ns


def test_constant_arrivals_are_evenly_spaced() -> None:
    times = intended_times_ns(1000, 0.01, "constant")
    assert times.tolist() == [n * 1_000_000 for n in range(10)]


def test_poisson_arrivals_have_the_rate_and_exponential_gaps() -> None:
    times = intended_times_ns(5000, 20, "poisson")
    gaps = np.diff(times)
    assert abs(len(times) - 100_000) < 5 * 100_000**0.5
    assert (gaps >= 0).all()
    assert times[-1] < 20e9
    # Of exponential gaps the standard deviation is the mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


def test_the_same_seed_gives_the_same_times() -> None:
    assert (intended_times_ns(100, 1, "poisson", seed=4) == intended_times_ns(100, 1, "poisson", seed=4)).all()
    assert len(intended_times_ns(100, 1, "poisson", seed=4)) > 0


@pytest.mark.parametrize(("rate", "duration"), [(0, 1), (-1, 1), (10, 0)])
def test_a_rate_or_duration_that_is_not_positive_is_refused(rate: float, duration: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        intended_times_ns(rate, duration, "constant")
