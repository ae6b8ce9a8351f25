"""One instance of SUITE=registry: joins a registry, listens to its models, and does what a line on its input says.

``python -m bench.registry_instance URL INSTANCE``. Its ready line tells how long the join took and what memory it took.
``write COUNT EVERY_S`` changes a model so many times; each change carries its number and the machine's monotonic time.
``heard`` answers how long each change took to get here, by number; ``cpu`` the CPU seconds used so far.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import uvloop

from mmcore.registry import InstanceRecord, ModelRecord, open_registry

#: The model that is changed.
CHANGED: Final = "changed"


async def main() -> None:
    """Join, and answer lines until the input ends."""
    url, instance = sys.argv[1:]
    registry = open_registry(url, instance)
    before = resident_bytes()
    began = time.perf_counter()
    await registry.start()
    join_s = time.perf_counter() - began
    await registry.publish(InstanceRecord(address=instance))
    gc.collect()
    grown = resident_bytes() - before
    heard: dict[int, int] = {}

    def listen(name: str) -> None:
        now = time.monotonic_ns()
        record = registry.models.get(name)
        if name == CHANGED and record is not None:
            heard[record.references] = now - record.last_used_ms

    registry.models.listen(listen)
    say(event="ready", join_s=join_s, bytes=grown, models=len(registry.models))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        match line.split():
            case ["write", count, every_s]:
                for _ in range(int(count)):
                    await asyncio.sleep(float(every_s))
                    await registry.models.update(CHANGED, stamped)
                say(written=int(count))
            case ["heard"]:
                say(heard_ns=heard)
            case ["cpu"]:
                say(cpu_s=time.process_time())
    await registry.close()


def stamped(record: ModelRecord | None) -> ModelRecord:
    """The next change: its time is in nanoseconds of the clock that all processes of a machine share."""
    before = record or ModelRecord("bench")
    return replace(before, references=before.references + 1, last_used_ms=time.monotonic_ns())


def resident_bytes() -> int:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def say(**fields: object) -> None:
    """One line of JSON."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
