"""What loads and failures of this instance are counted by, for metrics."""

from __future__ import annotations

from mmcore.cache.copies import Copy
from mmcore.metrics import AGES, SECONDS, SIZES, Histogram


class Counters:
    """Since the instance began.

    Attributes:
        load_seconds: what finding, pulling and opening took, of loads that ended well.
        pull_seconds: of this, finding or pulling the files.
        queue_seconds: what these waited for their turn and for room.
        sizes: bytes that the models took.
        failures: loads that failed, and copies that had to be given up.
        miss_seconds: what requests waited for a copy that was not loaded.
        evicted_idle_seconds: for how long the models that were unloaded to make room had not been used.
        unload_seconds: what closing models took.
        unload_failures: models whose closing raised.
    """

    def __init__(self) -> None:
        self.load_seconds = Histogram(SECONDS)
        self.queue_seconds = Histogram(SECONDS)
        self.sizes = Histogram(SIZES)
        self.failures = 0
        self.pull_seconds = Histogram(SECONDS)
        self.miss_seconds = Histogram(SECONDS)
        self.evicted_idle_seconds = Histogram(AGES)
        self.unload_seconds = Histogram(SECONDS)
        self.unload_failures = 0

    def loaded(self, copy: Copy) -> None:
        """Count one copy that has been published."""
        self.load_seconds.observe(copy.times.work_s)
        self.pull_seconds.observe(copy.times.find_s)
        self.queue_seconds.observe(copy.times.queue_s + copy.times.room_s)
        self.sizes.observe(copy.weight)
