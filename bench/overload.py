"""SUITE=overload: a crowd of connections and streams, and three times the requests that a model can answer.

The model sleeps for each request, so that its capacity is the server's threads' and not the machine's: what is measured
is what the server does with those that are too many. Answers within the queue's length are taken, the rest has to be
refused at once; every answer is checked.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from rich.console import Console

from bench.comparison import Plan
from bench.load.schedule import intended_times_ns
from bench.machine import cores
from bench.messages import infer_request
from bench.peers.paths import MODEL_INFER
from bench.processes import PeerFailed, Process
from mmcore.errors import RpcError, Status
from mmcore.pb import inference_pb2
from mmcore.transport import Channel

STREAM_INFER: Final = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECTIONS: Final = 5_000
STREAMS: Final = 10_000
STREAMS_A_CONNECTION: Final = 100
TIMES_CAPACITY: Final = 3.0
#: What the sleeping model takes, and what may wait for it.
SERVICE_S: Final = 0.004
QUEUE: Final = 32
MODEL: Final = """
import time

class Model:
    inputs = [("X", "INT32", [1])]
    outputs = [("Y", "INT32", [1])]

    def predict(self, inputs):
        time.sleep(SERVICE_S)
        return {"Y": inputs["X"] + 1}
"""
SETTINGS: Final = f"queue_limit: {QUEUE}\nexecution: thread\n"
#: More callers than the model has threads, and fewer than would be refused.
_CALLERS: Final = 24
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Overload:
    """What became of too many requests: right answers per second, and the seconds that both kinds of answer took."""

    peak_per_s: float
    offered_per_s: float
    goodput_per_s: float
    refused_per_s: float
    accepted_p99_s: float
    refused_p99_s: float
    #: Of a health check beside them.
    others_p99_s: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many at once, each of which was answered, and what one of them takes of the server's memory.

    ``settled_s``: how long another caller's request takes that comes when they have all left at once.
    """

    connections: int
    connection_bytes: float
    streams: int
    stream_bytes: float
    settled_s: float


@dataclass(slots=True)
class _Told:
    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)


def run(console: Console, plan: Plan) -> dict[str, object]:
    """Serve the model, measure both, and show them."""
    seconds = 10.0 if plan.rounds > 3 else 3.0
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        argv = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", folder, "--grpc-port", "0",
                "--preload", "all", "--log-level", "warning"]  # fmt: skip
        with Process("mmcore", argv, core=cores()[0]) as server:
            crowd = asyncio.run(crowd_of(server.target, server.pids, CONNECTIONS, STREAMS))
            console.print(f"{crowd.connections} connections of {crowd.connection_bytes / 1000:.1f} KB, "
                          f"{crowd.streams} streams of {crowd.stream_bytes / 1000:.1f} KB: all answered; "
                          f"another caller waits {crowd.settled_s:.1f} s when they leave at once")  # fmt: skip
            found = asyncio.run(overload(server.target, seconds))
    console.print(
        f"peak {found.peak_per_s:.0f}/s; offered {found.offered_per_s:.0f}/s: {found.goodput_per_s:.0f}/s answered "
        f"({found.goodput_per_s / found.peak_per_s:.0%} of peak, p99 {found.accepted_p99_s * 1e3:.0f} ms), "
        f"{found.refused_per_s:.0f}/s refused (p99 {found.refused_p99_s * 1e3:.1f} ms); "
        f"health p99 {found.others_p99_s * 1e3:.1f} ms"
    )
    return {"crowd": asdict(crowd), "overload": asdict(found)}


def write_model(folder: Path, service_s: float = SERVICE_S) -> None:
    """The model that sleeps, as ``sleeper``."""
    made = folder / "sleeper"
    made.mkdir()
    (made / "model.py").write_text(MODEL.replace("SERVICE_S", str(service_s)))
    (made / "mmcore.yaml").write_text(SETTINGS)


async def overload(target: str, seconds: float) -> Overload:
    """The most that callers get who wait for their answers, and what is got of :data:`TIMES_CAPACITY` times that.

    Raises:
        PeerFailed: an answer was wrong, or refused in another way than with RESOURCE_EXHAUSTED.
    """
    channel = Channel(target, connections=4)
    try:
        ended_at = time.monotonic() + seconds
        peak = _Told()
        await asyncio.gather(*(_ask_until(channel, peak, ended_at, number) for number in range(_CALLERS)))
        peak_per_s = len(peak.accepted_s) / seconds
        offered = peak_per_s * TIMES_CAPACITY
        told, others = _Told(), list[float]()
        began = time.monotonic()
        beside = asyncio.create_task(_health(channel, others))
        asked = []
        for number, at_ns in enumerate(intended_times_ns(offered, seconds, "poisson")):
            if (wait_s := began + at_ns / 1e9 - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            asked.append(asyncio.create_task(_ask(channel, told, number)))
        sent_s = time.monotonic() - began
        await asyncio.gather(*asked)
        took_s = time.monotonic() - began
        beside.cancel()
    finally:
        await channel.close()
    return Overload(
        peak_per_s, len(asked) / sent_s, len(told.accepted_s) / took_s, len(told.refused_s) / took_s,
        _p99(told.accepted_s), _p99(told.refused_s), _p99(others),
    )  # fmt: skip


async def crowd_of(target: str, pids: Sequence[int], connections: int, streams: int) -> Crowd:
    """Hold so many connections open, and then streams on other ones, and have each of them answered.

    Raises:
        PeerFailed: an answer was wrong.
    """
    alone = await _held(target, pids, connections, _all_healthy)
    together = await _held(target, pids, streams // STREAMS_A_CONNECTION, _many_streams)
    began = time.monotonic()
    other = Channel(target)
    await _one_health(other)
    await other.close()
    return Crowd(connections, alone / connections, streams, together / streams, time.monotonic() - began)


async def _held(
    target: str, pids: Sequence[int], count: int, use: Callable[[Sequence[Channel]], Awaitable[None]]
) -> int:
    """Bytes that the server takes more while so many connections are open and have been used."""
    before = _resident(pids)
    async with AsyncExitStack() as held:
        channels = [Channel(target) for _ in range(count)]
        for channel in channels:
            held.push_async_callback(channel.close)
        for start in range(0, count, 100):  # as many as a listener's backlog takes
            await asyncio.gather(*(channel.connect() for channel in channels[start : start + 100]))
        await use(channels)
        return _resident(pids) - before


async def _all_healthy(channels: Sequence[Channel]) -> None:
    for start in range(0, len(channels), 500):
        await asyncio.gather(*(_one_health(channel) for channel in channels[start : start + 500]))


async def _one_health(channel: Channel) -> None:
    answer = await channel.unary("/inference.GRPCInferenceService/ServerLive", b"", timeout_s=_TIMEOUT_S)
    if not inference_pb2.ServerLiveResponse.FromString(answer).live:
        raise PeerFailed("a server that answers says that it does not live")


async def _many_streams(channels: Sequence[Channel]) -> None:
    """Every stream is open before the first asks, and each asks once."""
    opened = [
        await channel.stream(STREAM_INFER, timeout_s=300) for channel in channels for _ in range(STREAMS_A_CONNECTION)
    ]
    for start in range(0, len(opened), QUEUE // 2):
        batch = range(start, min(start + QUEUE // 2, len(opened)))
        await asyncio.gather(*(opened[number].send(_request(number)) for number in batch))
        for number in batch:
            answer = inference_pb2.ModelStreamInferResponse.FromString(await anext(opened[number]))
            if answer.error_message:
                raise PeerFailed(answer.error_message)
            _check(answer.infer_response.raw_output_contents[0], number)
    for stream in opened:
        await stream.end()


async def _ask_until(channel: Channel, told: _Told, ended_at: float, number: int) -> None:
    while time.monotonic() < ended_at:
        await _ask(channel, told, number)


async def _ask(channel: Channel, told: _Told, number: int) -> None:
    began = time.monotonic()
    try:
        answer = await channel.unary(MODEL_INFER, _request(number), timeout_s=_TIMEOUT_S)
    except RpcError as error:
        if error.status != Status.RESOURCE_EXHAUSTED:
            raise PeerFailed(f"refused with {error}") from None
        told.refused_s.append(time.monotonic() - began)
        return
    _check(inference_pb2.ModelInferResponse.FromString(answer).raw_output_contents[0], number)
    told.accepted_s.append(time.monotonic() - began)


async def _health(channel: Channel, took_s: list[float]) -> None:
    while True:
        began = time.monotonic()
        await _one_health(channel)
        took_s.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


def _request(number: int) -> bytes:
    return infer_request("sleeper", "X", "INT32", np.array([number], np.int32))


def _check(raw: bytes, number: int) -> None:
    if raw != (number + 1).to_bytes(4, "little"):
        raise PeerFailed(f"{number} was answered with {raw!r}")


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0


def _resident(pids: Sequence[int]) -> int:
    return sum(int(psutil.Process(pid).memory_info().rss) for pid in pids)
