"""Latencies in logarithmic buckets: small, mergeable, percentiles within 1.6 %."""

from __future__ import annotations

from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

#: Buckets to an octave as a power of two: 64, so that a bucket is at most 1/64 of its value wide.
SUB_BITS: Final = 6
SUB_BUCKETS: Final = 1 << SUB_BITS
#: 2**40 ns are 18 minutes; anything longer is counted as that.
MAX_BITS: Final = 40
BUCKETS: Final = (MAX_BITS - SUB_BITS + 1) * SUB_BUCKETS


def _bucket_of(values_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket numbers. Below 64 a value is its own bucket; above, its leading 7 bits name the bucket."""
    values = np.clip(values_ns, 0, (1 << MAX_BITS) - 1)
    bits = np.frexp(values.astype(np.float64))[1].astype(np.int64)  # bit length; exact below 2**53
    shift = np.maximum(bits - SUB_BITS - 1, 0)
    return (shift << SUB_BITS) + (values >> shift)


def _upper_bound(bucket: int) -> int:
    """The largest value in ns that falls into a bucket."""
    if bucket < 2 * SUB_BUCKETS:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    leading = (bucket & (SUB_BUCKETS - 1)) + SUB_BUCKETS
    return ((leading + 1) << shift) - 1


class Histogram:
    """Counts of latencies in ns."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(BUCKETS, np.int64)
        self._max_ns = 0

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return int(self._counts.sum())

    @property
    def max_ns(self) -> int:
        """The largest value recorded, exactly; 0 when empty."""
        return self._max_ns

    def record(self, values_ns: list[int] | NDArray[np.int64]) -> None:
        """Add values; negative ones count as 0."""
        values = np.asarray(values_ns, np.int64)
        if values.size == 0:
            return
        self._counts += np.bincount(_bucket_of(values), minlength=BUCKETS)
        self._max_ns = max(self._max_ns, int(values.max()))

    def merge(self, other: Self) -> None:
        """Add another histogram's counts."""
        self._counts += other._counts
        self._max_ns = max(self._max_ns, other._max_ns)

    def percentile_ns(self, percent: float) -> float:
        """The value that ``percent`` of the recorded ones do not exceed, rounded up to its bucket; nan when empty."""
        total = self.count
        if total == 0:
            return float("nan")
        rank = max(1, int(np.ceil(total * percent / 100)))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return float(min(_upper_bound(bucket), self._max_ns))
