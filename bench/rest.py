"""SUITE=rest: JSON beside MLServer, binary tensors beside Triton, over HTTP/1.1."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench import environments
from bench.builds import NotMeasured
from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.formats import READY_S, REQUEST_ID, served_model
from bench.load.http_caller import request
from bench.machine import cores
from bench.peers import frameworks
from bench.peers.served import ServedModel
from bench.processes import Generator, PeerFailed, Process
from bench.rows import Row
from bench.samples import FLOWER, FOLDER, Sample, samples
from mmcore.model import NUMPY_DTYPES

METRICS: Final = ("throughput", "p50", "p99", "cpu")
#: A connection has one request under way: as many callers as in the other suites.
CONNECTIONS: Final = 64

SKLEARN: Final = Sample(
    "sklearn", "iris-sklearn", FOLDER / "iris-sklearn" / "model.joblib", "predict", "FP32", FLOWER
)  # fmt: skip
IDENTITY: Final = FOLDER / "identity" / "model.py"


@dataclass(frozen=True, slots=True)
class Asked:
    """A case: what is asked of which model, in JSON or in binary, on how many connections, beside whom."""

    name: str
    sample: Sample
    binary: bool
    connections: int
    peer: str


ASKED: Final = (
    Asked("json", SKLEARN, False, CONNECTIONS, "mlserver"),
    Asked("json-1", SKLEARN, False, 1, "mlserver"),
    *(
        Asked(name, Sample("identity", "identity", IDENTITY, "INPUT0", "FP32", array), True, connections, "triton")
        for name, array, connections in (
            ("binary", np.arange(4, dtype=np.float32).reshape(1, 4), CONNECTIONS),
            ("binary-1", np.arange(4, dtype=np.float32).reshape(1, 4), 1),
            ("binary-large", np.ones((1, 3 * 224 * 224), np.float32), 1),
        )
    ),
)  # fmt: skip


def run(console: Console, plan: Plan) -> list[Row]:
    """Train the samples and install the peers where they are missing, start everything, measure."""
    samples(console)
    asked = [one for one in ASKED if plan.wants_case(one.name)]
    with _started(console, plan, asked) as (servers, generator):
        cases = [_case(one, servers) for one in asked]
        summaries = measure(cases, servers, generator, plan, console)
    return rows(cases, ("mlserver", "triton"), summaries)


def body_of(asked: Asked) -> tuple[bytes, int | None]:
    """The request's body, and the length of the JSON in front of its binary part."""
    sample = asked.sample
    entry: dict[str, Any] = {"name": sample.input, "datatype": sample.datatype, "shape": list(sample.array.shape)}
    document: dict[str, Any] = {"id": REQUEST_ID, "inputs": [entry]}
    if not asked.binary:
        entry["data"] = sample.array.reshape(-1).tolist()
        return json.dumps(document).encode(), None
    entry["parameters"] = {"binary_data_size": sample.array.nbytes}
    document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document).encode()
    return head + sample.array.tobytes(), len(head)


@contextmanager
def _started(console: Console, plan: Plan, asked: Sequence[Asked]) -> Iterator[tuple[Mapping[str, Process], Generator]]:
    server_core, load_core = cores()
    with ExitStack() as running:
        argv = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", str(FOLDER), "--grpc-port", "0",
                "--log-level", "warning"]  # fmt: skip
        servers = {OURS: running.enter_context(Process(OURS, argv, core=server_core))}
        peers: dict[str, Callable[[Console], Path]] = {
            "mlserver": environments.mlserver, "triton": environments.triton,
        }  # fmt: skip
        for name, environment in peers.items():
            models = {one.sample.case: one.sample for one in asked if one.peer == name}
            if not models or not plan.wants_peer(name):
                continue
            try:
                place = environment(console)
            except NotMeasured as missing:
                console.print(f"{name}: not measured: {missing}", markup=False)
                continue
            told = [_served(sample).to_json() for sample in models.values()]
            argv = [sys.executable, "-m", f"bench.peers.{name}", str(place), *told]
            servers[name] = running.enter_context(Process(name, argv, core=server_core, ready_s=READY_S))
        yield servers, running.enter_context(Generator(load_core))


def _served(sample: Sample) -> ServedModel:
    outputs = [("OUTPUT0", "FP32")] if sample.case == "identity" else [("predict", "INT64")]
    model = served_model(sample, outputs)
    if sample.case != "identity":
        return model
    # One model takes tensors of either size.
    return ServedModel(model.name, model.framework, model.path, model.input, model.datatype, (-1,), model.outputs)


def _case(asked: Asked, servers: Mapping[str, Process]) -> Case:
    body, header_length = body_of(asked)
    headers = {} if header_length is None else {"Inference_Header_Content_Length": str(header_length)}
    headers["Content_Type"] = "application/json" if header_length is None else "application/octet-stream"
    path = f"/v2/models/{asked.sample.model}/infer"
    [(_, datatype, right)] = frameworks.load(asked.sample.case, asked.sample.file)(asked.sample.array)
    message = request(path, body, **headers)
    exchanges = {
        name: Exchange(
            message, _checked_answer(f"case {asked.name}, {name}", server.rest, path, body, headers, datatype, right)
        )
        for name, server in servers.items()
        if name in (OURS, asked.peer)
    }
    return Case(asked.name, exchanges, asked.connections, 1, METRICS, protocol="http")


def _checked_answer(
    what: str, address: str, path: str, body: bytes, headers: Mapping[str, str], datatype: str, right: NDArray[Any]
) -> bytes:
    """The body that a server answers, whose values are the framework's own.

    Asked with the standard library's client, twice: an answer that changes could not be verified under load.
    """
    answers = [_ask(what, address, path, body, headers) for _ in range(2)]
    (answer, header_length), (again, _) = answers
    document = json.loads(answer[:header_length])
    output = document["outputs"][0]
    values = (
        np.frombuffer(answer[header_length:], NUMPY_DTYPES[datatype]) if header_length else np.array(output["data"])
    )
    if not np.array_equal(values.reshape(-1), right.reshape(-1)) or answer != again:
        raise PeerFailed(f"{what}: answered {answer[:500]!r}, then {again[:500]!r}; the framework says {right}")
    return answer


def _ask(what: str, address: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[bytes, int | None]:
    """An answer's body, and the length of the JSON in front of its binary part."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise PeerFailed(f"{what}: HTTP {response.status}: {answer[:500]!r}")
        length = response.getheader("Inference-Header-Content-Length")
        return answer, int(length) if length else None
    except OSError as failure:
        raise PeerFailed(f"{what}: {failure}") from failure
    finally:
        connection.close()
