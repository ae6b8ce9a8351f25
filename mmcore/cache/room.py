"""The space of one instance: what is loaded, being loaded and being unloaded, and how room is made for one more.

Bytes of the host and of a device are counted apart and each has its limit. Space being unloaded is not free before the
model is closed. Loads that wait for room get it in the order of their priority, so that a large one is not starved by
small ones that would fit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from mmcore._ext.lru import Entry, Lru
from mmcore.cache.copies import Copy
from mmcore.cache.eviction import Eviction
from mmcore.cache.loads import Load
from mmcore.errors import Cancelled, Overloaded
from mmcore.log import event

log = logging.getLogger(__name__)


class Footprint(NamedTuple):
    """Bytes of memory, of the host and of a device."""

    host: int
    device: int = 0

    def plus(self, other: Footprint) -> Footprint:
        """Both together."""
        return Footprint(self.host + other.host, self.device + other.device)

    def minus(self, other: Footprint) -> Footprint:
        """This without the other."""
        return Footprint(self.host - other.host, self.device - other.device)

    def within(self, other: Footprint) -> bool:
        """Whether neither is more than the other's."""
        return self.host <= other.host and self.device <= other.device


NOTHING = Footprint(0)


class Room:
    """The books, and who waits for space.

    Attributes:
        capacity: what copies may take together.
        reserved: by loads, as predicted.
        leaving: being unloaded.
        evictions: copies unloaded to make room, since the instance began.
        device_loaded: device memory of the copies in the list; the host's is the list's ``total``.
    """

    def __init__(self, lru: Lru, capacity: Footprint, eviction: Eviction, unload: Callable[[Copy], None]) -> None:
        self.capacity = capacity
        self.reserved = NOTHING
        self.evictions = 0
        self.leaving = NOTHING
        self.device_loaded = 0
        self._lru = lru
        self._eviction = eviction
        self._unload = unload
        self._line: list[Load] = []
        self._changed: asyncio.Future[None] | None = None

    @property
    def used(self) -> Footprint:
        """Loaded, being loaded and being unloaded together."""
        return self._staying.plus(self.leaving)

    @property
    def _staying(self) -> Footprint:
        return Footprint(self._lru.total, self.device_loaded).plus(self.reserved)

    def check(self, name: str, size: Footprint) -> None:
        """Raise Overloaded where a model would not fit if it were alone."""
        for needed, limit, what in zip(size, self.capacity, ("bytes", "bytes of device memory"), strict=True):
            if needed > limit:
                raise Overloaded(
                    f"model '{name}' takes {needed} {what}, which is more than the capacity of {limit} bytes"
                )

    def take(self, load: Load, size: Footprint) -> bool:
        """Count ``size`` as reserved if there is room for it by now, or can be made at once.

        False too where a load that goes before it waits for room. :meth:`give_back` ends the reservation. For a load
        into free room nothing is evicted.
        """
        if any(other.rank < load.rank for other in self._line):
            return False
        if load.idle_s is None:
            self.evict(size, self._lru.get((load.name, load.version)) if load.replacing else None)
        if not self.fits(size):
            return False
        self.reserved = self.reserved.plus(size)
        return True

    def fits(self, size: Footprint) -> bool:
        """Whether that much is free now."""
        return self.used.plus(size).within(self.capacity)

    def check_free(self, load: Load, size: Footprint) -> None:
        """Raise Cancelled for a load into free room where there is not enough."""
        if load.idle_s is not None and not self.fits(size):
            raise Cancelled(f"model '{load.name}' takes {size.host} bytes, for which others would have to be evicted")

    async def reserve(self, load: Load, size: Footprint, wait_s: float) -> None:
        """Wait until :meth:`take` has taken ``size``.

        Raises:
            Overloaded: models in use hold the space for too long.
            Cancelled: it is to be loaded into free room, of which there is not enough.
            MmcoreError: the load has been given up, see :meth:`Load.check_wanted`.
        """
        self._line.append(load)
        try:
            async with asyncio.timeout(wait_s):
                while not self.take(load, size):
                    self.check_free(load, size)
                    if self._changed is None:
                        self._changed = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._changed)
                    load.check_wanted()
        except TimeoutError:
            raise Overloaded(
                f"no room for model '{load.name}': it needs {size.host} bytes, and of the capacity of "
                f"{self.capacity.host} bytes {self.used.host} are taken by models in use"
                + (f"; on the device {size.device} of {self.capacity.device}" if size.device else "")
            ) from None
        finally:
            self._line.remove(load)
            # The next in line may fit.
            self.wake()

    def give_back(self, size: Footprint) -> None:
        """The reservation has ended: what was loaded is in the list by now, or is not coming."""
        self.reserved = self.reserved.minus(size)
        self.wake()

    def leaves(self, size: Footprint) -> None:
        """So much is being unloaded from now on."""
        self.leaving = self.leaving.plus(size)

    def left(self, size: Footprint) -> None:
        """So much has been unloaded and is free."""
        self.leaving = self.leaving.minus(size)
        self.wake()

    def wake(self) -> None:
        """Something changed that a load may be waiting for."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    def evict(self, size: Footprint, spared: Entry | None = None) -> None:
        """Unload copies that nobody uses until ``size`` will be free; ``spared`` goes last."""
        while True:
            short = self._staying.plus(size).minus(self.capacity)
            if short.host <= 0 and short.device <= 0:
                return

            def helps(entry: Entry, short: Footprint = short) -> bool:
                assert isinstance(entry, Copy)
                if entry.source.settings.pinned:
                    return False
                return short.host > 0 or entry.device_bytes > 0

            victim = self._eviction.victim(lambda entry: entry is not spared and helps(entry))
            if victim is None and spared is not None and spared.linked and not spared.pins and helps(spared):
                victim = spared
            if victim is None:
                return
            assert isinstance(victim, Copy)
            self.evictions += 1
            log.info(
                "evicting model %s version %s, %d bytes", victim.name, victim.version, victim.weight,
                extra=event("evicting", model=victim.name, version=victim.version, bytes=victim.weight),
            )  # fmt: skip
            self._unload(victim)
