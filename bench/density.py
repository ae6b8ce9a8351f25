"""SUITE=density: very many small models, registered from S3, resident in one instance, asked by popularity.

Every model of the zoo is registered over the management API, loaded by its first request and compared with what its
framework answers. Then they are asked in an order drawn by Zipf's law, by 64 callers and at a fixed rate; and at last a
set of hot ones is asked while two hundred others a minute are loaded for the first time. The published density test of
ModelMesh, with the model it used, is the case ``simple-string``; ``registered`` starts an instance with a million
models, of which none is loaded.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import boto3
import numpy as np
import psutil
from botocore.config import Config
from numpy.typing import NDArray
from rich.console import Console

from bench.builds import FOLDER, NotMeasured
from bench.comparison import Plan
from bench.load.job import Job, Outcome
from bench.load.mix import Mix, zipf_order
from bench.machine import cores
from bench.messages import infer_request
from bench.model_zoo import Zoo
from bench.peers.cold_caller import PACE_S
from bench.peers.paths import MODEL_INFER
from bench.peers.rclone_s3 import KEY, SECRET
from bench.processes import Generator, PeerFailed, Process
from bench.registry import register
from mmcore.pb import cluster_pb2, inference_pb2, model_mesh_pb2
from mmcore.registry.sqlite import SqliteStore
from mmcore.transport import Channel

MODELS: Final = 20_000
QUICK_MODELS: Final = 500
STRINGS: Final = 2_000
QUICK_STRINGS: Final = 50
REGISTERED: Final = 1_000_000
QUICK_REGISTERED: Final = 20_000
#: Registered over the API beside those.
MORE: Final = 5_000
START_WITHIN_S: Final = 120.0
STRING_MODEL: Final = Path("tests/data/simple_string")
#: What shares the generator's core lets it have that at once: the S3 server lists 20,000 models in turns of 4 ms.
YIELDING: Final = ("chrt", "--idle", "0")
#: Models that are registered beside and loaded only while the hot ones are asked.
COLD: Final = 120
HOT: Final = 200
COLD_PER_MINUTE: Final = 60 / PACE_S
HOT_RATE_PER_S: Final = 2_000.0
RATE_PER_S: Final = 20_000.0
CAPACITY: Final = "16GiB"
BUCKET: Final = "models"
CONNECTIONS: Final = 4
STREAMS: Final = 16
CALLS: Final = 400_000
SEED: Final = 1
AT_ONCE: Final = 16
AT_ONCE_MADE: Final = 256
#: Where files lie while it runs, and what they take there at most.
MEMORY: Final = Path("/dev/shm")
SCRATCH_BYTES: Final = 2 * 2**30
_STAGE: Final = re.compile(r"(queue|find|room|open|publish) (\d+\.\d+)")
#: struct's code of a float, by V2 datatype: the last values of answers may round otherwise among others.
_CODES: Final = {"FP32": "f", "FP64": "d"}


@dataclass(frozen=True, slots=True)
class Served:
    """A model to be registered: its type, a request, and a look at the answer's numbers."""

    name: str
    type: str
    request: bytes
    right: Callable[[inference_pb2.ModelInferResponse], bool]


def run(console: Console, plan: Plan) -> dict[str, dict[str, float]]:
    """The zoo's models, the published test's, and very many that are registered alone."""
    thorough = plan.duration_s >= 1
    found: dict[str, dict[str, float]] = {}
    if plan.wants_case("zoo"):
        found["summary"] = _zoo(console, plan, MODELS if thorough else QUICK_MODELS)
    if plan.wants_case("simple-string"):
        found["simple_string"] = _strings(console, plan, STRINGS if thorough else QUICK_STRINGS)
    if plan.wants_case("registered"):
        found["registered"] = _registered(console, REGISTERED if thorough else QUICK_REGISTERED)
        _tell(console, "registered", found["registered"])
    return found


def _registered(console: Console, count: int) -> dict[str, float]:
    """What an instance takes beyond an empty one's memory that starts with so many models, of which it loads none.

    They are in its registry before: over the API it would take minutes, whose rate is measured with some more of them.
    """
    with _running(console) as running:
        empty = running.rss()
    console.print(f"writing {count} models into a registry")
    with _running(console, prepared=lambda database: register(SqliteStore(database), count)) as running:
        started = running.rss()
        per_s = running.register(MORE)
        # By now the allocator has given back what starting took for a while.
        return {
            "registered": count + MORE,
            "start_s": running.start_s,
            "start_cpu_s": running.start_cpu_s,
            "registrations_per_s": per_s,
            "bytes_per_registered_model": (running.rss() - empty) / (count + MORE),
            "bytes_per_registered_model_at_start": (started - empty) / count,
        }


def _zoo(console: Console, plan: Plan, count: int) -> dict[str, float]:
    with _running(console) as running:
        console.print(f"making {count + COLD} models, storing their files and asking their frameworks")
        models = _make_zoo(running.endpoint, count + COLD)
        resident, cold = models[:count], models[count:]
        summary = running.fill(resident)
        mix = running.mix(resident)
        summary |= running.ask(mix, plan)
        summary |= running.disturb(resident, cold, plan)
    _tell(console, "zoo", summary)
    return summary


def _strings(console: Console, plan: Plan, count: int) -> dict[str, float]:
    files = {path.relative_to(STRING_MODEL).as_posix(): path.read_bytes() for path in _files(STRING_MODEL)}
    models = [_string_model(number) for number in range(count)]
    with _running(console) as running:
        console.print(f"storing the files of {count} models")
        _store(running.endpoint, [(model.name, files) for model in models])
        summary = running.fill(models)
        summary |= running.ask(running.mix(models), plan)
    _tell(console, "simple-string", summary)
    return summary


@dataclass(frozen=True, slots=True)
class _Near:
    """Whether an answer is what the framework says, but for rounding."""

    expected: NDArray[Any]

    def __call__(self, answer: inference_pb2.ModelInferResponse) -> bool:
        dtype = np.float32 if answer.outputs[0].datatype == "FP32" else np.float64
        found = np.frombuffer(answer.raw_output_contents[0], dtype)
        return bool(np.allclose(found, self.expected.ravel(), rtol=1e-4, atol=1e-5))


def _make_zoo(endpoint: str, count: int) -> list[Served]:
    """So many models of the zoo, their files in S3; made by a process for each core."""
    _client(endpoint).create_bucket(Bucket=BUCKET)
    parts = [range(start, min(start + AT_ONCE_MADE, count)) for start in range(0, count, AT_ONCE_MADE)]
    with ProcessPoolExecutor(len(set(cores())), multiprocessing.get_context("spawn")) as makers:
        made = makers.map(partial(_make_some, endpoint), parts)
        return [model for models in made for model in models]


def _make_some(endpoint: str, numbers: range) -> list[Served]:
    """In a process of its own, which trains the templates once."""
    zoo = _zoo_here()
    _put_all(endpoint, [(zoo.name(number), {zoo.kind(number).file: zoo.content(number)}) for number in numbers])
    return [_of_zoo(zoo, number) for number in numbers]


@cache
def _zoo_here() -> Zoo:
    return Zoo(SEED)


def _of_zoo(zoo: Zoo, number: int) -> Served:
    question = zoo.question(number)
    request = infer_request(zoo.name(number), question.input, question.datatype, question.array[:1])
    return Served(zoo.name(number), zoo.kind(number).format, request, _Near(question.expected[:1]))


def _string_model(number: int) -> Served:
    name = f"simple-string-{number:05}"
    request = inference_pb2.ModelInferRequest(model_name=name)
    for tensor, values in (("INPUT0", range(16)), ("INPUT1", [1] * 16)):
        request.inputs.add(name=tensor, datatype="BYTES", shape=(1, 16))
        texts = [str(value).encode() for value in values]
        request.raw_input_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in texts))

    def right(answer: inference_pb2.ModelInferResponse) -> bool:
        sums = b"".join(len(str(n + 1)).to_bytes(4, "little") + str(n + 1).encode() for n in range(16))
        return sums in list(answer.raw_output_contents)

    return Served(name, "tensorflow", request.SerializeToString(), right)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


class _Running:
    """An instance with an S3 server behind it, the generator, and what was learned of the models.

    Attributes:
        endpoint: of the S3 server.
        start_s, start_cpu_s: until the instance was ready, by the clock and of CPU.
    """

    def __init__(
        self,
        console: Console,
        endpoint: str,
        server: Process,
        generator: Generator,
        log: Path,
        folder: Path,
        start_s: float,
    ) -> None:
        self.endpoint = endpoint
        self._console = console
        self._server = server
        self._generator = generator
        self._log = log
        self._folder = folder
        self._process = psutil.Process(server.pids[0])
        self.start_s = start_s
        self.start_cpu_s = sum(self._process.cpu_times()[:2])
        self._answers: dict[str, bytes] = {}

    def register(self, count: int) -> float:
        """Register so many models by the names and keys that the zoo's have; how many a second."""
        began = time.perf_counter()
        models = (Served(f"model-{number:07}", "sklearn", b"", lambda answer: True) for number in range(count))
        asyncio.run(self._with_channel(self._register_all, models))
        return count / (time.perf_counter() - began)

    def fill(self, models: Sequence[Served]) -> dict[str, float]:
        """Register models and load each by its first request, whose answer has to be right."""
        before = self.rss()
        began = time.perf_counter()
        asyncio.run(self._with_channel(self._register_all, models))
        registering = time.perf_counter() - began
        registered = self.rss()
        self._console.print(f"registered {len(models)} models, {len(models) / registering:.0f}/s; loading them")
        # The frameworks are imported by then, and not counted as what models take.
        asyncio.run(self._with_channel(self._first_answers, models[: 2 * AT_ONCE]))
        imported, counted = self.rss(), self._instance().used_bytes
        began = time.perf_counter()
        asyncio.run(self._with_channel(self._first_answers, models[2 * AT_ONCE :]))
        loading = time.perf_counter() - began
        self._console.print(f"loaded them, {len(models) / loading:.0f}/s")
        instance = self._instance()
        rss = self.rss()
        return {
            "registered": len(models),
            "resident": instance.models,
            "registrations_per_s": len(models) / registering,
            "loads_per_s": (len(models) - 2 * AT_ONCE) / loading,
            "bytes_per_registered_model": (registered - before) / len(models),
            "bytes_per_resident_model": (rss - imported) / (len(models) - 2 * AT_ONCE),
            "rss_bytes": rss,
            "size_error": (instance.used_bytes - counted) / max(1, rss - imported) - 1,
        }

    def mix(self, models: Sequence[Served]) -> Path:
        """The models' requests with their answers, in an order by popularity."""
        path = self._folder / "mix"
        parts = [(model.request, self._answers[model.name], *_rounding(self._answers[model.name])) for model in models]
        Mix(parts, zipf_order(len(models), CALLS, SEED)).write(path)
        return path

    def ask(self, mix: Path, plan: Plan) -> dict[str, float]:
        """By 64 callers, and at a fixed rate."""
        closed = [self._measure(mix, plan, duration_s=4 * plan.duration_s) for _ in range(plan.rounds)]
        opened = self._measure(mix, plan, mode="open", rate_per_s=RATE_PER_S, duration_s=4 * plan.duration_s)
        return {
            "requests_per_s": statistics.median(one.per_s for one in closed),
            "p50_ms": statistics.median(one.latency_us["p50"] for one in closed) / 1e3,
            "p99_ms": statistics.median(one.latency_us["p99"] for one in closed) / 1e3,
            "cpu_us_per_request": statistics.median(one.server_cpu_us for one in closed),
            "server_busy": statistics.median(one.server_busy for one in closed),
            "others_busy": statistics.median(one.others_busy for one in closed),
            "open_requests_per_s": opened.per_s,
            "open_p50_ms": opened.latency_us["p50"] / 1e3,
            "open_p99_ms": opened.latency_us["p99"] / 1e3,
        }

    def disturb(self, resident: Sequence[Served], cold: Sequence[Served], plan: Plan) -> dict[str, float]:
        """Ask hot models at a steady rate, alone and while others are loaded; and look where a load's time goes."""
        asyncio.run(self._with_channel(self._register_all, cold))
        hot = self.mix(resident[:HOT])
        window_s = len(cold) / plan.rounds / (COLD_PER_MINUTE / 60)
        quiet, disturbed, took = [], [], []
        already = len(self._loads())
        for turn in range(plan.rounds):
            quiet.append(self._measure(hot, plan, mode="open", rate_per_s=HOT_RATE_PER_S, duration_s=window_s))
            part = cold[turn :: plan.rounds]
            with ExitStack() as asking:
                took.append(asking.enter_context(self._asking(part)))
                disturbed.append(self._measure(hot, plan, mode="open", rate_per_s=HOT_RATE_PER_S, duration_s=window_s))
        p99 = [statistics.median(one.latency_us["p99"] for one in windows) for windows in (quiet, disturbed)]
        loads = self._loads()[already:]
        stages = {stage: statistics.median(one[stage] for one in loads) * 1e3 for stage in loads[0]}
        seconds = statistics.median(second for part in took for second in part)
        self._console.print(
            f"{len(loads)} loads; medians in ms: " + ", ".join(f"{k} {v:.1f}" for k, v in stages.items())
        )
        return {
            "hot_p99_ms": p99[0] / 1e3,
            "hot_p99_ratio_during_loads": p99[1] / p99[0],
            "miss_ms": seconds * 1e3,
            "cold_start_overhead_ms": seconds * 1e3 - stages["find"] - stages["open"],
            **{f"load_{stage}_ms": value for stage, value in stages.items()},
        }

    # Its parts.

    def _measure(self, mix: Path, plan: Plan, **how: Any) -> Outcome:
        return self._generator.measure(
            Job(
                self._server.target, MODEL_INFER, mix=str(mix), connections=CONNECTIONS, streams=STREAMS,
                warmup_s=plan.warmup_s, server_pids=self._server.pids, **how,
            )
        )  # fmt: skip

    def rss(self) -> int:
        """What the instance has in memory."""
        return int(self._process.memory_info().rss)

    def _instance(self) -> cluster_pb2.ListInstancesResponse.Instance:
        async def ask(channel: Channel, _: Sequence[Served]) -> bytes:
            return await channel.unary("/mmcore.Cluster/ListInstances", b"", timeout_s=30)

        answer = cluster_pb2.ListInstancesResponse.FromString(asyncio.run(self._with_channel(ask, ())))
        return answer.instances[0]

    async def _with_channel(self, work: Callable[..., Any], models: Iterable[Served]) -> Any:
        channel = Channel(self._server.target)
        try:
            return await work(channel, models)
        finally:
            await channel.close()

    async def _register_all(self, channel: Channel, models: Iterable[Served]) -> None:
        async def one(model: Served) -> None:
            info = model_mesh_pb2.ModelInfo(type=model.type, path=model.name, key=json.dumps({"storage_key": "zoo"}))
            request = model_mesh_pb2.RegisterModelRequest(modelId=model.name, modelInfo=info)
            await channel.unary("/mmesh.ModelMesh/registerModel", request.SerializeToString(), timeout_s=60)

        await _some_at_once(one, models, 4 * AT_ONCE)

    async def _first_answers(self, channel: Channel, models: Sequence[Served]) -> None:
        async def one(model: Served) -> None:
            body = await channel.unary(MODEL_INFER, model.request, timeout_s=300)
            if not model.right(inference_pb2.ModelInferResponse.FromString(body)):
                raise PeerFailed(f"{model.name} answered otherwise than its framework")
            self._answers[model.name] = body

        await _some_at_once(one, models, AT_ONCE)

    @contextmanager
    def _asking(self, models: Sequence[Served]) -> Iterator[list[float]]:
        """Inside the block a process asks cold models one after the other; gives the seconds of each in the end."""
        requests = self._folder / "cold"
        requests.write_text("\n".join(model.request.hex() for model in models))
        argv = [*YIELDING, sys.executable, "-m", "bench.peers.cold_caller", self._server.target, str(requests)]
        took: list[float] = []
        with Process("cold caller", argv, core=cores()[1]) as caller:
            yield took
            took += json.loads(caller.ask("took", 300))

    def _loads(self) -> list[dict[str, float]]:
        """The seconds of each load, by stage."""
        lines = [line for line in self._log.read_text().splitlines() if " loaded model " in line]
        return [{stage: float(seconds) for stage, seconds in _STAGE.findall(line)} for line in lines]


async def _some_at_once(work: Callable[[Served], Any], models: Iterable[Served], at_once: int) -> None:
    waiting = iter(models)

    async def worker() -> None:
        for model in waiting:
            await work(model)

    await asyncio.gather(*(worker() for _ in range(at_once)))


def _rounding(answer: bytes) -> tuple[int, str]:
    """How many floats stand at an answer's end, and their code."""
    response = inference_pb2.ModelInferResponse.FromString(answer)
    code = _CODES.get(response.outputs[-1].datatype)
    if code is None:
        return 0, "f"
    values: NDArray[np.int64] = np.array(response.outputs[-1].shape)
    return int(values.prod()), code


@contextmanager
def _running(console: Console, *, prepared: Callable[[Path], None] = lambda database: None) -> Iterator[_Running]:
    """An S3 server, and an instance that has nothing yet but what its ``prepared`` registry has."""
    server_core, load_core = cores()
    # The folder goes last: the instance would make its registry's anew.
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="mmcore-bench-") as scratch, ExitStack() as running:
        folder = Path(scratch)
        storage = running.enter_context(
            Process("rclone", [*YIELDING, sys.executable, "-m", "bench.peers.rclone_s3"], core=load_core)
        )
        endpoint = str(storage.ready["s3"])
        entries = folder / "storage-config"
        entries.mkdir()
        entry = {"type": "s3", "access_key_id": KEY, "secret_access_key": SECRET, "endpoint_url": endpoint,
                 "region": "us-east-1", "bucket": BUCKET}  # fmt: skip
        (entries / "zoo").write_text(json.dumps(entry))
        log = folder / "log"
        command = [
            sys.executable, "-m", "mmcore.cli.main", "serve", "--grpc-port", "0", "--capacity", CAPACITY,
            "--registry", f"sqlite:{folder / 'registry.db'}", "--storage-config", str(entries),
            "--model-cache", str(folder / "cache"), "--log-level", "info",
        ]  # fmt: skip
        argv = ["sh", "-c", f'exec "$0" "$@" 2>{log}', *command]
        prepared(folder / "registry.db")
        began = time.perf_counter()
        server = running.enter_context(Process("mmcore", argv, core=server_core, ready_s=START_WITHIN_S))
        start_s = time.perf_counter() - began
        generator = running.enter_context(Generator(load_core))
        yield _Running(console, endpoint, server, generator, log, folder, start_s)


def _scratch() -> Path:
    """In memory where there is room: a disk's own pace, and what it forgot a minute ago, is not what is measured."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > SCRATCH_BYTES:
        return MEMORY
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER


def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=AT_ONCE),
    )  # fmt: skip


def _store(endpoint: str, models: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    """A bucket with the files of models, by name and path."""
    _client(endpoint).create_bucket(Bucket=BUCKET)
    _put_all(endpoint, models)


def _put_all(endpoint: str, models: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    client = _client(endpoint)

    def put(model: tuple[str, dict[str, bytes]]) -> None:
        name, files = model
        for path, content in files.items():
            client.put_object(Bucket=BUCKET, Key=f"{name}/{path}", Body=content)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(put, models))


def _tell(console: Console, case: str, summary: dict[str, float]) -> None:
    if not summary.get("resident", 1):
        raise NotMeasured(f"{case}: no model is resident")
    console.print(f"[bold]{case}[/bold]")
    for key, value in summary.items():
        console.print(f"  {key:32} {value:,.3f}" if abs(value) < 1000 else f"  {key:32} {value:,.0f}")
