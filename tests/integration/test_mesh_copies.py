"""A model with a copy at each instance: new ones get theirs, and requests are spread unless the client does that."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmcore.pb import model_mesh_pb2 as pb
from mmcore.transport import Channel
from tests.integration.test_mesh import INFER, WITHIN_S, locations, manage, name_of, question, until
from tests.serving import IDENTITY, Serve, write_model
from tests.toy_processes import Front, Runtime

pytestmark = pytest.mark.slow

#: Slow enough to go to a thread; one at a time, so that requests wait for each other.
SLOW = IDENTITY.replace("DATATYPE", "FP32").replace(
    "        return", "        import time\n\n        time.sleep(0.02)\n        return"
)
REQUESTS = 80
CALLERS = 16
LOADED = pb.ModelStatusInfo.ModelStatus.Value("LOADED")
EVERYWHERE = {"storage_params": {"type": "local"}, "copies": {"everywhere": True}}


async def register(channel: Channel, folder: Path, key: dict[str, object]) -> pb.ModelStatusInfo:
    info = pb.ModelInfo(type="python", path=str(folder / name_of(0)), key=json.dumps(key))
    request = pb.RegisterModelRequest(modelId=name_of(0), modelInfo=info)
    status: pb.ModelStatusInfo = await manage(channel, "registerModel", request, pb.ModelStatusInfo)
    return status


async def answered(channel: Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
    """So many requests at once through one instance."""
    await channel.connect()
    done: list[tuple[int, str]] = []
    for _ in range(REQUESTS):
        channel.start(INFER, question(0), lambda call: done.append((call.status, call.details)), metadata=metadata)

    async def all_done() -> bool:
        return len(done) == REQUESTS

    await until(all_done)
    assert set(done) == {(0, "")}


async def served(channel: Channel) -> int:
    """How many inferences of the model an instance has made."""
    from mmcore.pb import inference_pb2

    request = inference_pb2.ModelStatisticsRequest(name=name_of(0))
    path = "/inference.GRPCInferenceService/ModelStatistics"
    body = await channel.unary(path, request.SerializeToString(), timeout_s=10)
    return sum(one.inference_count for one in inference_pb2.ModelStatisticsResponse.FromString(body).model_stats)


async def test_a_model_everywhere_is_loaded_at_each_instance_and_takes_requests_at_all(
    serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_model(folder, name_of(0), SLOW, settings="instances: 1\n")
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    flags = ("--peer-port", "0", "--registry", registry, "--model-cache", tmp_path / "pulled")
    instances = [await asyncio.to_thread(serve, None, *flags)]
    channels = [Channel(instances[0].grpc)]
    # Nobody asks for it.
    await register(channels[0], folder, EVERYWHERE)
    instances.append(await asyncio.to_thread(serve, None, *flags))
    channels.append(Channel(instances[1].grpc))
    names = {str(instance.ready["instance"]) for instance in instances}

    async def everywhere() -> bool:
        return await locations(channels[0], 0) == await locations(channels[1], 0) == names

    await until(everywhere)
    # A client that spreads its requests is answered where it asks, any other one where there is less to do.
    await answered(channels[0], (("mm-balanced", "true"),))
    assert [await served(channel) for channel in channels] == [REQUESTS, 0]
    await answered(channels[0])
    first, second = [await served(channel) for channel in channels]
    assert first + second == 2 * REQUESTS
    assert REQUESTS / 5 < second < REQUESTS
    # Other copies are no other model.
    status = await register(channels[1], folder, {**EVERYWHERE, "copies": {"min": 1}})
    assert status.status == pb.ModelStatusInfo.ModelStatus.LOADED
    for channel in channels:
        await channel.close()


def inferences(runtime: Runtime) -> list[str]:
    return [line for line in runtime.journal if line.startswith("infer m")]


def test_requests_for_runtimes_are_spread_too(serve: Serve, tmp_path: Path) -> None:
    runtimes = [Runtime(f"unix:{tmp_path}/toy{number}.sock") for number in range(2)]
    fronts: list[Front] = []
    shared = ("--registry", f"sqlite:{tmp_path}/registry.db", "--peer-port", "0")
    try:
        for runtime in runtimes:
            runtime.start()
            fronts.append(Front(serve(None, "--runtime", runtime.address, *shared), tmp_path))
        fronts[0].register("m", "m-sleepy.onnx", key=json.dumps({"copies": {"everywhere": True}}))
        ends_at = time.monotonic() + WITHIN_S
        while len([copy for copy in fronts[0].client.status("m").modelCopyInfos if copy.copyStatus == LOADED]) < 2:
            assert time.monotonic() < ends_at

        def asked(**metadata: str) -> list[int]:
            """How many of so many requests at once each runtime was asked."""
            before = [len(inferences(runtime)) for runtime in runtimes]
            with ThreadPoolExecutor(CALLERS) as pool:
                calls = [pool.submit(fronts[0].infer, "m", **metadata) for _ in range(REQUESTS)]
            assert all(call.result().model_name == "m" for call in calls)
            return [len(inferences(runtime)) - more for runtime, more in zip(runtimes, before, strict=True)]

        assert asked(mm_balanced="true") == [REQUESTS, 0]
        here, there = asked()
        assert here + there == REQUESTS
        assert there >= REQUESTS // 8
    finally:
        for front in fronts:
            front.close()
        for runtime in runtimes:
            runtime.kill()
