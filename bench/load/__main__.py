"""The generator's process: after a ready line, a job on each line of stdin answered by its outcome on stdout."""

from __future__ import annotations

import asyncio
import gc
import sys

import uvloop

from bench.load.job import Job, Outcome
from bench.load.window import measure
from mmcore.errors import RpcError


async def _answer(line: str) -> Outcome:
    try:
        return await measure(Job.from_json(line))
    except (OSError, RpcError) as failure:
        return Outcome(error=f"{type(failure).__name__}: {failure}")


def main() -> None:
    """Serve jobs on uvloop, with the cyclic collector off inside windows (it runs between them)."""
    gc.disable()
    print('{"event": "ready"}', flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            gc.collect()
            print(runner.run(_answer(line)).to_json(), flush=True)


if __name__ == "__main__":
    main()
