"""Nothing is left of calls and connections, however they ended: objects, descriptors, memory."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace

import psutil
import pytest

from mmcore._ext.h2 import live_objects
from mmcore.errors import InvalidRequest
from mmcore.transport import Channel, ClientCall, Server, ServerCall
from tests.sessions import SETTINGS

EVERY_LOOP = True
pytestmark = pytest.mark.slow

CALLS = 50_000  # on each kind of loop: 100,000
CONNECTIONS = 5_000
AT_ONCE = 256
#: What the allocator may keep of a run after one that warmed it up; a leak of 100 bytes a call would be 5 MB, in each
#: of the runs. Other tests' threads, which frameworks keep in this process, allocate too at times.
SLACK_BYTES = 4_000_000
RUNS = 3


def handler(call: ServerCall, body: bytes) -> bytes | None:
    """Answers in every way there is, by the request's first byte."""
    kind = body[0]
    if kind == 0:
        raise InvalidRequest("no")
    if kind == 1:  # never: the caller's deadline or cancellation ends it
        call.on_cancel = lambda: call.metadata
        return None
    if kind == 2:
        call.set_trailers([("a", "b"), ("c-bin", b"d" * 200)])
        call.set_compression("gzip")
    return body


async def many_calls(channel: Channel, count: int) -> dict[int, int]:
    """Calls of every kind, so many at once; how many ended with each status."""
    statuses: dict[int, int] = {}
    finished = asyncio.Event()
    started = ended = 0

    def start() -> None:
        nonlocal started
        number = started
        started += 1
        kind = number % 8
        body = bytes([kind]) + bytes(number % 500)
        metadata = [("number", str(number)), ("k-bin", bytes(number % 100))] if number % 3 == 0 else []
        timeout_s = 0.002 if kind == 1 and number % 16 == 1 else 10.0
        call = channel.start("/leak.Leak/Unary", body, on_done, metadata=metadata, timeout_s=timeout_s)
        if kind == 1 and number % 16 == 9:
            asyncio.get_running_loop().call_soon(call.cancel)

    def on_done(call: ClientCall) -> None:
        nonlocal ended
        ended += 1
        statuses[call.status] = statuses.get(call.status, 0) + 1
        if started < count:
            start()
        elif ended == count:
            finished.set()

    for _ in range(AT_ONCE):
        start()
    async with asyncio.timeout(60):
        await finished.wait()
    return statuses


async def settled(before: dict[str, int]) -> None:
    """Until no session is left but those there were."""
    async with asyncio.timeout(10):
        while live_objects() != before:
            await asyncio.sleep(0.005)
            gc.collect()


async def least_growth(run: Callable[[], Awaitable[object]]) -> int:
    """The bytes that the process grows by in the best of some runs; runs end with the first that shows no leak."""
    process = psutil.Process()
    least = SLACK_BYTES
    for _ in range(RUNS):
        before = process.memory_info().rss
        await run()
        gc.collect()
        least = min(least, process.memory_info().rss - before)
        if least < SLACK_BYTES:
            break
    return least


async def test_calls_leave_nothing_behind() -> None:
    gc.collect()
    before = live_objects()
    process = psutil.Process()
    server = Server()
    server.add_unary("/leak.Leak/Unary", handler)
    channel = Channel(await server.listen_tcp("127.0.0.1", 0), connections=4)

    async def run() -> None:
        statuses = await many_calls(channel, CALLS)
        assert statuses == {0: CALLS * 3 // 4, 3: CALLS // 8, 4: CALLS // 16, 1: CALLS // 16}

    try:
        await channel.connect()
        await many_calls(channel, 5_000)
        gc.collect()
        descriptors, objects = process.num_fds(), len(gc.get_objects())
        assert await least_growth(run) < SLACK_BYTES
        assert process.num_fds() <= descriptors
        assert len(gc.get_objects()) - objects < 1000
        assert live_objects()["sessions"] == before["sessions"] + 8
    finally:
        await channel.close()
        await server.close()
    await settled(before)


async def test_connections_leave_nothing_behind() -> None:
    gc.collect()
    before = live_objects()
    process = psutil.Process()
    server = Server(settings=replace(SETTINGS, handshake_timeout_s=0.5))
    server.add_unary("/leak.Leak/Unary", handler)
    target = await server.listen_tcp("127.0.0.1", 0)
    host, _, port = target.rpartition(":")
    request = bytes.fromhex("505249202a20485454502f322e300d0a0d0a534d0d0a0d0a")

    async def answered() -> None:
        channel = Channel(target)
        assert await channel.unary("/leak.Leak/Unary", b"\x03") == b"\x03"
        await channel.close()

    async def dropped() -> None:
        channel = Channel(target)
        await channel.connect()
        channel.start("/leak.Leak/Unary", b"\x01", lambda call: None)
        await channel.close()

    async def greeted() -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        writer.transport.abort()

    async def silent() -> None:
        with socket.socket() as one:
            one.setblocking(False)
            await asyncio.get_running_loop().sock_connect(one, (host, int(port)))

    kinds: list[Callable[[], object]] = [answered, dropped, greeted, silent]

    async def many(count: int) -> None:
        for number in range(0, count, 20):
            async with asyncio.TaskGroup() as group:
                for one in range(number, number + 20):
                    group.create_task(kinds[one % 4]())  # type: ignore[arg-type]  # all are coroutine functions

    async def none_open() -> None:
        async with asyncio.timeout(10):
            while server.connections:
                await asyncio.sleep(0.005)
        gc.collect()

    async def run() -> None:
        await many(CONNECTIONS)
        await none_open()

    try:
        await many(500)
        await none_open()
        descriptors = process.num_fds()
        assert await least_growth(run) < SLACK_BYTES
        assert process.num_fds() <= descriptors
        await settled(before)
    finally:
        await server.close()
    await settled(before)
