"""Mixed traffic, churn and faults for a long time: ``python -m bench.soak [--seconds 3600]``.

Callers over gRPC, its streams and REST ask models that are plain and isolated; others load and unload models, open and
cut connections in the middle of a request, cancel, send what is no request, and kill workers. Every answer is checked,
and one that is refused must be refused for a reason that there is. At the end the server's memory, descriptors and
threads are compared with those after the first tenth of the time. Exits with 1 where an answer was wrong, a caller
starved, or they grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from bench.machine import cores
from bench.messages import infer_request
from bench.overload import STREAM_INFER
from bench.peers.paths import MODEL_INFER
from bench.processes import PeerFailed, Process
from mmcore.errors import RpcError, Status
from mmcore.pb import inference_pb2
from mmcore.transport import Channel

PLAIN: Final = ("plain-0", "plain-1", "plain-2")
ISOLATED: Final = "isolated"
CHURNED: Final = ("churned-0", "churned-1")
#: Adds its own number, so that an answer with another model's data shows.
MODEL: Final = """
class Model:
    inputs = [("X", "INT32", [-1])]
    outputs = [("Y", "INT32", [-1])]

    def predict(self, inputs):
        return {"Y": inputs["X"] + NUMBER}
"""
#: A killed worker's request, and models that are being unloaded.
EXPECTED: Final = frozenset({Status.UNAVAILABLE, Status.FAILED_PRECONDITION, Status.NOT_FOUND, Status.CANCELLED})
#: Growth between the two looks that is no leak: memory by a share and a floor, descriptors and threads by number.
MORE_MEMORY: Final = 0.05
MEMORY_FLOOR: Final = 30e6
MORE_DESCRIPTORS: Final = 8
MORE_THREADS: Final = 3
_PAUSE_S: Final = 0.01
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Taken:
    """What the server and its workers take; descriptors and threads are the server's own."""

    resident_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a run gave: answers by caller, refusals by status, and what was taken at the start and at the end."""

    seconds: float
    answers: dict[str, int]
    refused: dict[str, int]
    before: Taken
    after: Taken

    @property
    def grown(self) -> list[str]:
        """What is not flat, in words."""
        found = []
        if self.after.resident_bytes > self.before.resident_bytes * (1 + MORE_MEMORY) + MEMORY_FLOOR:
            found.append("memory")
        if self.after.descriptors > self.before.descriptors + MORE_DESCRIPTORS:
            found.append("descriptors")
        if self.after.threads > self.before.threads + MORE_THREADS:
            found.append("threads")
        return found


def main() -> int:
    """Run it and print what it gave as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    options = parser.parse_args()
    try:
        found = soak(options.seconds)
    except PeerFailed as failure:
        print(f"failed: {failure}")
        return 1
    print(json.dumps(asdict(found), indent=2))
    if found.grown:
        print(f"grown: {', '.join(found.grown)}")
    return 1 if found.grown else 0


def soak(seconds: float) -> Soaked:
    """A run of so many seconds.

    Raises:
        PeerFailed: an answer was wrong, or refused without a reason, or somebody was not answered at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate((*PLAIN, ISOLATED, *CHURNED)):
            made = Path(folder) / name
            made.mkdir()
            (made / "model.py").write_text(MODEL.replace("NUMBER", str(number)))
            if name == ISOLATED:
                (made / "mmcore.yaml").write_text("isolation: process\n")
        argv = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", folder, "--grpc-port", "0",
                "--preload", "all", "--log-level", "error"]  # fmt: skip
        with Process("mmcore", argv, core=cores()[0]) as server:
            return asyncio.run(_Soak(server, seconds).run())


class _Soak:
    """The callers of one run."""

    def __init__(self, server: Process, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._until = 0.0
        self._chance = random.Random(5)  # traffic, no secret
        self._answers: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._channel = Channel(server.target, connections=2)

    async def run(self) -> Soaked:
        """All callers until the time is over."""
        callers: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self._unary,) * 4, *(self._isolated,) * 2, self._stream, self._rest, self._churn, self._connections,
            self._cancels, self._nonsense, self._kills,
        )  # fmt: skip
        began = time.monotonic()
        self._until = began + self._seconds / 10
        try:
            await self._all(callers)
            before = self._taken()
            self._until = began + self._seconds
            await self._all(callers)
            after = self._taken()
        finally:
            await self._channel.close()
        names = {caller.__name__.strip("_") for caller in callers}
        if idle := names - self._answers.keys():
            raise PeerFailed(f"nothing was answered to: {', '.join(sorted(idle))}")
        return Soaked(time.monotonic() - began, dict(self._answers), dict(self._refused), before, after)

    async def _all(self, callers: tuple[Callable[[], Awaitable[None]], ...]) -> None:
        try:
            async with asyncio.TaskGroup() as running:
                for caller in callers:
                    running.create_task(self._again(caller))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _again(self, caller: Callable[[], Awaitable[None]]) -> None:
        name = getattr(caller, "__name__", "").strip("_")
        while time.monotonic() < self._until:
            try:
                await caller()
                self._answers[name] += 1
            except RpcError as error:
                if error.status not in EXPECTED:
                    raise PeerFailed(f"{name}: {error}") from error
                self._refused[f"{name}: {Status(error.status).name}"] += 1
            await asyncio.sleep(_PAUSE_S)

    def _taken(self) -> Taken:
        server = psutil.Process(self._server.pids[0])
        resident = sum(psutil.Process(pid).memory_info().rss for pid in self._server.pids)
        return Taken(resident, server.num_fds(), server.num_threads())

    def _question(self, name: str) -> tuple[bytes, bytes]:
        """A request and the one right answer's contents."""
        values = np.array(self._chance.choices(range(10**6), k=self._chance.choice((1, 16, 5_000))), np.int32)
        number = (*PLAIN, ISOLATED, *CHURNED).index(name)
        return infer_request(name, "X", "INT32", values), (values + np.int32(number)).tobytes()

    async def _ask(self, name: str) -> None:
        request, expected = self._question(name)
        answer = await self._channel.unary(MODEL_INFER, request, timeout_s=_TIMEOUT_S)
        _check(name, inference_pb2.ModelInferResponse.FromString(answer), expected)

    async def _unary(self) -> None:
        await self._ask(self._chance.choice(PLAIN))

    async def _isolated(self) -> None:
        await self._ask(ISOLATED)

    async def _stream(self) -> None:
        stream = await self._channel.stream(STREAM_INFER, timeout_s=_TIMEOUT_S)
        for name in self._chance.choices((*PLAIN, ISOLATED), k=5):
            request, expected = self._question(name)
            await stream.send(request)
            answer = inference_pb2.ModelStreamInferResponse.FromString(await anext(stream))
            if answer.error_message:
                if name != ISOLATED:
                    raise PeerFailed(f"stream, {name}: {answer.error_message}")
                self._refused["stream: in its answers"] += 1
            else:
                _check(name, answer.infer_response, expected)
        await stream.end()
        async for _ in stream:
            raise PeerFailed("a stream has more answers than questions")

    async def _rest(self) -> None:
        name = self._chance.choice(PLAIN)
        values = self._chance.choices(range(10**6), k=20)
        document = {"inputs": [{"name": "X", "datatype": "INT32", "shape": [20], "data": values}]}
        answer = await self._http(f"POST /v2/models/{name}/infer", json.dumps(document).encode())
        if json.loads(answer)["outputs"][0]["data"] != [value + PLAIN.index(name) for value in values]:
            raise PeerFailed(f"REST, {name}: {answer[:300]!r}")

    async def _churn(self) -> None:
        name = self._chance.choice(CHURNED)
        for method in ("Unload", "Load"):
            await self._channel.unary(
                f"/inference.GRPCInferenceService/RepositoryModel{method}",
                inference_pb2.RepositoryModelLoadRequest(model_name=name).SerializeToString(),
                timeout_s=_TIMEOUT_S,
            )
        await self._ask(name)

    async def _connections(self) -> None:
        """One that is used and closed, one that is cut in the middle of a request."""
        channel = Channel(self._server.target)
        name = self._chance.choice(PLAIN)
        request, expected = self._question(name)
        answer = await channel.unary(MODEL_INFER, request, timeout_s=_TIMEOUT_S)
        _check(name, inference_pb2.ModelInferResponse.FromString(answer), expected)
        cut = asyncio.ensure_future(channel.unary(MODEL_INFER, request, timeout_s=_TIMEOUT_S))
        await asyncio.sleep(0)
        await channel.close()
        await asyncio.wait([cut])
        cut.exception()

    async def _cancels(self) -> None:
        request, _ = self._question(self._chance.choice((*PLAIN, ISOLATED)))
        asked = asyncio.ensure_future(self._channel.unary(MODEL_INFER, request, timeout_s=_TIMEOUT_S))
        await asyncio.sleep(self._chance.random() * 0.003)
        asked.cancel()
        await asyncio.wait([asked])
        if not asked.cancelled():
            asked.exception()

    async def _nonsense(self) -> None:
        """What is no request, no method, no HTTP/2."""
        for path, body, status in (
            (MODEL_INFER, b"\xff\xff\xff", Status.INVALID_ARGUMENT),
            ("/no.Service/Method", b"", Status.UNIMPLEMENTED),
            (MODEL_INFER, infer_request("no-such-model", "X", "INT32", np.zeros(1, np.int32)), Status.NOT_FOUND),
        ):
            try:
                await self._channel.unary(path, body, timeout_s=_TIMEOUT_S)
            except RpcError as error:
                if error.status != status:
                    raise PeerFailed(f"{path}: {error}") from error
            else:
                raise PeerFailed(f"{path} was answered")
        host, _, port = self._server.target.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(self._chance.randbytes(100))
        await asyncio.wait_for(reader.read(), _TIMEOUT_S)
        writer.close()

    async def _kills(self) -> None:
        """A worker ends, as for want of memory; the model has another one soon.

        After five in a minute the model would be given up, as it should be.
        """
        await asyncio.sleep(min(16.0, self._seconds / 4))
        for child in psutil.Process(self._server.pids[0]).children():
            os.kill(child.pid, signal.SIGKILL)
        within = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return await self._ask(ISOLATED)
            except RpcError as error:
                if time.monotonic() > within:
                    raise PeerFailed(f"a killed worker was not replaced: {error}") from error
                await asyncio.sleep(0.05)

    async def _http(self, what: str, body: bytes) -> bytes:
        host, _, port = self._server.rest.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"{what} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(), _TIMEOUT_S)
        writer.close()
        head_of, _, rest = answer.partition(b"\r\n\r\n")
        if not head_of.startswith(b"HTTP/1.1 200"):
            raise PeerFailed(f"{what}: {answer[:300]!r}")
        return rest


def _check(name: str, answer: inference_pb2.ModelInferResponse, expected: bytes) -> None:
    if answer.model_name != name or list(answer.raw_output_contents) != [expected]:
        raise PeerFailed(f"{name}: a wrong answer, of {answer.model_name}")


if __name__ == "__main__":
    sys.exit(main())
