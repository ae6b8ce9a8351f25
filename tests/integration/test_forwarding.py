"""Requests passed on to running instances over their peer ports: what they answer, and what becomes of them when one
of two that hold the model is killed or drained under load."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmcore._ext.h2 import live_objects
from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.errors import RpcError
from mmcore.pb import inference_pb2
from mmcore.routing.forwarding import Forwarding
from mmcore.transport import Channel, ClientCall, Server, ServerCall, StreamCall
from tests.serving import IDENTITY, Instance, Serve, write_model

pytestmark = pytest.mark.slow

SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
WITHIN_S = 30.0
CALLERS = 32


def request(name: str = "identity", rows: int = 1) -> bytes:
    values = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    body = encode_infer_request(name, [("INPUT0", "FP32", values)])
    return b"".join(map(bytes, body)) if isinstance(body, list) else bytes(body)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_model(folder, "identity", IDENTITY.replace("DATATYPE", "FP32"))
    return folder


def start_holder(serve: Serve, models: Path, *flags: str) -> Instance:
    return serve(models, "--peer-port", "0", "--preload", "all", *flags)


@asynccontextmanager
async def front(*holders: Instance) -> AsyncIterator[tuple[Channel, Forwarding]]:
    """An instance that has no models and passes everything on, and a channel to it."""
    forwarding = Forwarding("front")
    for number, holder in enumerate(holders):
        forwarding.update(f"holder{number}", holder.ready["peer"])
    peers = forwarding.holders(forwarding.peers)

    def unary(call: ServerCall, body: bytes) -> None:
        forwarding.unary(call, body, "identity", peers)

    async def stream(call: StreamCall) -> None:
        assert await forwarding.stream(call, "identity", peers) is None

    server = Server()
    for name in ("ModelInfer", "ModelMetadata", "ModelReady", "ModelConfig"):
        server.add_unary(f"{SERVICE}/{name}", unary)
    server.add_stream(f"{SERVICE}/ModelStreamInfer", stream)
    channel = Channel(await server.listen_tcp("127.0.0.1", 0))
    try:
        yield channel, forwarding
    finally:
        await channel.close()
        await server.close()
        await forwarding.close()


async def outcome(channel: Channel, method: str, body: bytes, **options: Any) -> tuple[int, str, bytes]:
    try:
        return 0, "", await channel.unary(f"{SERVICE}/{method}", body, timeout_s=WITHIN_S, **options)
    except RpcError as error:
        return error.status, error.details, b""


async def test_an_instance_answers_what_is_passed_on_as_it_answers_its_own_clients(serve: Serve, models: Path) -> None:
    holder = start_holder(serve, models)
    pb = inference_pb2
    calls = [
        ("ModelInfer", request()),
        ("ModelInfer", request(rows=50_000)),
        ("ModelInfer", request("unknown")),
        ("ModelInfer", b"\xff no protobuf"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="identity").SerializeToString()),
        ("ModelReady", pb.ModelReadyRequest(name="identity").SerializeToString()),
        ("ModelConfig", pb.ModelConfigRequest(name="nothing").SerializeToString()),
    ]
    async with front(holder) as (channel, _):
        direct = Channel(holder.grpc)
        for method, body in calls:
            for options in ({}, {"encoding": "gzip"}):
                assert await outcome(channel, method, body, **options) == await outcome(direct, method, body, **options)
        assert decode_infer_response((await outcome(channel, *calls[1]))[2]).outputs[0].array().shape == (50_000, 4)
        for one in (channel, direct):
            stream = await one.stream(f"{SERVICE}/ModelStreamInfer", timeout_s=WITHIN_S)
            for rows in (1, 2, 3):
                await stream.send(request(rows=rows))
            await stream.end()
            answers = [pb.ModelStreamInferResponse.FromString(message) async for message in stream]
            assert [list(answer.infer_response.outputs[0].shape) for answer in answers] == [[1, 4], [2, 4], [3, 4]]
        await direct.close()


async def under_load(
    channel: Channel, begun: Callable[[], bool], disturb: Callable[[], object], enough: Callable[[], bool]
) -> list[ClientCall]:
    """Callers that ask without a pause while one thing happens, once they have begun; the calls that failed."""
    await channel.connect()
    failed: list[ClientCall] = []
    body = request()
    done = 0
    under_way = CALLERS
    ended = asyncio.Event()
    stopping = False

    def answered(call: ClientCall) -> None:
        nonlocal done, under_way
        done += 1
        if call.status != 0:
            failed.append(call)
        if stopping:
            under_way -= 1
            if under_way == 0:
                ended.set()
        else:
            channel.start(INFER, body, answered, timeout_s=WITHIN_S)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not condition():
                await asyncio.sleep(0.01)

    try:
        for _ in range(CALLERS):
            channel.start(INFER, body, answered, timeout_s=WITHIN_S)
        await until(begun)
        disturb()
        await until(enough)
        seen = done
        await until(lambda: done > seen + 500)
    finally:
        stopping = True
    await asyncio.wait_for(ended.wait(), WITHIN_S)
    return failed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_request_fails_when_one_of_two_holders_ends_under_load(
    serve: Serve, models: Path, number: signal.Signals
) -> None:
    holders = [start_holder(serve, models) for _ in range(2)]
    async with front(*holders) as (channel, forwarding):
        first, second = forwarding.peers.values()

        def begun() -> bool:
            return first.answered > 100 and second.answered > 100

        def ended() -> bool:
            return holders[0].process.poll() is not None and not first.usable

        failed = await under_load(channel, begun, lambda: holders[0].signal(number), ended)
        assert [(call.status, call.details) for call in failed] == []
        assert (first.in_flight, second.in_flight) == (0, 0)


async def test_a_stopped_holder_is_not_waited_for_by_requests_that_come_after(serve: Serve, models: Path) -> None:
    holders = [start_holder(serve, models) for _ in range(2)]
    async with front(*holders) as (channel, forwarding):
        stuck, healthy = forwarding.peers.values()
        for _ in range(50):
            assert (await outcome(channel, "ModelInfer", request()))[0] == 0
        holders[0].signal(signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(outcome(channel, "ModelInfer", request())) for _ in range(8)]
            _, waiting = await asyncio.wait(calls, timeout=1)
            before = healthy.answered
            for _ in range(50):
                status, _, _ = await asyncio.wait_for(outcome(channel, "ModelInfer", request()), WITHIN_S)
                assert status == 0
            assert healthy.answered >= before + 49
        finally:
            holders[0].signal(signal.SIGCONT)
        assert all(status == 0 for status, _, _ in await asyncio.gather(*waiting))
        assert (stuck.in_flight, healthy.in_flight) == (0, 0)


async def test_twenty_thousand_calls_leave_nothing_behind(serve: Serve, models: Path) -> None:
    holder = start_holder(serve, models)
    bodies = [request(), request(rows=100), request("unknown"), b"\xff no protobuf"]
    async with front(holder) as (channel, forwarding):
        peer = forwarding.peers["holder0"]

        async def ask(count: int) -> None:
            """So many calls, 64 at once: some fail, some are compressed, some are taken back or too late."""
            left = count
            finished = asyncio.Event()
            under_way = 0

            def start() -> None:
                nonlocal left, under_way
                left -= 1
                under_way += 1
                timeout_s = 0.0005 if left % 16 == 1 else WITHIN_S
                metadata = [("number", str(left)), ("k-bin", bytes(left % 100))] if left % 3 == 0 else []
                call = channel.start(INFER, bodies[left % 4], answered, timeout_s=timeout_s, metadata=metadata)
                if left % 16 == 2:
                    asyncio.get_running_loop().call_soon(call.cancel)

            def answered(call: ClientCall) -> None:
                nonlocal under_way
                under_way -= 1
                if left > 0:
                    start()
                elif under_way == 0:
                    finished.set()

            for _ in range(64):
                start()
            await asyncio.wait_for(finished.wait(), 60)

        async def idle() -> None:
            async with asyncio.timeout(WITHIN_S):
                while peer.in_flight or live_objects()["streams"]:
                    await asyncio.sleep(0.01)
                    gc.collect()

        await channel.connect()
        await ask(4_000)
        await idle()
        process = psutil.Process()
        before, objects = process.memory_info().rss, len(gc.get_objects())
        await ask(20_000)
        await idle()
        # Half a kilobyte a call would show; the frameworks that other tests have loaded here take some themselves.
        assert process.memory_info().rss - before < 10_000_000
        assert len(gc.get_objects()) - objects < 1000
        assert len(asyncio.all_tasks()) == 1
