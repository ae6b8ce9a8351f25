"""SUITE=passthrough: requests passed through by `mmcore serve --runtime`, through a grpc.aio proxy, and sent directly.

The runtime is an echo of ours, which shares a core with the generator; `mmcore serve` and the proxy have the other.
With `direct` the echo itself is measured, on the generator's core. In the cases `mlserver` and `triton` the runtime is
that server with its identity, loaded by `mmcore serve`, which shares a core with the generator; the server has the
other. `mlserver-large` and `triton-large` are the same with a tensor of 602 KB from one caller. Beside large messages
a relay of bytes has the place of `mmcore serve`: it tells what another hop takes by itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import grpc
import numpy as np
from rich.console import Console

from bench import builds, environments
from bench.builds import NotMeasured
from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.machine import cores
from bench.messages import infer_request, large_request, small_request
from bench.peers import mlserver, triton
from bench.peers.paths import MODEL_INFER
from bench.peers.served import ServedModel
from bench.processes import Generator, PeerFailed, Process, python_server
from bench.rows import Row

PROXY: Final = "grpc-aio-proxy"
DIRECT: Final = "direct"
RELAY: Final = "relay"

_PORTS: Final = ("--grpc-port", "0", "--rest-port", "0", "--metrics-port", "0")
_IDENTITY: Final = ServedModel("identity", "identity", "none", "INPUT0", "FP32", (-1,), (("OUTPUT0", "FP32"),))
#: Behind a server's name; and the values of its tensors, those of an image of [3, 224, 224].
_LARGE: Final = "-large"
_LARGE_VALUES: Final = 3 * 224 * 224
#: A server with its frameworks, and the load of the model.
READY_S: Final = 110.0


def _mlserver_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model-settings.json").write_text(json.dumps(mlserver.model_settings(_IDENTITY) | {"parameters": {}}))


_SERVERS: Final[dict[str, tuple[Callable[[Console], Path], Callable[[Path], None]]]] = {
    "mlserver": (environments.mlserver, _mlserver_model),
    "triton": (environments.triton, lambda folder: triton.write_model(folder, _IDENTITY)),
}


def run(console: Console, plan: Plan) -> list[Row]:
    """Start the runtimes and what stands before them, measure the cases, end them."""
    _, load_core = cores()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="mmcore-bench-passthrough-")))
        generator = running.enter_context(Generator(load_core))
        found = _before_echo(console, plan, generator, folder) if any(map(plan.wants_case, ("small", "large"))) else []
        for name in _SERVERS:
            if not (plan.wants_case(name) or plan.wants_case(name + _LARGE)):
                continue
            try:
                found += _before_server(name, console, plan, generator, folder)
            except NotMeasured as missing:
                console.print(f"{name}: not measured: {missing}", markup=False)
        return found


def _before_echo(console: Console, plan: Plan, generator: Generator, folder: Path) -> list[Row]:
    server_core, load_core = cores()
    with ExitStack() as running:
        (folder / "weights").write_bytes(b"weights")
        _register(folder / "echo.json", "any", folder / "weights")
        runtime = running.enter_context(python_server(DIRECT, "bench.peers.runtime_echo", core=load_core))
        options = ("--runtime", runtime.target, "--static-models", str(folder / "echo.json"))
        servers = {
            OURS: running.enter_context(
                python_server(OURS, "mmcore.cli.main", "serve", *options, *_PORTS, core=server_core)
            )
        }
        if plan.wants_peer(PROXY):
            servers[PROXY] = running.enter_context(
                python_server(PROXY, "bench.peers.grpc_aio_proxy", runtime.target, core=server_core)
            )
        if plan.wants_case("large"):
            servers |= _relay(running, console, plan, runtime.target, server_core)
        if plan.wants_peer(DIRECT):
            servers[DIRECT] = runtime
        cases = [case for case in _cases(tuple(servers)) if plan.wants_case(case.name)]
        return rows(cases, (PROXY, RELAY, DIRECT), measure(cases, servers, generator, plan, console))


def _relay(running: ExitStack, console: Console, plan: Plan, target: str, core: int) -> dict[str, Process]:
    """The relay before ``target``, if it is wanted and can be had."""
    if not plan.wants_peer(RELAY):
        return {}
    try:
        return {RELAY: running.enter_context(Process(RELAY, [str(builds.relay()), target], core=core))}
    except NotMeasured as missing:
        console.print(f"{RELAY}: not measured: {missing}", markup=False)
        return {}


def _before_server(name: str, console: Console, plan: Plan, generator: Generator, folder: Path) -> list[Row]:
    """An identity of 64 callers, and of one, through an instance before a server, and sent to the server itself."""
    server_core, load_core = cores()
    environment, write_model = _SERVERS[name]
    place, repository = environment(console), folder / f"{name}-repository"
    repository.mkdir()
    write_model(folder / f"{name}-model")
    _register(folder / f"{name}.json", name, folder / f"{name}-model")
    with ExitStack() as running:
        launcher = [sys.executable, "-m", f"bench.peers.{name}", str(place), "--repository", str(repository)]
        server = running.enter_context(Process(DIRECT, launcher, core=server_core))
        options = ("--runtime", f"{name}://{server.target}?repo={repository}", "--capacity", "1GiB")
        argv = [sys.executable, "-m", "mmcore.cli.main", "serve", *options, *_PORTS]
        static = ("--static-models", str(folder / f"{name}.json"))
        ours = running.enter_context(Process(OURS, [*argv, *static], core=load_core, ready_s=READY_S))
        servers = {OURS: ours, DIRECT: server}
        if plan.wants_case(name + _LARGE):
            servers |= _relay(running, console, plan, server.target, load_core)
        cases = []
        for case, values, connections, streams in ((name, 4, 4, 16), (name + _LARGE, _LARGE_VALUES, 1, 1)):
            if plan.wants_case(case):
                array = np.arange(values, dtype=np.float32).reshape(1, values)
                body = infer_request("identity", "INPUT0", "FP32", array, request_id="0123456789ab")
                exchanges = {
                    one: Exchange(body, _answer(one, process.target, body))
                    for one, process in servers.items()
                    if one != RELAY or case.endswith(_LARGE)
                }
                cases.append(Case(case, exchanges, connections, streams, ("throughput", "p50", "p99")))
        return rows(cases, (RELAY, DIRECT), measure(cases, servers, generator, plan, console))


def _register(file: Path, kind: str, path: Path) -> None:
    key = json.dumps({"storage_params": {"type": "local"}})
    info = {"type": kind, "path": str(path), "key": key}
    file.write_text(json.dumps([{"modelId": "identity", "modelInfo": info, "ensureLoaded": True}]))


def _answer(what: str, target: str, body: bytes) -> bytes:
    """What a server answers, always."""
    with grpc.insecure_channel(target) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        try:
            answer, again = infer(body, timeout=60), infer(body, timeout=60)
        except grpc.RpcError as failure:
            raise PeerFailed(f"{what}: {failure.code().name}: {failure.details()}") from failure
    assert isinstance(answer, bytes)
    if answer != again:
        raise PeerFailed(f"{what}: answered {answer!r}, then {again!r}")
    return answer


def _cases(servers: tuple[str, ...]) -> list[Case]:
    small, large = small_request(), large_request()
    metrics = ("throughput", "p50", "p99", "cpu", "capacity")
    return [
        Case("small", dict.fromkeys([one for one in servers if one != RELAY], Exchange(small, small)), 4, 16, metrics),
        Case("large", dict.fromkeys(servers, Exchange(large, large)), 1, 1, metrics),
    ]
