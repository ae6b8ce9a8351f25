"""One model version held in memory by this instance: its states, its leases and what requests need of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, NamedTuple

from mmcore._ext.lru import Entry
from mmcore._ext.rates import ModelStatistics
from mmcore._ext.v2codec import Signature
from mmcore.model import ModelSource
from mmcore.runtimes import LoadedModel


class CopyState(StrEnum):
    """Where a version is between its files and memory."""

    QUEUED = "QUEUED"
    PULLING = "PULLING"
    LOADING = "LOADING"
    LOADED = "LOADED"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"


class LoadTimes(NamedTuple):
    """Where the time of a load went, in seconds: waiting for a turn, finding or pulling the files, waiting for room,
    reading them into the framework with the warm-up, and publishing the copy.
    """

    queue_s: float = 0.0
    find_s: float = 0.0
    room_s: float = 0.0
    open_s: float = 0.0
    publish_s: float = 0.0

    @property
    def work_s(self) -> float:
        """What loading it again would take."""
        return self.find_s + self.open_s


class Copy(Entry):
    """A loaded model version.

    Attributes:
        name, version: what it answers for.
        source: the files and settings it was loaded from.
        files: the signature of its files at that time; empty where they have no folder of their own.
        model: what answers; not to be called without a lease once the loop has been left.
        signature: checks a request and binds its tensors.
        statistics: its counters, from zero with each load.
        state: LOADED, or UNLOADING when it takes no new requests.
        lane: what the execution knows of it.
        prepared: what the compiled request path needs of it.
        device_bytes: what it takes of a device's memory.
        times: where the time of its load went.

    The weight is what it takes of the host's memory, in bytes, and the key is (name, version).
    """

    __slots__ = (
        *("_on_grown", "_on_idle", "device_bytes", "files", "lane", "model", "name", "prepared", "resident"),
        *("signature", "source", "state", "statistics", "times", "version"),
    )

    def __init__(
        self,
        source: ModelSource,
        model: LoadedModel,
        signature: Signature,
        *,
        files: bytes,
        weight: int,
        on_idle: Callable[[Copy], None],
        on_grown: Callable[[Copy, int], None] = lambda copy, growth: None,
        device_bytes: int = 0,
    ) -> None:
        super().__init__((source.name, source.version), weight)
        self.name: Final = source.name
        self.version: Final = source.version
        self.source: Final = source
        self.files: Final = files
        self.model = model
        self.signature = signature
        self.statistics: Final = ModelStatistics()
        self.state = CopyState.LOADED
        self.lane: Any = None
        self.prepared: Any = None
        #: Pinned by the cache for its first moments, so that the request that asked for it finds it.
        self.resident = False
        self.device_bytes: Final = device_bytes
        self.times = LoadTimes()
        self._on_idle = on_idle
        self._on_grown = on_grown

    @property
    def in_flight(self) -> int:
        """The leases that are out."""
        return self.pins - self.resident

    def acquire(self) -> None:
        """Take a lease: the copy is neither evicted nor closed before it is returned by :meth:`release`."""
        self.pin()

    def release(self) -> None:
        """Return a lease; on the loop's thread. ValueError when none is out."""
        if self.unpin() == 0:
            self._on_idle(self)

    def grew(self, growth: int) -> None:
        """Its first inferences have made it take so many bytes more; on the loop's thread."""
        self._on_grown(self, growth)

    def __repr__(self) -> str:
        return f"<Copy {self.name}/{self.version} {self.state} of {self.weight} bytes, {self.in_flight} in flight>"
