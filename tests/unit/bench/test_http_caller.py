"""The generator's HTTP side against a listener of ours."""

from __future__ import annotations

import asyncio
from itertools import repeat

from bench.load.http_caller import HttpCaller, request
from bench.load.loops import ClosedLoop
from mmcore.server.rest import Listener, Request


async def closed_loop(listener: Listener, expected: bytes) -> ClosedLoop:
    """A loop of two callers that has ended after some requests, or with the first wrong answer."""
    target = await listener.listen_tcp("127.0.0.1", 0)
    callers = [await HttpCaller.connect(target) for _ in range(2)]
    load = ClosedLoop(callers, "", repeat((request("/echo", b"x" * 100_000, X_Y="z"), expected)))
    load.start(1)
    async with asyncio.timeout(10):
        while len(load.latencies_ns) < 20 and not load.error:
            await asyncio.sleep(0)
        load.stop()
        await load.drained()
        for caller in callers:
            await caller.close()
        await listener.drain(1)
    return load


async def test_answers_of_any_length_are_timed_and_compared() -> None:
    body = b"y" * 200_000
    load = await closed_loop(Listener(lambda one: one.send(body)), body)
    assert (load.error, len(load.latencies_ns) >= 20) == ("", True)
    wrong = await closed_loop(Listener(lambda one: one.send(body)), body[1:])
    assert wrong.error == "answer of 200000 bytes, expected 199999"


async def test_a_request_arrives_as_it_is_written() -> None:
    seen: list[Request] = []

    def handle(one: Request) -> None:
        seen.append(one)
        one.fail(503, "not now")

    load = await closed_loop(Listener(handle), b"")
    assert load.error.startswith("status 503: HTTP/1.1 503 Service Unavailable")
    assert (seen[0].target, seen[0].headers[b"x-y"], len(seen[0].body)) == ("/echo", b"z", 100_000)
