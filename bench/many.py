"""SUITE=many: a thousand small models of mixed formats in one process, beside a process with a few of them."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import numpy as np
import psutil
from rich.console import Console

from bench.comparison import OURS, Plan
from bench.machine import cores
from bench.messages import infer_request
from bench.model_zoo import KINDS, Zoo
from bench.peers.paths import MODEL_INFER
from bench.processes import PeerFailed, Process
from bench.rows import Row, compare
from mmcore.pb import inference_pb2

FEW: Final = 10 * len(KINDS)
MANY: Final = 1000
#: Models that are asked, of all formats.
ASKED: Final = 10 * len(KINDS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a process with so many models takes: megabytes, threads, and seconds until all were loaded."""

    megabytes: float
    threads: int
    seconds: float


def run(console: Console, plan: Plan) -> list[Row]:
    """Serve few and many; each answer that is looked at has to be the framework's."""
    del plan
    few, many = (_serve(console, models) for models in (FEW, MANY))
    kilobytes = (many.megabytes - few.megabytes) * 1000 / (MANY - FEW)
    name = f"{MANY}-models"
    return [
        compare(name, "threads", many.threads, f"{FEW} models", few.threads),
        Row(name, "rss_per_model", kilobytes, "", None, None, "KB"),
        Row(name, "load", MANY / many.seconds, "", None, None, "models/s"),
    ]


def _serve(console: Console, models: int) -> Loaded:
    zoo = Zoo()
    with tempfile.TemporaryDirectory() as folder:
        zoo.write(Path(folder), range(models))
        argv = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", folder, "--grpc-port", "0",
                "--preload", "all", "--log-level", "warning"]  # fmt: skip
        console.print(f"loading {models} models")
        began = time.perf_counter()
        with Process(OURS, argv, core=cores()[0], ready_s=300) as server:
            seconds = time.perf_counter() - began
            _check(server, zoo, models)
            (process,) = map(psutil.Process, server.pids)
            return Loaded(process.memory_info().rss / 1e6, process.num_threads(), seconds)


def _check(server: Process, zoo: Zoo, models: int) -> None:
    with grpc.insecure_channel(server.target) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        for number in range(models - ASKED, models):
            asked = zoo.question(number)
            answer = infer(infer_request(zoo.name(number), asked.input, asked.datatype, asked.array), timeout=60)
            response = inference_pb2.ModelInferResponse.FromString(answer)
            found = np.frombuffer(response.raw_output_contents[0], asked.expected.dtype).reshape(asked.expected.shape)
            if not np.allclose(found, asked.expected, 1e-5, 1e-6):
                raise PeerFailed(f"{zoo.name(number)} answered {found}; its framework says {asked.expected}")
