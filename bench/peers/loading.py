"""A process that loads and unloads many models through mmcore's own router, and looks at what it takes meanwhile.

``python -m bench.peers.loading FOLDER`` prints a ready line and then answers each line with one of JSON: ``sizes``, or
``cycles N``. It runs under the allocator that ``mmcore serve`` chooses.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmcore.cache import Cache, Copy
from mmcore.model import NUMPY_DTYPES
from mmcore.routing import Router
from mmcore.server.allocator import choose_allocator, keep_freed_memory
from mmcore.storage import ModelFolder

#: Loaded first of each format, so that frameworks and what they keep for themselves are there.
FIRST = 16
#: Freed pages are given back after five seconds.
SETTLE_S = 7.0


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def holdings() -> dict[str, int]:
    """What this process holds that it could forget to give back."""
    return {
        "rss": resident_bytes(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "files": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


async def settled() -> None:
    """Everything that has been freed is given back."""
    gc.collect()
    await asyncio.sleep(SETTLE_S)


async def infer(router: Router, copy: Copy) -> None:
    """One inference of zeros, in a thread as a copy's first ones are."""
    inputs = {
        spec.name: np.zeros([max(size, 1) for size in spec.shape], NUMPY_DTYPES[spec.datatype])
        for spec in copy.model.inputs
    }
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(outputs: object, error: BaseException | None, ran: object) -> None:
        if error is not None:
            answered.set_exception(error)
        else:
            answered.set_result(None)

    if router.infer(copy, inputs, (), done) is None:
        await answered


async def hold(router: Router, names: list[str]) -> list[Copy]:
    """Load models, ask each once."""
    copies = [await waiter for waiter in [router.load(name) for name in names]]
    for copy in copies:
        await infer(router, copy)
    return copies


async def sizes(router: Router) -> dict[str, Any]:
    """By format: models, bytes the cache counts for them, and by which the process has really grown."""
    by_format: dict[str, list[str]] = {}
    for name in router.names():
        by_format.setdefault((await router.source(name)).format, []).append(name)
    for names in by_format.values():
        await hold(router, names[:FIRST])
    found = {}
    for stated, names in by_format.items():
        await settled()
        before = resident_bytes()
        copies = await hold(router, names[FIRST:])
        await settled()
        counted = sum(copy.weight for copy in copies)
        found[stated] = {"models": len(copies), "counted": counted, "grown": resident_bytes() - before}
    return found


async def cycles(router: Router, count: int) -> dict[str, Any]:
    """Load and unload so many times, two at once; what the process has after a tenth of that and at the end."""
    names = router.names()

    async def some(first: int, last: int) -> None:
        for number in range(first, last):
            copy = await router.load(names[number % len(names)])
            router.cache.unload(copy)

    async def run(first: int, last: int) -> dict[str, int]:
        middle = (first + last) // 2
        await asyncio.gather(some(first, middle), some(middle, last))
        await settled()
        assert router.cache.used_bytes == 0
        return holdings()

    began = time.monotonic()
    early = await run(0, count // 10)
    late = await run(count // 10, count)
    return {"early": early, "late": late, "seconds": time.monotonic() - began, "cycles": count}


async def main(folder: Path) -> None:
    """Answer lines until there are no more."""
    router = Router(
        capacity_bytes=2**40, folder=ModelFolder(folder), cache=Cache(capacity_bytes=2**40, residency_s=0.0)
    )
    await router.start()
    print(json.dumps({"event": "ready", "models": len(router.names())}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.split():
            case ["sizes"]:
                answer = await sizes(router)
            case ["cycles", count]:
                answer = await cycles(router, int(count))
        print(json.dumps(answer), flush=True)
    await router.close()


if __name__ == "__main__":
    choose_allocator()
    keep_freed_memory()
    asyncio.run(main(Path(sys.argv[1])))
