"""Instances started as the Deployments of the controller say, and asked as the controller asks them."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import signal
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from mmcore.controller.deployment import CONSTRAINTS_MAP, ETCD_KEY, Place, deployment
from mmcore.controller.mesh import Mesh, NoInstance
from mmcore.controller.mesh_manifests import constraints_map
from mmcore.controller.mesh_tls import context_of
from mmcore.controller.objects import Object
from mmcore.controller.serving_config import ServingConfig
from mmcore.pb import model_mesh_pb2 as pb
from tests.certificates import Authority, Signed, self_signed
from tests.etcds import Etcd, free_port
from tests.pods import Pod
from tests.serving import IDENTITY, WAITING, write_model
from tests.unit.controller.objects import own_runtime
from tests.unit.server.test_listening import needs_ipv6

pytestmark = pytest.mark.slow

WITHIN_S = 30.0
NAME = "modelmesh-serving.models"
RUNTIME = own_runtime("mmcore", "python")
Start = Callable[..., Pod]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd")).start()
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path, etcd: Etcd) -> Iterator[Start]:
    """``start(config, tls files)``: a pod of the runtime that serves Python models, in a mesh of this test's own."""
    claims = tmp_path / "claims"
    (claims / "models").mkdir(parents=True)
    write_model(claims / "models", "identity", IDENTITY.replace("DATATYPE", "FP32"))
    connection = {"endpoints": f"http://{etcd.endpoint}", "root_prefix": tmp_path.name}
    pods: list[Pod] = []

    def run(config: ServingConfig, tls: Mapping[str, bytes] | None = None, address: str = "", **more: str) -> Pod:
        data = constraints_map(config, "models", [RUNTIME])["data"]
        files: dict[str, Mapping[str, bytes]] = {
            CONSTRAINTS_MAP: {key: text.encode() for key, text in data.items()},
            "etcd": {ETCD_KEY: json.dumps(connection).encode()},
        }
        if tls is not None:
            files[config.tls_secret] = tls
        made = deployment(RUNTIME, config, Place("models", "etcd", ("models",)), 1)
        folder = tmp_path / f"pod-{len(pods)}"
        folder.mkdir()
        pods.append(Pod(made, folder, files, claims, address=address, **more))
        return pods[-1]

    yield run
    for pod in pods:
        pod.end()


def secret_files(pair: Signed, authority: Path | None = None) -> dict[str, bytes]:
    files = {"tls.crt": pair.certificate.read_bytes(), "tls.key": pair.key.read_bytes()}
    return files | ({"ca.crt": authority.read_bytes()} if authority else {})


def secret(files: Mapping[str, bytes]) -> Object:
    return {"data": {key: base64.b64encode(content).decode() for key, content in files.items()}}


def refused(target: str, authority: Path | None = None, pair: Signed | None = None) -> None:
    # gRPC's own client tries a handshake that fails again until its time is over.
    with pytest.raises(InferenceServerException):
        infer(target, authority=authority, pair=pair, within_s=2)


def infer(
    target: str, *, authority: Path | None = None, pair: Signed | None = None, within_s: float = WITHIN_S
) -> list[list[float]]:
    tensor = triton.InferInput("INPUT0", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
    with triton.InferenceServerClient(
        target,
        ssl=authority is not None,
        root_certificates=str(authority) if authority else None,
        certificate_chain=str(pair.certificate) if pair else None,
        private_key=str(pair.key) if pair else None,
        # Certificates are for the Service, pods are called by their addresses.
        channel_args=[("grpc.ssl_target_name_override", NAME)],
    ) as client:
        answer = client.infer("identity", [tensor], client_timeout=within_s).as_numpy("OUTPUT0")
    assert answer is not None
    values: list[list[float]] = answer.tolist()
    return values


def until(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


async def register(
    pods: list[Pod], tls: ssl.SSLContext | None, within_s: float = WITHIN_S, model: str = "identity"
) -> pb.VModelStatusInfo:
    """What the controller does with a Predictor."""
    moved = asyncio.Event()

    async def credentials() -> ssl.SSLContext | None:
        return tls

    mesh = Mesh("models", lambda names: moved.set(), credentials)
    mesh.set_addresses([pod.target("grpc") for pod in pods])
    key = {"model_type": {"name": "python"}, "storage_params": {"type": "pvc", "name": "models"}}
    info = pb.ModelInfo(type=RUNTIME.label, path=model, key=json.dumps(key))
    request = pb.SetVModelRequest(
        vModelId=model, targetModelId=f"{model}__ksp-1", modelInfo=info, loadNow=True, owner="ksp"
    )
    loaded = pb.ModelStatusInfo.LOADED
    try:
        async with asyncio.timeout(within_s):
            await mesh.set_vmodel(request)
            while mesh.vmodels[model].activeModelStatus.status != loaded:
                moved.clear()
                await moved.wait()
        return mesh.vmodels[model]
    finally:
        await mesh.close()


def get(url: str, context: ssl.SSLContext | None = None) -> Any:
    with urllib.request.urlopen(url, timeout=WITHIN_S, context=context) as answer:
        return answer.status, answer.read()


def test_pods_without_tls_serve_what_the_controller_registers(start: Start) -> None:
    pod = start(ServingConfig()).ready()
    assert [pod.probe(kind) for kind in ("startupProbe", "livenessProbe", "readinessProbe")] == [200] * 3
    status = asyncio.run(register([pod], None))
    assert status.activeModelId == "identity__ksp-1" and status.owner == "ksp"
    assert infer(pod.target("grpc")) == [[1, 2]]
    assert get(f"http://{pod.target('http')}/v2/models/identity")[0] == 200
    assert b"mmcore_" in get(f"http://{pod.target('prometheus')}/metrics")[1]


@needs_ipv6
def test_pods_of_ipv6_alone_are_one_mesh(start: Start) -> None:
    pods = []
    for _ in range(2):
        config = ServingConfig.read(
            f"inferenceServicePort: {free_port()}\nrestProxy: {{port: {free_port()}}}\nmetrics: {{port: {free_port()}}}"
        )
        # One address for both, and so a port of each one's own for the other.
        pods.append(start(config, address="::1", MMCORE_HOST="::", MMCORE_PEER_PORT="0"))
    for pod in pods:
        assert pod.ready().probe("readinessProbe") == 200
    asyncio.run(register(pods, None))
    # One of them has the model and the other passes the request on.
    assert [infer(pod.target("grpc")) for pod in pods] == [[[1, 2]]] * 2
    for pod in pods:
        assert get(f"http://{pod.target('http')}/v2/models/identity")[0] == 200
        assert infer(f"127.0.0.1:{pod.port('grpc')}") == [[1, 2]]


@pytest.mark.parametrize("kind", ["signed by an authority", "self-signed"])
def test_pods_with_tls_are_one_mesh_that_asks_clients_for_certificates(start: Start, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    authority = Authority(folder)
    pair = authority.sign(NAME) if kind != "self-signed" else self_signed(folder, NAME)
    trusted = authority.certificate if kind != "self-signed" else pair.certificate
    files = secret_files(pair, authority.certificate if kind != "self-signed" else None)
    config = ServingConfig.read("tls: {secretName: model-serving-tls, clientAuth: require}")
    pods = [start(config, files), start(config, files)]
    for pod in pods:
        pod.ready()
        # Kubelets have no certificate.
        assert [pod.probe(one) for one in ("startupProbe", "livenessProbe", "readinessProbe")] == [200] * 3
    asyncio.run(register(pods, context_of(secret(files))))
    # One of them has the model and the other passes the request on, over TLS.
    assert [infer(pod.target("grpc"), authority=trusted, pair=pair) for pod in pods] == [[[1, 2]]] * 2

    refused(pods[0].target("grpc"), trusted)
    other = Authority(tmp_path).sign("other")
    refused(pods[0].target("grpc"), trusted, other)
    with pytest.raises((NoInstance, TimeoutError)):
        asyncio.run(register(pods, context_of(secret(secret_files(other))), within_s=2))

    context = ssl.create_default_context(cafile=trusted)
    context.check_hostname = False
    url = f"https://{pods[0].target('http')}/v2/models/identity"
    with pytest.raises(OSError):
        get(url, context)
    context.load_cert_chain(pair.certificate, pair.key)
    assert get(url, context)[0] == 200


def test_the_server_beside_is_told_to_end_after_the_last_call(start: Start, tmp_path: Path) -> None:
    write_model(tmp_path / "claims" / "models", "waiting", WAITING)
    pod = start(ServingConfig()).ready()
    asyncio.run(register([pod], None, model="waiting"))
    file = tmp_path / "go-on"

    def call() -> bool:
        tensor = triton.InferInput("FILE", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([str(file).encode()], np.object_))
        with triton.InferenceServerClient(pod.target("grpc")) as client:
            answer = client.infer("waiting", [tensor], client_timeout=WITHIN_S).as_numpy("DONE")
        return bool(answer is not None and answer[0])

    hook = http.client.HTTPConnection(pod.target("prometheus"), timeout=WITHIN_S)
    with futures.ThreadPoolExecutor() as threads:
        called = threads.submit(call)
        until((tmp_path / "go-on.started").exists)
        # As kubelets do: the other container's hook is asked while this one is told to end.
        hook.request("GET", "/drained")
        told = threads.submit(lambda: hook.getresponse().status)
        pod.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in pod.log.read_text())
        assert not told.done() and not called.done()
        file.touch()
        assert called.result(WITHIN_S)
        assert told.result(WITHIN_S) == 200
    hook.close()
    assert pod.process.wait(WITHIN_S) == 0


def test_clients_need_no_certificate_where_it_is_optional(start: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign(NAME)
    files = secret_files(pair, authority.certificate)
    config = ServingConfig.read("tls: {secretName: other, clientAuth: optional}\nmetrics: {scheme: http}")
    pod = start(config, files).ready()
    assert pod.probe("readinessProbe") == 200
    asyncio.run(register([pod], context_of(secret(files))))
    assert infer(pod.target("grpc"), authority=authority.certificate) == [[1, 2]]
    refused(pod.target("grpc"))
