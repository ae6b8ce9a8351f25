"""SUITE=cold-loads: what requests for one model notice of others being loaded, and where the time of a load goes.

One model is asked at a steady rate (open loop), first alone and then while two hundred loads a minute run: requests for
models that are not there, more of them than fit. Each load's own time is taken from the server's log, so that what
mmcore adds can be told from what finding the files and the framework take.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.load.job import Job
from bench.machine import cores
from bench.messages import infer_request
from bench.model_zoo import Zoo
from bench.peers.paths import MODEL_INFER
from bench.processes import Generator, PeerFailed, Process
from bench.rows import Row

MODELS: Final = 200
LOADS_PER_MINUTE: Final = 200.0
RATE_PER_S: Final = 300.0
#: Less than all of the models take.
CAPACITY: Final = "8MB"
ROUNDS: Final = 3
#: design.md §9.
P99_RATIO: Final = 2.0
OVERHEAD_MS: Final = 5.0
_STAGE: Final = re.compile(r"(queue|find|room|open|publish) (\d+\.\d+)")


def run(console: Console, plan: Plan) -> list[Row]:
    """Measure the hot model quiet and disturbed, in turns."""
    zoo = Zoo()
    window_s = max(3.0, plan.duration_s * 8)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        zoo.write(Path(folder), range(MODELS))
        log = Path(folder) / "log"
        command = (sys.executable, "-m", "mmcore.cli.main", "serve", "--models", folder, "--log-level", "info")
        options = ("--grpc-port", "0", "--rest-port", "0", "--capacity", CAPACITY)
        argv = ["sh", "-c", f'exec "$0" "$@" 2>{log}', *command, *options]
        server = running.enter_context(Process("mmcore", argv, core=cores()[0]))
        generator = running.enter_context(Generator(cores()[1]))
        hot = zoo.question(0)
        body = infer_request(zoo.name(0), hot.input, hot.datatype, hot.array)
        with grpc.insecure_channel(server.target) as channel:
            infer = channel.unary_unary(MODEL_INFER)
            # Frameworks are imported, and the hot model is known to be hot.
            for number in (*range(20), *[0] * 200):
                infer(_body(zoo, number), timeout=60)
            answer = infer(body, timeout=60)
            assert isinstance(answer, bytes)
            job = Job(
                server.target, MODEL_INFER, body=body, expected=answer, mode="open", rate_per_s=RATE_PER_S,
                connections=2, streams=4, warmup_s=0.3, duration_s=window_s,
            )  # fmt: skip
            quiet, disturbed = [], []
            for _ in range(ROUNDS):
                quiet.append(generator.measure(job).latency_us["p99"])
                with _cold(zoo, infer):
                    disturbed.append(generator.measure(job).latency_us["p99"])
        stages = _stages(log.read_text())
    ratio = statistics.median(disturbed) / statistics.median(quiet)
    overhead_ms = statistics.median(sum(one[stage] for stage in ("queue", "room", "publish")) for one in stages) * 1e3
    medians = {stage: statistics.median(one[stage] for one in stages) * 1e3 for stage in stages[0]}
    told = ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items())
    console.print(f"{len(stages)} loads; medians in ms: {told}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    summary = {
        "hot_p99_ratio_during_loads": ratio, "cold_start_overhead_ms": overhead_ms, "stages_ms": medians,
        "loads": len(stages), "within": ratio <= P99_RATIO and overhead_ms <= OVERHEAD_MS,
    }  # fmt: skip
    (FOLDER / "cold-loads.summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    loaded, alone = statistics.median(disturbed), statistics.median(quiet)
    return [
        Row("hot model during loads", "p99", loaded, "quiet", alone, alone / loaded, "µs"),
        Row("cold start", "overhead", overhead_ms, "budget", OVERHEAD_MS, OVERHEAD_MS / overhead_ms, "ms"),
        *(Row("cold start", stage, ms, "", None, None, "ms") for stage, ms in medians.items()),
    ]


def _body(zoo: Zoo, number: int) -> bytes:
    question = zoo.question(number)
    return infer_request(zoo.name(number), question.input, question.datatype, question.array)


@contextmanager
def _cold(zoo: Zoo, infer: grpc.UnaryUnaryMultiCallable) -> Iterator[None]:
    """Inside the block ask for one cold model after the other, at the pace of LOADS_PER_MINUTE."""
    ended = threading.Event()
    failed: list[str] = []
    bodies = [_body(zoo, number) for number in range(20, MODELS)]

    def ask() -> None:
        due = time.monotonic()
        while not ended.is_set():
            body = bodies.pop(0)
            bodies.append(body)
            try:
                infer(body, timeout=30)
            except grpc.RpcError as error:
                failed.append(str(error.details()))
            due += 60.0 / LOADS_PER_MINUTE
            ended.wait(max(0.0, due - time.monotonic()))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise PeerFailed(f"cold models: {failed[0]}")


def _stages(log: str) -> list[dict[str, float]]:
    """The seconds of each load, by stage, but for those that imported a framework."""
    lines = [line for line in log.splitlines() if " loaded model " in line]
    return [{stage: float(seconds) for stage, seconds in _STAGE.findall(line)} for line in lines[20:]]
