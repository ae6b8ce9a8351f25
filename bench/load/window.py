"""One measured window: connect, warm up, read the clocks, load, read them again, wait for the calls in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Final

from bench.load.histogram import Histogram
from bench.load.http_caller import HttpCaller
from bench.load.job import Job, Outcome
from bench.load.loops import Caller, ClosedLoop, OpenLoop
from bench.load.mix import Mix
from bench.load.rounding import rounded
from bench.load.schedule import intended_times_ns
from bench.machine import busy_ns, cpu_ns
from mmcore.transport import Channel

#: How long a server may take for connecting, and for the answers still due when a window ends.
PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Clocks:
    """Wall time, and the CPU time of the server, the generator and the whole machine at one moment, in ns."""

    wall: int
    server: int
    load: int
    machine: int

    @classmethod
    def read(cls, pids: Sequence[int]) -> _Clocks:
        return cls(time.perf_counter_ns(), cpu_ns(pids), time.process_time_ns(), busy_ns())


async def measure(job: Job) -> Outcome:
    """Run one job. A wrong answer or a server that does not answer in time ends it with ``Outcome.error``."""
    try:
        async with asyncio.timeout(2 * PATIENCE_S + job.warmup_s + job.duration_s), _connected(job) as channels:
            return await (_closed(job, channels) if job.mode == "closed" else _open(job, channels))
    except TimeoutError:
        return Outcome(error=f"{job.target} did not answer in time")


@asynccontextmanager
async def _connected(job: Job) -> AsyncIterator[Sequence[Channel | HttpCaller]]:
    """One channel of one connection each, so that the calls are spread exactly."""
    if job.protocol == "http":
        callers = [await HttpCaller.connect(job.target) for _ in range(job.connections)]
        try:
            yield callers
        finally:
            for caller in callers:
                await caller.close()
        return
    channels = [Channel(job.target, connections=1) for _ in range(job.connections)]
    try:
        for channel in channels:
            await channel.connect()
        yield channels
    finally:
        for channel in channels:
            await channel.close()


def _exchanges(job: Job) -> Iterator[tuple[bytes, bytes]]:
    if job.mix:
        return Mix.read(Path(job.mix)).exchanges()
    return repeat((job.body, rounded(job.expected, job.rounded_values)))


async def _closed(job: Job, channels: Sequence[Caller]) -> Outcome:
    load = ClosedLoop(channels, job.path, _exchanges(job))
    load.start(job.streams)
    await asyncio.sleep(job.warmup_s)
    load.latencies_ns.clear()
    began = _Clocks.read(job.server_pids)
    await asyncio.sleep(job.duration_s)
    ended = _Clocks.read(job.server_pids)
    latencies = load.latencies_ns.copy()
    load.stop()
    await load.drained()
    return _outcome(latencies, began, ended, load.error)


async def _open(job: Job, channels: Sequence[Caller]) -> Outcome:
    exchanges = _exchanges(job)
    if job.warmup_s:
        warm = ClosedLoop(channels, job.path, exchanges)
        warm.start(1)
        await asyncio.sleep(job.warmup_s)
        warm.stop()
        await warm.drained()
        if warm.error:
            return Outcome(error=warm.error)
    load = OpenLoop(channels, job.path, exchanges)
    began = _Clocks.read(job.server_pids)
    load.start(intended_times_ns(job.rate_per_s, job.duration_s, job.arrivals))
    await load.drained()
    return _outcome(load.latencies_ns, began, _Clocks.read(job.server_pids), load.error)


def _outcome(latencies_ns: list[int], began: _Clocks, ended: _Clocks, error: str) -> Outcome:
    if error:
        return Outcome(error=error)
    if not latencies_ns:
        return Outcome(error="no call was answered within the window")
    histogram = Histogram()
    histogram.record(latencies_ns)
    percents = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
    wall = ended.wall - began.wall
    server = ended.server - began.server
    load = ended.load - began.load
    return Outcome(
        requests=len(latencies_ns),
        seconds=wall / 1e9,
        per_s=len(latencies_ns) * 1e9 / wall,
        latency_us={name: histogram.percentile_ns(percent) / 1e3 for name, percent in percents.items()},
        server_cpu_us=server / 1e3 / len(latencies_ns),
        server_busy=server / wall,
        load_busy=load / wall,
        others_busy=max(0, ended.machine - began.machine - server - load) / wall,
    )
