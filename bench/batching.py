"""SUITE=batching: the same models with requests merged and one by one, for 64 callers and for one.

Two networks that are cheap by the row and dear by the call: 30 hidden layers of 32 in ONNX, two of 64 in scikit-learn.
Both answer labels, which are exact: a float's last digit may depend on the number of rows multiplied together.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.machine import cores
from bench.messages import infer_request
from bench.peers.paths import MODEL_INFER
from bench.processes import Generator, PeerFailed, Process
from bench.rows import Row
from mmcore.pb import inference_pb2

UNMERGED: Final = "unmerged"
FEATURES: Final = 64
CLASSES: Final = 10
ONNX_HIDDEN: Final = (32,) * 30
SKLEARN_HIDDEN: Final = 64
CONNECTIONS: Final = 4
STREAMS: Final = 16
MODELS: Final = FOLDER / "batching"
SEED: Final = 11


@dataclass(frozen=True, slots=True)
class Network:
    """One of the models: its name, its file, its input, and the request."""

    name: str
    file: str
    input: str
    output: str
    row: NDArray[np.float32]


_ROW: Final = np.random.default_rng(SEED).normal(size=(1, FEATURES)).astype(np.float32)
NETWORKS: Final = (
    Network("mlp-onnx", "model.onnx", "input", "label", _ROW),
    Network("mlp-sklearn", "model.joblib", "predict", "predict", _ROW),
)


def run(console: Console, plan: Plan) -> list[Row]:
    """Make the networks where they are missing, serve them both ways, measure."""
    _make(console)
    with _started() as (servers, generator):
        cases = [case for network in NETWORKS for case in _cases(network, servers) if plan.wants_case(case.name)]
        return rows(cases, (UNMERGED,), measure(cases, servers, generator, plan, console))


@contextmanager
def _started() -> Iterator[tuple[Mapping[str, Process], Generator]]:
    server_core, load_core = cores()
    with ExitStack() as running:
        servers = {
            name: running.enter_context(Process(name, _serve(MODELS / name), core=server_core))
            for name in (OURS, UNMERGED)
        }
        yield servers, running.enter_context(Generator(load_core))


def _serve(folder: Path) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "mmcore.cli.main", "serve", "--models", str(folder), "--grpc-port", "0",
        "--preload", "all", "--log-level", "warning",
    )  # fmt: skip


def _cases(network: Network, servers: Mapping[str, Process]) -> list[Case]:
    body = infer_request(network.name, network.input, "FP32", network.row)
    exchanges = {name: Exchange(body, _answer(network, name, server, body)) for name, server in servers.items()}
    return [
        Case(network.name, exchanges, CONNECTIONS, STREAMS, ("throughput", "p99", "cpu", "capacity")),
        Case(f"{network.name}-1", exchanges, 1, 1, ("p50", "p99", "cpu")),
    ]


def _answer(network: Network, name: str, server: Process, body: bytes) -> bytes:
    """What a server answers, read with protobuf: the framework's own label."""
    with grpc.insecure_channel(server.target) as channel:
        answer = channel.unary_unary(MODEL_INFER)(body, timeout=60)
    assert isinstance(answer, bytes)
    response = inference_pb2.ModelInferResponse.FromString(answer)
    found = np.frombuffer(response.raw_output_contents[0], np.int64).tolist()
    right = _label(network)
    if found != right or response.outputs[0].name != network.output:
        raise PeerFailed(f"case {network.name}, {name}: answered {found}; the framework says {right}")
    return answer


def _label(network: Network) -> list[int]:
    path = MODELS / OURS / network.name / network.file
    if path.suffix == ".onnx":
        import onnxruntime

        labels: Any = onnxruntime.InferenceSession(str(path)).run([network.output], {network.input: network.row})[0]
    else:
        import joblib

        labels = joblib.load(path).predict(network.row)
    found: list[int] = labels.tolist()
    return found


def _make(console: Console) -> None:
    """The networks' folders: one as it is, one that says that requests are not to be merged."""
    if all((MODELS / name / network.name / network.file).exists() for name in (OURS, UNMERGED) for network in NETWORKS):
        return
    console.print("making two networks")
    for name in (OURS, UNMERGED):
        for network in NETWORKS:
            folder = MODELS / name / network.name
            folder.mkdir(parents=True, exist_ok=True)
            if name == UNMERGED:
                (folder / "mmcore.yaml").write_text("max_batch_size: 0\n", encoding="utf-8")
            write = _write_onnx if network.file.endswith(".onnx") else _write_sklearn
            write(folder / network.file)


def _write_onnx(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(SEED)
    widths = (FEATURES, *ONNX_HIDDEN, CLASSES)
    nodes, weights, last = [], [], "input"
    for at, (wide, narrow) in enumerate(pairwise(widths)):
        matrix = (random.normal(size=(wide, narrow)) / np.sqrt(wide)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{at}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{at}"], [f"h{at}"]))
        nodes.append(helper.make_node("Relu", [f"h{at}"], [f"a{at}"]))
        last = f"a{at}"
    nodes[-1] = helper.make_node("ArgMax", [f"h{len(widths) - 2}"], ["label"], axis=1, keepdims=0)
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _write_sklearn(path: Path) -> None:
    import joblib
    from sklearn.neural_network import MLPClassifier

    random = np.random.default_rng(SEED)
    network = MLPClassifier((SKLEARN_HIDDEN, SKLEARN_HIDDEN), max_iter=3, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and need not
        network.fit(random.normal(size=(500, FEATURES)), np.arange(500) % CLASSES)
    joblib.dump(network, path)
