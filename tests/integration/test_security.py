"""TLS, tokens and closed management on running instances, met with other people's clients."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from mmcore.pb import model_mesh_pb2
from tests.certificates import Authority, Signed
from tests.serving import IDENTITY, Instance, Serve, command, environment, write_model

pytestmark = pytest.mark.slow

REGISTER = "/mmesh.ModelMesh/registerModel"
STATUS = "/mmesh.ModelMesh/getModelStatus"
TOKENS = """
- {name: caller, token: call-me, scopes: [infer], models: ["open-*"]}
- {name: boss, token: the-boss, scopes: [infer, manage]}
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server_files(authority: Authority) -> Signed:
    return authority.sign("localhost", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def client_files(authority: Authority) -> Signed:
    return authority.sign("client")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("open-1", "closed"):
        write_model(folder, name, IDENTITY.replace("DATATYPE", "FP32"))
    return folder


def infer(client: triton.InferenceServerClient, model: str, **headers: str) -> list[list[float]]:
    tensor = triton.InferInput("INPUT0", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
    answer = client.infer(model, [tensor], headers=headers).as_numpy("OUTPUT0")
    assert answer is not None
    values: list[list[float]] = answer.tolist()
    return values


def tls_flags(files: Signed, *more: object) -> tuple[object, ...]:
    return ("--tls-cert", files.certificate, "--tls-key", files.key, *more)


def rest(instance: Instance, method: str, path: str, context: ssl.SSLContext | None, **headers: str) -> tuple[int, Any]:
    make: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    if context is not None:
        make = http.client.HTTPSConnection
    connection = make(instance.rest, timeout=20, **({"context": context} if context else {}))
    body = None
    if method == "POST":
        body = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [5]}]})
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    told = json.loads(answer.read() or b"null")
    connection.close()
    return answer.status, told


def trusting(authority: Authority, files: Signed | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


def test_grpc_and_rest_are_served_over_tls(
    serve: Serve, models: Path, authority: Authority, server_files: Signed
) -> None:
    instance = serve(models, *tls_flags(server_files))
    with triton.InferenceServerClient(
        instance.grpc, ssl=True, root_certificates=str(authority.certificate)
    ) as client:  # fmt: skip
        assert infer(client, "open-1") == [[1, 2]]
    context = trusting(authority)
    assert rest(instance, "POST", "/v2/models/open-1/infer", context)[0] == 200
    with pytest.raises(OSError):
        rest(instance, "GET", "/v2/health/live", None)
    for port, protocol in ((instance.grpc, "h2"), (instance.rest, "http/1.1")):
        assert agreed(port, authority) == protocol
    # Probes and Prometheus go on without.
    connection = http.client.HTTPConnection(instance.metrics, timeout=20)
    connection.request("GET", "/live")
    assert connection.getresponse().status == 200
    connection.close()

    asked = subprocess.run(
        command("infer", "open-1", "--input", "[[1, 2]]", "--target", instance.grpc, "--tls-ca", authority.certificate),
        env=environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["outputs"][0]["data"] == [1, 2]
    # With 1.2 as said, with 1.1 not, whatever ciphers the client would take.
    for version, code in (("-tls1_2", 0), ("-tls1_1", 1)):
        call = ["openssl", "s_client", "-connect", instance.rest, version, "-cipher", "ALL:@SECLEVEL=0"]
        assert subprocess.run(call, input=b"", capture_output=True, check=False, timeout=60).returncode == code


def agreed(port: str, authority: Authority) -> str | None:
    """What a listener chooses of both versions of HTTP (ALPN)."""
    context = trusting(authority)
    context.set_alpn_protocols(["http/1.1", "h2"])
    with (
        socket.create_connection(split_port(port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.selected_alpn_protocol()


def test_clients_without_a_certificate_of_the_authority_are_refused(
    serve: Serve, models: Path, authority: Authority, server_files: Signed, client_files: Signed, tmp_path: Path
) -> None:
    instance = serve(models, *tls_flags(server_files, "--tls-client-ca", authority.certificate, "--metrics-tls"))
    with triton.InferenceServerClient(
        instance.grpc, ssl=True, root_certificates=str(authority.certificate),
        private_key=str(client_files.key), certificate_chain=str(client_files.certificate),
    ) as client:  # fmt: skip
        assert infer(client, "open-1") == [[1, 2]]
    assert rest(instance, "GET", "/v2/health/live", trusting(authority, client_files))[0] == 200
    (tmp_path / "others").mkdir()
    stranger = Authority(tmp_path / "others").sign("client")
    for context in (trusting(authority), trusting(authority, stranger)):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            rest(instance, "GET", "/v2/health/live", context)
    with grpc.secure_channel(
        instance.grpc, grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    ) as channel, pytest.raises(grpc.RpcError) as refused:  # fmt: skip
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    # The metrics port asks nobody for one.
    connection = http.client.HTTPSConnection(instance.metrics, timeout=20, context=trusting(authority))
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_renewed_certificate_counts_from_the_next_connection_on(
    serve: Serve, models: Path, authority: Authority, server_files: Signed, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.write_bytes(server_files.certificate.read_bytes())
    key.write_bytes(server_files.key.read_bytes())
    instance = serve(
        models, "--tls-cert", certificate, "--tls-key", key, "--metrics-tls", "--management-port", "0",
    )  # fmt: skip
    ports = [instance.ready[kind] for kind in ("grpc", "rest", "metrics", "management")]

    def shown() -> list[bytes]:
        return [ssl.get_server_certificate(split_port(port), timeout=20).encode().strip() for port in ports]

    first = [server_files.certificate.read_bytes().strip()] * len(ports)
    assert shown() == first
    renewed = authority.sign("127.0.0.1", "IP:127.0.0.1")
    # Between the two files they do not fit each other: what was read before stays.
    _replace(certificate, renewed.certificate)
    assert shown() == first
    _replace(key, renewed.key)
    assert shown() == [renewed.certificate.read_bytes().strip()] * len(ports)
    assert rest(instance, "GET", "/v2/health/live", trusting(authority))[0] == 200
    assert "stays in force" in instance.log_text()


def split_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def test_the_clients_of_a_replaced_authority_count_from_the_next_connection_on(
    serve: Serve, models: Path, authority: Authority, server_files: Signed, client_files: Signed, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    new, trusted = Authority(tmp_path / "others"), tmp_path / "clients.crt"
    theirs = new.sign("client")
    trusted.write_bytes(authority.certificate.read_bytes())
    instance = serve(models, *tls_flags(server_files, "--tls-client-ca", trusted))
    for known, goes_in, stays_out in ((authority, client_files, theirs), (new, theirs, client_files)):
        _replace(trusted, known.certificate)
        assert rest(instance, "GET", "/v2/health/live", trusting(authority, goes_in))[0] == 200
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            rest(instance, "GET", "/v2/health/live", trusting(authority, stays_out))


def _replace(file: Path, by: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(by.read_bytes())
    new.replace(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-cert", "CERT"], "both --tls-cert and --tls-key"),
        (["--tls-cert", "CERT", "--tls-key", "CERT"], "TLS: "),
        (["--tls-cert", "CERT", "--tls-key", "KEY", "--peer-port", "0"], "--peer-ca"),
        (["--peer-ca", "CERT"], "need --tls-cert"),
        (["--no-shared-management"], "--management-port"),
        (["--auth-tokens", "CERT"], "expected a list"),
    ],
)
def test_settings_that_protect_nothing_are_refused_at_start(server_files: Signed, flags: list[str], words: str) -> None:
    paths = {"CERT": str(server_files.certificate), "KEY": str(server_files.key)}
    call = command("serve", "--grpc-port", "0", *(paths.get(flag, flag) for flag in flags))
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def closed(serve: Serve, models: Path, tmp_path: Path) -> Iterator[tuple[Instance, Path]]:
    file = tmp_path / "tokens.yaml"
    file.write_text(TOKENS)
    yield serve(models, "--auth-tokens", file), file


def test_callers_need_a_token_with_the_scope_and_the_model(closed: tuple[Instance, Path]) -> None:
    instance, _ = closed
    caller, boss = "Bearer call-me", "Bearer the-boss"
    with triton.InferenceServerClient(instance.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        for headers, model, code in (
            ({}, "open-1", "UNAUTHENTICATED"),
            ({"authorization": "Bearer nobody"}, "open-1", "UNAUTHENTICATED"),
            ({"authorization": caller}, "closed", "PERMISSION_DENIED"),
        ):
            with pytest.raises(InferenceServerException, match=code):
                infer(client, model, **headers)
        assert infer(client, "open-1", authorization=caller) == [[1, 2]]
        assert infer(client, "closed", authorization=boss) == [[1, 2]]
        with pytest.raises(InferenceServerException, match="PERMISSION_DENIED"):
            client.get_model_repository_index(headers={"authorization": caller})
        assert client.get_model_repository_index(headers={"authorization": boss}).models

    # REST has the same guard, and cannot pass for another instance.
    path = "/v2/models/{}/infer"
    assert rest(instance, "GET", "/v2/health/ready", None)[0] == 200
    assert rest(instance, "POST", path.format("open-1"), None)[0] == 401
    assert rest(instance, "POST", path.format("open-1"), None, authorization=caller)[0] == 200
    assert rest(instance, "POST", path.format("closed"), None, authorization=caller)[0] == 403
    assert rest(instance, "GET", "/v2/models/closed", None, authorization=caller)[0] == 403
    assert rest(instance, "POST", "/v2/repository/index", None, authorization=caller)[0] == 403
    disguised = {"authorization": caller, "mmcore-forward": "load 0 ", "mmcore-model-bin": "closed"}
    status, told = rest(instance, "POST", path.format("open-1"), None, **disguised)
    assert (status, told["model_name"]) == (200, "open-1")

    models = subprocess.run(
        command("models", "--target", instance.grpc, "--token", "the-boss", "--json"),
        env=environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert models.returncode == 0, models.stderr
    assert {one["name"] for one in json.loads(models.stdout)} == {"open-1", "closed"}


def test_each_message_of_a_stream_is_for_a_model_of_the_caller(closed: tuple[Instance, Path]) -> None:
    instance, _ = closed
    found: list[tuple[Any, Any]] = []
    with triton.InferenceServerClient(instance.grpc) as client:
        client.start_stream(
            lambda result, error: found.append((result, error)), headers={"authorization": "Bearer call-me"}
        )
        for model in ("open-1", "closed"):
            tensor = triton.InferInput("INPUT0", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
            client.async_stream_infer(model, [tensor])
        client.stop_stream()
    [(answer, none), (_, error)] = found
    assert none is None
    assert answer.as_numpy("OUTPUT0").tolist() == [[1, 2]]
    assert "may not use model 'closed'" in str(error)


def test_management_has_a_port_of_its_own(serve: Serve, models: Path) -> None:
    instance = serve(models, "--management-port", "0", "--no-shared-management")
    request = model_mesh_pb2.GetStatusRequest(modelId="x").SerializeToString()
    with grpc.insecure_channel(instance.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(STATUS)(request, timeout=20)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with grpc.insecure_channel(instance.ready["management"]) as channel:
        channel.unary_unary(STATUS)(request, timeout=20)
    assert rest(instance, "POST", "/v2/repository/models/open-1/unload", None)[0] == 403
    assert rest(instance, "POST", "/v2/models/open-1/infer", None)[0] == 200


def test_instances_know_each_other_by_their_authority(
    serve: Serve, authority: Authority, server_files: Signed, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_model(folder, "shared", IDENTITY.replace("DATATYPE", "FP32"))
    flags = tls_flags(
        server_files, "--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0", "--peer-ca",
        authority.certificate,
    )  # fmt: skip
    first, second = serve(None, *flags), serve(None, *flags)
    trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    register = model_mesh_pb2.RegisterModelRequest(
        modelId="shared",
        modelInfo=model_mesh_pb2.ModelInfo(
            type="python", path=str(folder / "shared"), key=json.dumps({"storage_params": {"type": "local"}})
        ),
        loadNow=True,
        sync=True,
    )
    with grpc.secure_channel(first.grpc, trusted) as channel:
        channel.unary_unary(REGISTER)(register.SerializeToString(), timeout=60)
    for instance in (first, second):
        with triton.InferenceServerClient(
            instance.grpc, ssl=True, root_certificates=str(authority.certificate)
        ) as client:  # fmt: skip
            assert infer(client, "shared") == [[1, 2]]
    # Nobody else may pass for one: neither in plain text nor with a certificate of no instance.
    with grpc.insecure_channel(first.ready["peer"]) as plain, pytest.raises(grpc.RpcError):
        plain.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)
    with grpc.secure_channel(first.ready["peer"], trusted) as anonymous, pytest.raises(grpc.RpcError):
        anonymous.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)
    (tmp_path / "others").mkdir()
    stranger = Authority(tmp_path / "others").sign("instance")
    shown = grpc.ssl_channel_credentials(
        authority.certificate.read_bytes(), stranger.key.read_bytes(), stranger.certificate.read_bytes()
    )
    with grpc.secure_channel(first.ready["peer"], shown) as other, pytest.raises(grpc.RpcError) as refused:
        other.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_address_may_send_so_many_requests_over_grpc_and_rest_together(serve: Serve, models: Path) -> None:
    instance = serve(models, "--address-rate", "0.01", "--preload", "all")
    with triton.InferenceServerClient(instance.grpc) as client:
        assert infer(client, "open-1") == [[1, 2]]
        with pytest.raises(InferenceServerException, match=r"is above its 0\.01 requests per second"):
            infer(client, "open-1")
        assert rest(instance, "GET", "/v2/models/open-1", None)[0] == 429
        assert client.is_server_live()
