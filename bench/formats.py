"""SUITE=formats: a sample model of each format through ``mmcore serve``, MLServer and Triton, and bare."""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench import environments
from bench.builds import FOLDER, NotMeasured, raw_c
from bench.comparison import OURS, Case, Exchange, Plan, Summary, measure, rows
from bench.machine import cores
from bench.messages import infer_request
from bench.peers.mlserver import IMPLEMENTATIONS
from bench.peers.paths import MODEL_INFER
from bench.peers.served import ServedModel
from bench.processes import ROOT, Generator, PeerFailed, Process, python_server
from bench.rows import Row, compare
from bench.samples import FLOWER, Sample
from mmcore.model import NUMPY_DTYPES
from mmcore.pb import inference_pb2

MODELS: Final = FOLDER / "models"
CONNECTIONS: Final = 4
STREAMS: Final = 16
METRICS: Final = ("throughput", "p99", "cpu")
#: Windows no longer than this: there are six for each format in a round.
WINDOW_S: Final = 1.0
#: For MLServer and Triton together with the frameworks that they import.
READY_S: Final = 110.0
#: design.md: for one caller a request may cost the framework's own call times this, plus that many µs.
BUDGET_FACTOR: Final = 1.3
BUDGET_US: Final = 10.0
#: MLServer makes an id of its own, and so another answer each time, where a request has none.
REQUEST_ID: Final = "0123456789ab"
#: Echoes what one caller sends: what a message costs that comes alone.
RAW_C: Final = "raw-c"
#: Answers come as other servers' own calls round them, in batches of any size.
RELATIVE: Final = 1e-5
ABSOLUTE: Final = 1e-6

SAMPLES: Final = (
    Sample(
        "identity", "identity", MODELS / "identity" / "model.py", "INPUT0", "FP32",
        np.arange(4, dtype=np.float32).reshape(1, 4),
    ),
    Sample("sklearn", "iris-sklearn", MODELS / "iris-sklearn" / "model.joblib", "predict", "FP32", FLOWER),
    Sample("xgboost", "iris-xgboost", MODELS / "iris-xgboost" / "model.json", "predict", "FP32", FLOWER),
    Sample("lightgbm", "iris-lightgbm", MODELS / "iris-lightgbm" / "model.txt", "predict", "FP32", FLOWER),
    Sample("onnx", "mlp-onnx", MODELS / "mlp-onnx" / "model.onnx", "input", "FP32", FLOWER),
    Sample("torchscript", "mlp-torchscript", MODELS / "mlp-torchscript" / "model.pt", "INPUT__0", "FP32", FLOWER),
    Sample("openvino", "mlp-openvino", MODELS / "mlp-openvino" / "model.xml", "input", "FP32", FLOWER),
)  # fmt: skip
#: Cases whose framework is large, and so may be missing, with the module to look for.
LARGE: Final = {"torchscript": "torch", "openvino": "openvino"}

#: Cases whose answers' last bits depend on how many rows a matrix product had: one FP32 output, last in the answer.
NETWORKS: Final = frozenset({"onnx", "torchscript", "openvino"})

Values = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Running:
    """The processes of the suite: servers by name, and a framework's loop for each case."""

    servers: Mapping[str, Process]
    frameworks: Mapping[str, Process]
    generator: Generator


def run(console: Console, plan: Plan) -> list[Row]:
    """Install the peers and train the samples where they are missing, start everything, measure."""
    plan = replace(plan, duration_s=min(plan.duration_s, WINDOW_S))
    models = _wanted(console, plan)
    with _started(console, plan, models) as running:
        cases = [case for sample in models for case in _cases(sample, running) if plan.wants_case(case.name)]
        loops: dict[str, list[dict[str, float]]] = {name: [] for name in running.frameworks}

        def call_frameworks() -> None:
            for name, loop in running.frameworks.items():
                loops[name].append(json.loads(loop.ask(str(plan.duration_s / 2), plan.duration_s + 60)))

        summaries = measure(cases, running.servers, running.generator, plan, console, between=call_frameworks)
    found = rows(cases, ("mlserver", "triton", RAW_C), summaries)
    return found + framework_rows(summaries, loops) if plan.wants_peer("framework") else found


def values_of(response: inference_pb2.ModelInferResponse) -> Values:
    """An answer's values by output, flat: raw or typed contents, shape [n] or [n, 1], say the same."""
    raw = response.raw_output_contents
    found = {}
    for at, output in enumerate(response.outputs):
        if raw:
            values = np.frombuffer(raw[at], NUMPY_DTYPES[output.datatype])
        else:
            contents = output.contents
            values = np.array([value for _, field in contents.ListFields() for value in field])
        found[output.name] = values.astype(np.float64)
    return found


def agree(found: Values, right: Values) -> bool:
    """Whether the outputs have the same names and, but for rounding, the same values."""
    return found.keys() == right.keys() and all(
        len(values) == len(right[name]) and np.allclose(values, right[name], RELATIVE, ABSOLUTE)
        for name, values in found.items()
    )


def served_model(sample: Sample, outputs: Sequence[tuple[str, str]]) -> ServedModel:
    """What the launchers of MLServer and Triton are told of a sample; ``outputs`` are (name, datatype)."""
    return ServedModel(
        sample.model, sample.case, str(sample.file), sample.input, sample.datatype, sample.array.shape[1:],
        tuple(outputs),
    )  # fmt: skip


def framework_rows(
    summaries: Mapping[tuple[str, str], Summary], loops: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[Row]:
    """Ours beside the bare call, for 64 callers and for one, and for one beside the budget made of it.

    The budget counts nothing of what a message costs that comes alone: a wake-up and three calls of the system. What
    they take on this machine is what raw C takes that does nothing else, so there is a budget with that as well. The
    identity calls no framework: it has none of these rows.
    """
    found = []
    for sample, runs in loops.items():
        if sample == "identity":
            continue
        cpu_us = statistics.median(run["cpu_us"] for run in runs)
        per_s = statistics.median(run["calls"] / run["seconds"] for run in runs)
        many, one = _case_names(sample)
        for case in (many, one):
            if (case, OURS) in summaries:
                ours = summaries[case, OURS].values
                found.append(compare(case, "throughput", ours["throughput"], "framework", per_s))
                found.append(compare(case, "cpu", ours["cpu"], "framework", cpu_us))
        if (one, OURS) in summaries:
            budget_us = BUDGET_FACTOR * cpu_us + BUDGET_US
            ours_us = summaries[one, OURS].values["cpu"]
            found.append(compare(one, "cpu_budget", ours_us, "framework", budget_us))
            if (one, RAW_C) in summaries:
                floor_us = summaries[one, RAW_C].values["cpu"]
                found.append(compare(one, "cpu_budget", ours_us, f"framework + {RAW_C}", budget_us + floor_us))
    return found


def _case_names(sample: str) -> tuple[str, str]:
    return sample, f"{sample}-1x1"


def _wanted(console: Console, plan: Plan) -> list[Sample]:
    """The samples that are wanted and whose frameworks are here, trained."""
    found = []
    for sample in SAMPLES:
        if not any(map(plan.wants_case, _case_names(sample.case))):
            continue
        module = LARGE.get(sample.case)
        if module and not find_spec(module):
            console.print(f"{sample.case}: not measured: install {module}")
        else:
            found.append(sample)
    if not all(sample.file.exists() for sample in found):
        console.print(f"training the sample models in {MODELS.relative_to(ROOT)}")
        argv = [sys.executable, str(ROOT / "deploy" / "samples" / "train.py"), "--all", str(MODELS)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode:
            raise PeerFailed(f"deploy/samples/train.py failed: {(done.stderr or done.stdout)[-2000:]}")
    return found


@contextmanager
def _started(console: Console, plan: Plan, models: Sequence[Sample]) -> Iterator[Running]:
    """The frameworks' loops, which say the right answers, the servers on the same files, and the generator."""
    server_core, load_core = cores()
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        loops = {}
        served = []
        for sample in models:
            stored = Path(folder) / f"{sample.case}.npy"
            np.save(stored, sample.array)
            loop = python_server(
                f"framework {sample.case}", "bench.peers.framework_loop", sample.case, str(sample.file), str(stored),
                core=server_core,
            )  # fmt: skip
            loops[sample.case] = running.enter_context(loop)
            served.append(served_model(sample, [(name, datatype) for name, (datatype, _) in _outputs(loop).items()]))
        preload = [argument for sample in models for argument in ("--preload", sample.model)]
        ours = Process(
            OURS,
            [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", str(MODELS), "--grpc-port", "0",
             *preload, "--log-level", "warning"],
            core=server_core,
        )  # fmt: skip
        servers = {OURS: running.enter_context(ours)}
        starts: dict[str, tuple[Callable[[Console], Path], list[ServedModel]]] = {
            "mlserver": (environments.mlserver, [model for model in served if model.framework in IMPLEMENTATIONS]),
            "triton": (environments.triton, served),
        }
        for name, (environment, its_models) in starts.items():
            if not plan.wants_peer(name) or not its_models:
                continue
            try:
                place = environment(console)
            except NotMeasured as missing:
                console.print(f"{name}: not measured: {missing}", markup=False)
                continue
            argv = [sys.executable, "-m", f"bench.peers.{name}", str(place), *(model.to_json() for model in its_models)]
            servers[name] = running.enter_context(Process(name, argv, core=server_core, ready_s=READY_S))
        if plan.wants_peer(RAW_C):
            try:
                servers[RAW_C] = running.enter_context(Process(RAW_C, [str(raw_c())], core=server_core))
            except NotMeasured as missing:
                console.print(f"{RAW_C}: not measured: {missing}", markup=False)
        yield Running(servers, loops, running.enter_context(Generator(load_core)))


def _outputs(loop: Process) -> dict[str, tuple[str, bytes]]:
    """What the framework itself answers: output name to datatype and bytes."""
    outputs: Any = loop.ready["outputs"]
    return {entry["name"]: (entry["datatype"], base64.b64decode(entry["data"])) for entry in outputs}


def _cases(sample: Sample, running: Running) -> list[Case]:
    """64 callers, whose requests every server merges as it can, and one alone."""
    body = infer_request(sample.model, sample.input, sample.datatype, sample.array, REQUEST_ID)
    right = {
        name: np.frombuffer(data, NUMPY_DTYPES[datatype]).astype(np.float64)
        for name, (datatype, data) in _outputs(running.frameworks[sample.case]).items()
    }
    rounded = sum(map(len, right.values())) if sample.case in NETWORKS else 0
    exchanges = {
        name: Exchange(body, _checked_answer(f"case {sample.case}, {name}", server.target, body, right), rounded)
        for name, server in running.servers.items()
        if name != RAW_C and (name != "mlserver" or sample.case in IMPLEMENTATIONS)
    }
    echo = {RAW_C: Exchange(body, body)} if RAW_C in running.servers else {}
    many, one = _case_names(sample.case)
    return [Case(many, exchanges, CONNECTIONS, STREAMS, METRICS), Case(one, exchanges | echo, 1, 1, METRICS)]


def _checked_answer(what: str, target: str, body: bytes, right: Values) -> bytes:
    """The bytes that a server answers, whose values are the framework's own.

    Asked with grpcio, twice: an answer that changes could not be verified under load.
    """
    with grpc.insecure_channel(target) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        try:
            answer, again = infer(body, timeout=60), infer(body, timeout=60)
        except grpc.RpcError as failure:
            raise PeerFailed(f"{what}: {failure.code().name}: {failure.details()}") from failure
    assert isinstance(answer, bytes)
    found = values_of(inference_pb2.ModelInferResponse.FromString(answer))
    if not agree(found, right) or answer != again:
        raise PeerFailed(f"{what}: answered {found} ({answer!r}, then {again!r}); the framework says {right}")
    return answer
