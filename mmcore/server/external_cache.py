"""The cache of the copies that a runtime of its own process holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from mmcore._ext.v2codec import Signature
from mmcore.adapters import External, ExternalModel
from mmcore.cache import Cache, Copy
from mmcore.config import CacheSettings

#: Loads, and unloads, that wait for a runtime at once; each has a thread that does nothing else.
RUNTIME_LOADS: Final = 16


def external_cache(external: External, capacity_bytes: int, settings: CacheSettings) -> Cache:
    """A cache that loads into ``external`` and closes there; requests are neither checked nor warmed up with here."""
    return Cache(
        capacity_bytes=capacity_bytes,
        load=external.load,
        bind=lambda model: Signature(()),
        warm=lambda source, model, signature: None,
        predict=external.predict,
        loader_threads=RUNTIME_LOADS,
        unloader_threads=RUNTIME_LOADS,
        eviction=settings.eviction,
        min_residency_s=settings.min_residency_s,
        idle_timeout_s=settings.idle_timeout_s,
    )


def tell_what_goes(cache: Cache, external: External) -> None:
    """Have the runtime's side know at once which copies are about to be unloaded, beside those who follow already."""
    cache.on_gone = partial(_gone, external, cache.on_gone)


def _gone(external: External, tell: Callable[[Copy], None], copy: Copy) -> None:
    if isinstance(copy.model, ExternalModel):
        external.given_up(copy.model)
    tell(copy)
