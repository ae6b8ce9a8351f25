"""A mesh for tests: real instances over a real etcd, on connections that a test can silence, cut and slow down."""

from __future__ import annotations

import asyncio
import itertools
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.pb import cluster_pb2
from mmcore.pb import model_mesh_pb2 as pb
from tests.cutting import CuttingProxy
from tests.etcds import Etcd, free_port
from tests.management import scale
from tests.serving import Instance, Serve

INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
WITHIN_S: Final = 30.0
MODELS: Final = 12
CALLERS: Final = 6
#: Between two requests of a caller: the machine has other things to do.
PACE_S: Final = 0.003


def name_of(number: int) -> str:
    """Models are ``model-N``; that one multiplies by N + 1, so that an answer tells which model gave it."""
    return f"model-{number}"


class Client:
    """What a program has of a mesh: a channel of gRPC's own to one or several instances, used in turn."""

    def __init__(self, *addresses: str) -> None:
        options = (
            ("grpc.lb_policy_name", "round_robin"),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        )
        self._channel = grpc.aio.insecure_channel("ipv4:" + ",".join(addresses), options=options)

    async def close(self) -> None:
        await self._channel.close()

    async def connected(self) -> None:
        """Wait until it is answered: a channel that has found nobody fails what it is asked until it tries again."""
        models = cluster_pb2.ListRequest().SerializeToString()
        call = self._channel.unary_unary("/mmcore.Cluster/ListModels")
        await call(models, timeout=WITHIN_S, wait_for_ready=True)

    async def raw(
        self, path: str, body: bytes, timeout_s: float = WITHIN_S, metadata: Sequence[tuple[str, str]] = ()
    ) -> bytes:
        answer: bytes = await self._channel.unary_unary(path)(body, timeout=timeout_s, metadata=tuple(metadata))
        return answer

    async def ask(self, model: int, number: int, *, name: str = "", timeout_s: float = WITHIN_S) -> bool:
        """Ask a model with a number; whether the answer is that model's, to that number."""
        parts = encode_infer_request(name or name_of(model), [("X", "FP32", np.full(4, number, np.float32))])
        body = b"".join(map(bytes, parts)) if isinstance(parts, list) else bytes(parts)
        answer = decode_infer_response(await self.raw(INFER, body, timeout_s))
        values = answer.outputs[0].array().tolist()
        return answer.model_name == (name or name_of(model)) and values == [number * (model + 1)] * 4

    async def manage(self, method: str, request: Any, answer: type[Any], timeout_s: float = WITHIN_S) -> Any:
        body = await self.raw(f"/mmesh.ModelMesh/{method}", request.SerializeToString(), timeout_s)
        return answer.FromString(body)

    async def register(self, name: str, info: pb.ModelInfo, **fields: Any) -> pb.ModelStatusInfo:
        request = pb.RegisterModelRequest(modelId=name, modelInfo=info, **fields)
        status: pb.ModelStatusInfo = await self.manage("registerModel", request, pb.ModelStatusInfo)
        return status

    async def unregister(self, name: str) -> None:
        request = pb.UnregisterModelRequest(modelId=name)
        await self.manage("unregisterModel", request, pb.UnregisterModelResponse)

    async def locations(self, model: int) -> set[str]:
        """The instances with a loaded copy, as this one tells."""
        request = pb.GetStatusRequest(modelId=name_of(model))
        status = await self.manage("getModelStatus", request, pb.ModelStatusInfo)
        return {one.location for one in status.modelCopyInfos if one.copyStatus == pb.ModelStatusInfo.LOADED}

    async def models(self) -> set[str]:
        """Every model that this instance knows."""
        body = await self.raw("/mmcore.Cluster/ListModels", cluster_pb2.ListRequest().SerializeToString())
        return {one.name for one in cluster_pb2.ListModelsResponse.FromString(body).models}

    async def instances(self) -> set[str]:
        """Every instance that this one knows."""
        body = await self.raw("/mmcore.Cluster/ListInstances", cluster_pb2.ListRequest().SerializeToString())
        return {one.id for one in cluster_pb2.ListInstancesResponse.FromString(body).instances}

    async def alias(self, name: str) -> str:
        """The model that a vmodel stands for; empty where there is no such vmodel."""
        request = pb.GetVModelStatusRequest(vModelId=name)
        status = await self.manage("getVModelStatus", request, pb.VModelStatusInfo)
        return str(status.activeModelId)


def wrong_clock(folder: Path) -> Path:
    """The library that gives a process a clock of its own, compiled once."""
    library = folder / "wrong_clock.so"
    if not library.exists():
        source = Path(__file__).with_name("wrong_clock.c")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


class Member:
    """One instance of a mesh, on ports that stay the same when it is started again.

    Attributes:
        client: of this instance alone.
        etcd: what it reaches etcd through.
        door: what the others reach it through.
        clock: the file that holds what its clock is off by.
        instance: the process; the last one.
    """

    def __init__(self, folder: Path, etcd: Etcd) -> None:
        self._folder = folder
        self._grpc_port, self._peer_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self._grpc_port}"
        self.client = Client(self.address)
        self.etcd = CuttingProxy(etcd.endpoint)
        self.door = CuttingProxy(f"127.0.0.1:{self._peer_port}")
        self.instance: Instance
        self.clock = folder / f"clock-{self._grpc_port}"
        self.clock.write_bytes(struct.pack("d", 0.0))

    @property
    def id(self) -> str:
        return str(self.instance.ready["instance"])

    @property
    def pid(self) -> int:
        return self.instance.process.pid

    @property
    def peer(self) -> str:
        """Where it listens for other instances itself."""
        return f"127.0.0.1:{self._peer_port}"

    def set_clock(self, off_s: float) -> None:
        """Set its time of day so many seconds ahead of this machine's, also while it runs."""
        with self.clock.open("r+b") as file:
            file.write(struct.pack("d", off_s))

    async def start(self, serve: Serve) -> None:
        if not self.door.endpoint:
            await self.etcd.start()
            await self.door.start()
        flags = (
            *("--grpc-port", self._grpc_port, "--peer-port", self._peer_port, "--advertise", self.door.endpoint),
            *("--registry", f"etcd://{self.etcd.endpoint}/faults", "--model-cache", self._folder / "pulled"),
            *("--grace", "20s"),
        )
        env = {"LD_PRELOAD": str(wrong_clock(self._folder)), "CLOCK_OFF_FILE": str(self.clock)}
        self.instance = await asyncio.to_thread(serve, None, *flags, **env)
        await self.client.connected()

    async def peer_call(self, method: str, model: int) -> None:
        """Have it load a model, or give its copy up, as other instances do."""
        async with grpc.aio.insecure_channel(self.peer) as channel:
            await channel.unary_unary(f"/mmcore.Peer/{method}")(name_of(model).encode(), timeout=WITHIN_S)

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.to_thread(self.instance.wait, WITHIN_S)

    async def close(self) -> None:
        await self.client.close()
        await self.etcd.cut()
        await self.door.cut()


class Mesh:
    """Instances with models; what was acknowledged to be registered is noted.

    Attributes:
        registered: the models that every instance must know.
    """

    def __init__(self, serve: Serve, folder: Path, etcd: Etcd, size: int) -> None:
        self.serve = serve
        self.etcd = etcd
        self.files = folder / "files"
        self.members = [Member(folder, etcd) for _ in range(size)]
        self.registered: set[str] = set()
        self._names = itertools.count()

    async def start(self) -> None:
        """Start all, register the models and have each of them loaded somewhere."""
        wrong_clock(self.files.parent)
        starts = [member.start(self.serve) for member in self.members]
        # Whatever becomes of one, all have been started, and are ended with the test.
        for outcome in await asyncio.gather(*starts, return_exceptions=True):
            if outcome is not None:
                raise outcome
        for number in range(MODELS):
            await self.register(self.members[number % len(self.members)].client, name_of(number), number)
        await asyncio.gather(*(self.members[0].client.ask(number, number) for number in range(MODELS)))
        await self.whole()

    async def register(self, client: Client, name: str = "", model: int = 0) -> str:
        """Register a model, of any name where none is given; it is noted when that was acknowledged."""
        name = name or f"extra-{next(self._names)}"
        await client.register(name, scale(self.files, model + 1))
        self.registered.add(name)
        return name

    async def whole(self) -> None:
        """Wait until every instance knows all of them, and every model, and they tell the same of its copies."""
        ids = {member.id for member in self.members}

        async def agreed() -> bool:
            # As it is now: more may be registered while they are asked.
            known = set(self.registered)
            for member in self.members:
                if await member.client.instances() != ids or not await member.client.models() >= known:
                    return False
            for number in range(MODELS):
                found = [await member.client.locations(number) for member in self.members]
                if any(one != found[0] for one in found) or not found[0]:
                    return False
            return True

        await until(agreed)

    async def place(self, model: int, *holders: Member, among: Sequence[Member] = ()) -> None:
        """Have copies of a model at these instances and no others, and wait until all know; ``among``: all that run.

        Where requests for it go on, another may load it meanwhile, and is told again to give it up.
        """
        ids = {member.id for member in holders}
        running = among or self.members

        async def placed() -> bool:
            found = [await member.client.locations(model) for member in running]
            if all(one == ids for one in found):
                return True
            for member in holders:
                await member.peer_call("Load", model)
            for member in running:
                if member not in holders:
                    await member.peer_call("Unload", model)
            return False

        await until(placed)

    async def close(self) -> None:
        for member in self.members:
            await member.close()


class Load:
    """Callers that ask without end, each request with a number of its own, which its answer must hold."""

    def __init__(self, client: Client, models: Sequence[int] = range(MODELS), callers: int = CALLERS) -> None:
        self._client = client
        self._models = models
        self._numbers = itertools.count(1)
        self._stopped = False
        self.answered = 0
        self.failures: list[str] = []
        self.wrong: list[int] = []
        #: (seconds, when it ended) of each answer.
        self.times: list[tuple[float, float]] = []
        self._tasks = [asyncio.create_task(self._call()) for _ in range(callers)]

    async def _call(self) -> None:
        while not self._stopped:
            number = next(self._numbers)
            began = time.monotonic()
            try:
                right = await self._client.ask(self._models[number % len(self._models)], number)
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{number}: {error.code().name} {error.details()}")
            else:
                self.answered += 1
                self.times.append((time.monotonic() - began, time.monotonic()))
                if not right:
                    self.wrong.append(number)
            await asyncio.sleep(PACE_S)

    async def more(self, answers: int) -> None:
        """Wait until so many more requests were answered."""
        wanted = self.answered + answers
        await until(lambda: _now(self.answered >= wanted))

    def p99_s(self, *windows: tuple[float, float]) -> float:
        """99 of a hundred of the answers in these windows (of the monotonic clock) took no longer."""
        times = sorted(took for took, at in self.times if any(begins <= at < ends for begins, ends in windows))
        return times[len(times) * 99 // 100]

    def slowest_s(self, since: float = 0.0) -> float:
        """Of the answers since then (of the monotonic clock)."""
        return max(took for took, at in self.times if at >= since)

    async def stop(self) -> None:
        """End; no answer was another's."""
        self._stopped = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), 2 * WITHIN_S)
        assert self.wrong == []


class Registrar:
    """Registers one model after the other, through one instance; what is refused is counted, and not tried again."""

    def __init__(self, mesh: Mesh, client: Client) -> None:
        self._mesh = mesh
        self._client = client
        self._stopped = False
        self.refused: list[str] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stopped:
            try:
                await self._mesh.register(self._client)
            except grpc.aio.AioRpcError as error:
                self.refused.append(error.code().name)
            await asyncio.sleep(10 * PACE_S)

    async def stop(self) -> None:
        """End; nothing was refused but for the registry's being away."""
        self._stopped = True
        await asyncio.wait_for(self._task, 2 * WITHIN_S)
        assert set(self.refused) <= {"UNAVAILABLE"}


async def until(holds: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
    """Wait until it holds; what cannot be asked does not."""
    ends_at = time.monotonic() + within_s
    while True:
        try:
            if await holds():
                return
        except grpc.aio.AioRpcError as error:
            if time.monotonic() > ends_at:
                raise AssertionError("not so in time") from error
        assert time.monotonic() < ends_at, "not so in time"
        await asyncio.sleep(0.05)


async def _now(value: bool) -> bool:
    return value
