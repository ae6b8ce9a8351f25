"""How the interpreter's time is shared between the loop, which answers, and the threads that load models.

Its lock is handed over when the thread that holds it has had it for some time while another waits, by default 5 ms: so
long a request would wait behind each stretch of Python in a load. And a full collection of cyclic garbage goes through
all objects there are, in whatever thread: 60 ms with 1,500 models, 400 ms with 8,000, in which nothing is answered.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Final

from mmcore.cache import Cache
from mmcore.server.time_slices import take_short_slices

#: A request's own Python takes some microseconds; handing over costs about ten, but only who waits has it handed over:
#: three threads of nothing but Python get the same done in a second of CPU as with turns of 0.5 ms.
TURN_S: Final = 0.0001
#: Full collections after which one goes through everything again, whatever has been unloaded.
_SPARING: Final = 64
#: With this share of the models unloaded, what they have left behind is worth it as well.
_UNLOADED_SHARE: Final = 1 / 16


def take_short_turns() -> None:
    """Let threads hand the interpreter over soon, and the core that they share; before there is more than this one."""
    sys.setswitchinterval(TURN_S)
    take_short_slices()


class Collections:
    """Lets full collections pass over what has survived one, so that they take as long as what is new is large.

    Garbage in cycles that was alive then is found by the collections that pass over nothing: when a share of the models
    in ``cache`` has been unloaded since, and after so many in any case.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._unloaded = 0
        self._spared = 0

    def start(self) -> None:
        """Begin."""
        gc.callbacks.append(self._collects)

    def stop(self) -> None:
        """End; the next full collection goes through everything."""
        if self._collects in gc.callbacks:
            gc.callbacks.remove(self._collects)
            gc.unfreeze()

    def _collects(self, phase: str, info: dict[str, Any]) -> None:
        """Python's callback, in any thread, before and after each collection."""
        if info["generation"] < 2:
            return
        if phase == "stop":
            gc.freeze()
            return
        loaded = len(self._cache.lru)
        unloaded = sum(self._cache.counted.sizes.counts) - loaded
        self._spared += 1
        if unloaded - self._unloaded > loaded * _UNLOADED_SHARE or self._spared > _SPARING:
            self._unloaded = unloaded
            self._spared = 0
            gc.unfreeze()
