"""A serving process from its first line to its last: what it serves, the signals, and its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import Final, Protocol

from mmcore import log as logs
from mmcore.server.allocator import release_freed_memory

log = logging.getLogger(__name__)

#: For answers of the metrics port that are on their way when everything else is over.
LAST_ANSWERS_S: Final = 1.0


class Served(Protocol):
    """What a process serves."""

    async def start(self) -> None:
        """Serve; ready when it returns."""

    def ready_line(self) -> str:
        """What is printed then."""

    async def drain(self) -> None:
        """Finish what is under way and let go of everything."""


def run_until_told(make: Callable[[], Served], event_loop: str, grace_s: float) -> int:
    """Serve what ``make`` makes until SIGTERM or SIGINT, then drain it; a second signal ends at once.

    Returns the exit code, 0 when it was drained. ``event_loop`` is ``uvloop`` or ``asyncio``; ``grace_s`` is told in
    the log.
    """
    with asyncio.Runner(loop_factory=_loop_factory(event_loop)) as runner:
        return runner.run(_serve(make, grace_s))


async def _serve(make: Callable[[], Served], grace_s: float) -> int:
    served = make()
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if told.is_set():
            log.warning("ending at once")
            # Threads may be inside a model that never returns; nothing of this process is worth waiting for.
            logging.shutdown()
            os._exit(1)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    starting = loop.create_task(served.start(), name="start")
    ending = loop.create_task(told.wait(), name="wait for a signal")
    await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        try:
            starting.result()
        except BaseException:
            ending.cancel()
            await served.drain()
            raise
        release_freed_memory()
        print(served.ready_line(), flush=True)
        await ending
    else:
        starting.cancel()
        await asyncio.wait([starting])
    log.info("draining, for %g seconds at most", grace_s, extra=logs.event("draining", grace_s=grace_s))
    await served.drain()
    return 0


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
