"""When an open loop intends to send: fixed before the run, so that a slow answer delays no other request's time."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Arrivals = Literal["poisson", "constant"]


def intended_times_ns(rate_per_s: float, duration_s: float, arrivals: Arrivals, seed: int = 1) -> NDArray[np.int64]:
    """Offsets in ns from the start, ascending, all below ``duration_s``.

    ``constant``: one every ``1 / rate_per_s``. ``poisson``: exponential gaps of that mean, the same for the same seed.

    Raises:
        ValueError: the rate or the duration is not positive.
    """
    if rate_per_s <= 0 or duration_s <= 0:
        raise ValueError(f"rate ({rate_per_s}/s) and duration ({duration_s} s) must be positive")
    gap_ns = 1e9 / rate_per_s
    end_ns = duration_s * 1e9
    if arrivals == "constant":
        return np.arange(0, end_ns, gap_ns).astype(np.int64)
    expected = rate_per_s * duration_s
    # Far more gaps than will be needed: 8 standard deviations above the mean.
    count = int(expected + 8 * expected**0.5 + 16)
    times = np.cumsum(np.random.default_rng(seed).exponential(gap_ns, count))
    return times[times < end_ns].astype(np.int64)
