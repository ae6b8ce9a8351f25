"""Instances that share a registry answer as one: whichever is asked, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.errors import RpcError
from mmcore.pb import model_mesh_pb2 as pb
from mmcore.transport import Channel
from tests.serving import IDENTITY, Instance, Serve, write_model

pytestmark = pytest.mark.slow

INFER = "/inference.GRPCInferenceService/ModelInfer"
MODELS = 12
CALLERS = 8
WITHIN_S = 60.0
LOCAL = json.dumps({"storage_params": {"type": "local"}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models that are not in an instance's folder: they are registered by their paths."""
    made = tmp_path / "files"
    made.mkdir()
    for number in range(MODELS):
        write_model(made, name_of(number), IDENTITY.replace("DATATYPE", "FP32"))
    return made


def name_of(number: int) -> str:
    return f"model-{number}"


def question(number: int) -> bytes:
    values = np.full((1, 4), number, np.float32)
    body = encode_infer_request(name_of(number), [("INPUT0", "FP32", values)])
    return b"".join(map(bytes, body)) if isinstance(body, list) else bytes(body)


async def ask(channel: Channel, number: int, timeout_s: float = WITHIN_S) -> None:
    answer = decode_infer_response(await channel.unary(INFER, question(number), timeout_s=timeout_s))
    assert answer.model_name == name_of(number)
    assert answer.outputs[0].array().tolist() == [[number] * 4]


async def manage(channel: Channel, method: str, request: Any, answer: type[Any]) -> Any:
    body = await channel.unary(f"/mmesh.ModelMesh/{method}", request.SerializeToString(), timeout_s=WITHIN_S)
    return answer.FromString(body)


async def register(channel: Channel, folder: Path, number: int) -> None:
    info = pb.ModelInfo(type="python", path=str(folder / name_of(number)), key=LOCAL)
    request = pb.RegisterModelRequest(modelId=name_of(number), modelInfo=info)
    await manage(channel, "registerModel", request, pb.ModelStatusInfo)


async def locations(channel: Channel, number: int) -> set[str]:
    """The instances that have a loaded copy, as an instance tells."""
    request = pb.GetStatusRequest(modelId=name_of(number))
    status = await manage(channel, "getModelStatus", request, pb.ModelStatusInfo)
    loaded = pb.ModelStatusInfo.ModelStatus.Value("LOADED")
    return {copy.location for copy in status.modelCopyInfos if copy.copyStatus == loaded}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    ends_at = time.monotonic() + WITHIN_S
    while not await holds():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)


class Load:
    """Callers that ask every model in turn through some channels, until told to stop, at the end of the block at last.

    One whose channel has been closed fails without a pause: left behind by a test that failed, it would not let the
    loop do anything else.
    """

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels
        self._stopped = False
        self.answered = 0
        self.failures: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(CALLERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _call(self, number: int) -> None:
        model = number
        while not self._stopped:
            try:
                await ask(self._channels[number % len(self._channels)], model % MODELS)
                self.answered += 1
            except RpcError as error:
                self.failures.append(str(error))
            model += 1

    async def more(self, answers: int) -> None:
        """Wait until so many more requests were answered."""
        wanted = self.answered + answers

        async def answered() -> bool:
            return self.answered >= wanted

        await until(answered)

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)


class Members:
    """Three instances, a channel to each, and every model registered and loaded."""

    def __init__(self, instances: list[Instance]) -> None:
        self.instances = instances
        self.channels = [Channel(instance.grpc) for instance in instances]
        self.names = [str(instance.ready["instance"]) for instance in instances]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


@pytest.fixture
async def members(serve: Serve, tmp_path: Path, folder: Path) -> Any:
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    flags = ("--peer-port", "0", "--registry", registry, "--model-cache", tmp_path / "pulled", "--grace", "20s")
    found = Members([serve(None, *flags) for _ in range(3)])
    for number in range(MODELS):
        await register(found.channels[number % 3], folder, number)
    await asyncio.gather(*(ask(found.channels[0], number) for number in range(MODELS)))

    async def told() -> bool:
        return all([await locations(found.channels[0], number) for number in range(MODELS)])

    await until(told)
    yield found
    await found.close()


async def test_any_instance_answers_for_every_model_and_all_tell_the_same_of_them(members: Members) -> None:
    for channel in members.channels:
        await asyncio.gather(*(ask(channel, number) for number in range(MODELS)))
    held: dict[str, int] = dict.fromkeys(members.names, 0)
    for number in range(MODELS):

        async def settled(number: int = number) -> bool:
            found = [await locations(channel, number) for channel in members.channels]
            return bool(found[0]) and found[0] == found[1] == found[2]

        await until(settled)
        for location in await locations(members.channels[0], number):
            held[location] += 1
    # Copies are spread, and no model was loaded everywhere for the asking.
    assert min(held.values()) > 0
    assert sum(held.values()) < 2 * MODELS


async def test_a_model_that_is_unregistered_at_one_instance_is_gone_at_all(members: Members) -> None:
    request = pb.UnregisterModelRequest(modelId=name_of(0))
    await manage(members.channels[0], "unregisterModel", request, pb.UnregisterModelResponse)
    for channel in members.channels:

        async def gone(channel: Channel = channel) -> bool:
            try:
                await ask(channel, 0)
            except RpcError as error:
                assert error.status.name == "NOT_FOUND"
                return True
            return False

        await until(gone)


async def test_requests_go_on_when_an_instance_is_killed(members: Members) -> None:
    async with Load(members.channels[:2]) as load:
        await load.more(200)
        members.instances[2].process.kill()
        await load.more(500)
        await load.stop()
    # What it was at may be lost; nothing after that.
    assert len(load.failures) <= CALLERS, load.failures


async def test_no_request_fails_while_an_instance_leaves_and_its_models_go_before_it(members: Members) -> None:
    held = {number: await locations(members.channels[0], number) for number in range(MODELS)}
    leaving = next(iter(held[0]))
    at = members.names.index(leaving)
    async with Load([channel for other, channel in enumerate(members.channels) if other != at]) as load:
        await load.more(200)
        members.instances[at].signal(signal.SIGTERM)
        assert await asyncio.to_thread(members.instances[at].wait, WITHIN_S) == 0
        for number in range(MODELS):
            if leaving in held[number]:
                assert await locations(members.channels[at - 1], number) - {leaving}
        await load.more(200)
        await load.stop()
    assert load.failures == []


async def test_workers_share_a_port_and_one_that_is_killed_is_replaced(
    serve: Serve, tmp_path: Path, folder: Path
) -> None:
    flags = ("--workers", "2", "--model-cache", tmp_path / "pulled")
    parent = serve(None, *flags)
    assert len(parent.ready["workers"]) == 2
    channels = [Channel(parent.grpc) for _ in range(8)]
    for number in range(MODELS):
        await register(channels[0], folder, number)
    for channel in channels:
        await asyncio.gather(*(ask(channel, number) for number in range(MODELS)))
    workers = psutil.Process(parent.process.pid).children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)

    async def replaced() -> bool:
        now = psutil.Process(parent.process.pid).children()
        return len(now) == 2 and workers[0] not in now

    await until(replaced)

    async def answered() -> bool:
        try:
            await asyncio.gather(*(ask(channels[0], number) for number in range(MODELS)))
        except RpcError:  # its connection was to the one that is gone
            return False
        return True

    await until(answered)
    for channel in channels:
        await channel.close()
    parent.signal(signal.SIGTERM)
    assert await asyncio.to_thread(parent.wait, WITHIN_S) == 0


async def test_workers_end_with_their_parent(serve: Serve) -> None:
    parent = serve(None, "--workers", "2")
    workers = psutil.Process(parent.process.pid).children()
    parent.process.kill()
    gone, alive = await asyncio.to_thread(psutil.wait_procs, workers, WITHIN_S)
    assert len(gone) == 2
    assert alive == []
