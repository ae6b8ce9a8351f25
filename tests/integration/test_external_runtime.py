"""An instance before a runtime that speaks the SPI: what it loads there, passes through, and does when that fails."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mmcore.pb import inference_pb2, model_mesh_pb2
from tests.certificates import Authority
from tests.management import States
from tests.serving import Serve, command, environment
from tests.toy_processes import Front, Runtime, refused, request

pytestmark = pytest.mark.slow


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(f"unix:{tmp_path}/runtime.sock")
    yield runtime
    runtime.kill()


@pytest.fixture
def front(serve: Serve, runtime: Runtime, tmp_path: Path) -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def start(*args: object, **settings: Any) -> Front:
        runtime.start(**settings)
        fronts.append(Front(serve(None, "--runtime", runtime.address, *args), tmp_path))
        return fronts[-1]

    yield start
    for one in fronts:
        one.close()


Start = Callable[..., Front]


def test_models_are_loaded_into_the_runtime_and_answer_by_their_own_bytes(front: Start, runtime: Runtime) -> None:
    mesh = front(starting=2)
    key = {"storage_params": {"type": "local"}, "model_type": {"name": "onnx", "version": "1"}, "more": 1}
    assert mesh.register("m", key=json.dumps(key), load=True).status == States.LOADED
    answer = mesh.infer("m", mm_other="x", custom="y")
    assert (answer.model_name, answer.id, list(answer.raw_output_contents)) == ("m", "7", [b"abcd"])
    journal = runtime.journal
    assert journal[:5] == ["status"] * 3 + ["predict m", "load m"]
    type_, path, told = journal[5].removeprefix("request ").split(" ", 2)
    assert (type_, path) == ("mt:onnx:1", str(mesh.files / "m.onnx"))
    assert json.loads(told) == {"model_type": {"name": "onnx", "version": "1"}, "more": 1, "disk_size_bytes": 7}
    assert "infer m m None" in journal


def test_a_vmodels_request_gets_the_models_own_name(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m-1", "m.onnx")
    mesh.client.set_vmodel("alias", "m-1")
    assert mesh.infer("alias").model_name == "m-1"
    assert mesh.infer("", mm_vmodel_id="alias").model_name == "m-1"
    assert "infer m-1 m-1 None" in runtime.journal


def test_rest_reaches_the_runtime_too(front: Start) -> None:
    mesh = front()
    mesh.register("m")
    mesh.client.set_vmodel("alias", "m")
    body = {"inputs": [{"name": "X", "datatype": "UINT8", "shape": [3], "data": [1, 2, 3]}]}
    # Whoever asks for a vmodel is answered by that name.
    for name in ("m", "alias"):
        url = f"http://{mesh.instance.rest}/v2/models/{name}/infer"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=15) as answer:
            content = json.load(answer)
        assert (content["model_name"], content["outputs"][0]["data"]) == (name, [1, 2, 3])


def test_the_runtimes_own_services_are_reached_by_metadata_and_the_spi_is_not(front: Start) -> None:
    mesh = front()
    mesh.register("m")
    assert mesh.call("toy.Toy/Ask", b"what?", mm_model_id="m") == b"m what?"
    assert refused(lambda: mesh.call("toy.Toy/Ask", b"what?"))[0] is grpc.StatusCode.INVALID_ARGUMENT
    code, text = refused(lambda: mesh.call("mmesh.ModelRuntime/unloadModel", b"", mm_model_id="m"))
    assert (code, text) == (
        grpc.StatusCode.UNIMPLEMENTED, "Method not found or not permitted: mmesh.ModelRuntime/unloadModel"
    )  # fmt: skip


def test_methods_that_the_runtime_does_not_name_are_refused_unless_it_takes_any(front: Start) -> None:
    mesh = front(methods={"inference.GRPCInferenceService/ModelInfer": [1]})
    mesh.register("m")
    assert mesh.infer("m").model_name == "m"
    assert refused(lambda: mesh.call("toy.Toy/Ask", b"", mm_model_id="m"))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_service_of_its_own_names_a_vmodel_in_a_submessage_and_gets_the_model_in_another(
    front: Start, tmp_path: Path
) -> None:
    file = tmp_path / "dataplane.json"
    file.write_text(json.dumps({"rpcConfigs": {"toy.Toy/Ask": {"idExtractionPath": [1, 2], "vModelId": True}}}))
    mesh = front("--dataplane-config", file, methods={"toy.Toy/Ask": [3, 1]}, any=True)
    mesh.register("m")
    mesh.client.set_vmodel("alias", "m")
    asked, told = b"\x0a\x07\x12\x05alias", b"\x1a\x03\x0a\x01m"
    assert mesh.call("toy.Toy/Ask", asked) == b"m " + asked + told
    assert mesh.call("toy.Toy/Ask", asked + b"\x1a\x05\x0a\x03old") == b"m " + asked + told
    # The name in the message goes before that of the metadata, which is the model's where the message says nothing.
    assert mesh.call("toy.Toy/Ask", asked, mm_model_id="n") == b"m " + asked + told
    assert mesh.call("toy.Toy/Ask", b"", mm_model_id="m") == b"m " + told
    assert refused(lambda: mesh.infer("m"))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_streams_pass_with_the_id_of_each_message(front: Start) -> None:
    mesh = front()
    mesh.register("m")
    mesh.register("n")
    mesh.client.set_vmodel("alias", "n")
    stream = mesh.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    bodies = stream(iter([request("m", b"1"), request("alias", b"2")]), timeout=15)
    answers = [inference_pb2.ModelStreamInferResponse.FromString(body).infer_response for body in bodies]
    assert [(one.model_name, one.id, one.raw_output_contents[0]) for one in answers] == [
        ("m", "7.0", b"1"), ("m", "7.1", b"1"), ("n", "7.0", b"2"), ("n", "7.1", b"2"),
    ]  # fmt: skip


def test_a_models_own_error_comes_with_status_text_and_trailers(front: Start) -> None:
    mesh = front()
    mesh.register("m", "m-raising.onnx")
    with pytest.raises(grpc.RpcError) as error:
        mesh.infer("m")
    assert (error.value.code(), error.value.details()) == (
        grpc.StatusCode.OUT_OF_RANGE, "seven is not a number I like"
    )  # fmt: skip
    assert ("why", "because") in [(pair.key, pair.value) for pair in error.value.trailing_metadata()]


def test_copies_are_evicted_by_the_runtimes_capacity_and_the_sizes_it_tells(front: Start, runtime: Runtime) -> None:
    mesh = front("--min-residency", "0", "--eviction", "lru", capacity=25 * 2**20)
    for name in ("a", "b", "c"):
        mesh.register(name)
        mesh.infer(name)
    runtime.wait_for("unload a")
    assert mesh.infer("a").model_name == "a"
    assert runtime.journal.count("load a") == 2


def test_a_size_that_is_not_told_is_asked_for(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m", "m-unsized.onnx", load=True)
    assert "size m" in runtime.journal
    assert f", {7 * 2**20} bytes;" in mesh.instance.log_text()


def test_a_model_larger_than_it_was_thought_to_be_is_unloaded_and_refused(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m", "m-huge.onnx")
    code, text = refused(lambda: mesh.infer("m"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(200 * 2**20) in text
    # In a thread of its own, which the answer does not wait for.
    runtime.wait_for("unload m")


@pytest.mark.parametrize(("word", "text", "cleaned"), [
    ("refused", "the runtime says INVALID_ARGUMENT: I do not take such models", False),
    ("broken", "the runtime says INTERNAL: it is broken", True),
    ("stuck", "the runtime did not load it within 0.3 s", True),
])  # fmt: skip
def test_a_failed_load_tells_its_cause_and_is_cleaned_up_unless_nothing_was_done(
    front: Start, runtime: Runtime, word: str, text: str, cleaned: bool
) -> None:
    mesh = front(load_ms=300 if word == "stuck" else 60_000)
    mesh.register("m", f"m-{word}.onnx")
    assert refused(lambda: mesh.infer("m")) == (grpc.StatusCode.FAILED_PRECONDITION, text)
    assert ("unload m" in runtime.journal) == cleaned


def test_an_unload_that_is_refused_is_asked_for_again(front: Start, runtime: Runtime) -> None:
    mesh = front("--min-residency", "0", "--eviction", "lru", capacity=25 * 2**20)
    for name, file in (("a", "a-stays.onnx"), ("b", ""), ("c", "")):
        mesh.register(name, file)
        mesh.infer(name)
    assert mesh.infer("b").model_name == "b"
    runtime.wait_for("unload a", 2)


def test_what_is_left_of_a_load_that_failed_is_unloaded_at_last(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m", "m-broken-stays.onnx")
    code, text = refused(lambda: mesh.infer("m"))
    assert (code, text) == (grpc.StatusCode.FAILED_PRECONDITION, "the runtime says INTERNAL: it is broken")
    runtime.wait_for("unload m", 2)


def test_a_model_takes_no_more_requests_at_once_than_the_runtime_says(front: Start, runtime: Runtime) -> None:
    mesh = front(limit=2)
    mesh.register("m", "m-sleepy.onnx", load=True)
    infer = mesh.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    calls = [infer.future(request("m"), timeout=15) for _ in range(8)]
    assert all(call.result() for call in calls)
    assert runtime.journal[-1] == "most 2"


def test_what_the_instance_is_told_of_the_runtime_goes_before_what_it_says(front: Start, runtime: Runtime) -> None:
    mesh = front(
        "--runtime-load-timeout", "1500ms", "--runtime-loads-at-once", 3, "--runtime-model-concurrency", 1,
        loads=1, load_ms=60_000, limit=4,
    )  # fmt: skip
    mesh.register("m", "m-sleepy.onnx", load=True)
    infer = mesh.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    asked = [infer.future(request("m"), timeout=15) for _ in range(6)]
    assert all(call.result() for call in asked)
    assert runtime.journal[-1] == "most 1"
    for number in range(3):
        mesh.register(f"s{number}", f"s{number}-slow.onnx")
    slow = [infer.future(request(f"s{number}"), timeout=15) for number in range(3)]
    assert all(call.result() for call in slow)
    assert runtime.journal[-2] == "most loading 3"
    mesh.register("stuck", "stuck-waits.onnx")
    assert refused(lambda: mesh.infer("stuck"))[1] == "the runtime did not load it within 1.5 s"


def test_a_forgotten_model_is_loaded_again_and_the_request_answered(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m", load=True)
    runtime.call("Forget")
    assert mesh.infer("m").model_name == "m"
    assert runtime.journal.count("load m") == 2


def test_a_request_of_its_own_service_is_sent_again_when_its_model_was_forgotten(
    front: Start, runtime: Runtime
) -> None:
    mesh = front()
    mesh.register("m", load=True)
    runtime.call("Forget")
    assert mesh.call("toy.Toy/Ask", b"a", mm_model_id="m") == b"m a"
    assert runtime.journal.count("load m") == 2
    # What says so at once again says it of something else.
    runtime.call("Forget")
    assert refused(lambda: mesh.call("toy.Toy/Ask", b"a", mm_model_id="m")) == (grpc.StatusCode.NOT_FOUND, "no model m")


def test_a_runtime_that_is_killed_under_load_gets_its_models_back_and_requests_are_answered(
    front: Start, runtime: Runtime
) -> None:
    mesh = front()
    for name in ("m", "n"):
        mesh.register(name, f"{name}-sleepy.onnx", load=True)
    infer = mesh.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    calls = [infer.future(request("m"), timeout=30) for _ in range(8)]
    runtime.kill()
    runtime.start()
    for call in calls:
        assert inference_pb2.ModelInferResponse.FromString(call.result()).model_name == "m"
    assert mesh.infer("n").model_name == "n"
    assert runtime.journal[0] == "status"
    assert {"load m", "load n"} <= set(runtime.journal)


def test_a_runtime_that_dies_of_a_load_is_waited_for_and_others_are_served(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("fine")
    mesh.register("deadly", "deadly-crash.onnx")
    mesh.infer("fine")
    code, _ = refused(lambda: mesh.infer("deadly"))
    assert code is grpc.StatusCode.UNAVAILABLE
    runtime.kill()
    runtime.start()
    assert mesh.infer("fine").model_name == "fine"


def test_a_runtime_that_is_asked_elsewhere_than_it_is_managed(serve: Serve, runtime: Runtime, tmp_path: Path) -> None:
    data = f"unix:{tmp_path}/data.sock"
    runtime.start(data=data)
    mesh = Front(serve(None, "--runtime", f"{runtime.address}?data={data}"), tmp_path)
    try:
        assert mesh.register("m", load=True).status == States.LOADED
        assert mesh.infer("m").model_name == "m"
    finally:
        mesh.close()


def test_an_old_runtime_is_found_by_the_services_old_name(front: Start) -> None:
    mesh = front(service="com.ibm.watson.tas.internal.proto.ModelServer")
    mesh.register("m")
    assert mesh.infer("m").model_name == "m"


def test_a_failing_runtime_ends_the_start(runtime: Runtime) -> None:
    runtime.start(status="FAILING")
    done = subprocess.run(
        command("serve", "--grpc-port", "0", "--runtime", runtime.address),
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "says that it is failing" in done.stderr


@pytest.mark.parametrize("address", ["nowhere", "unix:", "host:0", "http://host:1/x"])
def test_an_address_that_is_none_is_a_usage_error(address: str) -> None:
    done = subprocess.run(
        command("serve", "--runtime", address), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 2
    assert "unix:PATH or HOST:PORT" in done.stderr


@pytest.mark.parametrize(("address", "authority", "words"), [
    ("unix:r.sock", "ca.pem", "--runtime: 'unix:r.sock' is reached by a Unix socket, where TLS is not spoken"),
    ("localhost:1", "ca.key", "TLS: "),
])  # fmt: skip
def test_tls_that_cannot_be_spoken_with_a_runtime_is_told_at_the_start(
    tmp_path: Path, address: str, authority: str, words: str
) -> None:
    Authority(tmp_path)
    call = command("serve", "--grpc-port", "0", "--runtime", address, "--runtime-ca", str(tmp_path / authority))
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_instance_unloads_what_it_has_when_it_ends(front: Start, runtime: Runtime) -> None:
    mesh = front()
    mesh.register("m", load=True)
    mesh.instance.signal(signal.SIGTERM)
    assert mesh.instance.wait() == 0
    assert "unload m" in runtime.journal


def test_a_runtime_over_tls_sees_this_instances_certificate(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    theirs, ours = authority.sign("localhost", "IP:127.0.0.1"), authority.sign("instance", "DNS:localhost")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    runtime = Runtime(f"localhost:{port}")
    runtime.start(tls=[str(theirs.certificate), str(theirs.key), str(authority.certificate)])
    try:
        own = ("--tls-cert", ours.certificate, "--tls-key", ours.key)
        instance = serve(None, "--runtime", runtime.address, "--runtime-ca", authority.certificate, *own)
        (tmp_path / "m.onnx").write_bytes(b"weights")
        credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        name = ("grpc.ssl_target_name_override", "localhost")
        with grpc.secure_channel(instance.grpc, credentials, options=[name]) as channel:
            call = channel.unary_unary("/mmesh.ModelMesh/registerModel")
            key = json.dumps({"storage_params": {"type": "local"}})
            info = model_mesh_pb2.ModelInfo(type="onnx", path=str(tmp_path / "m.onnx"), key=key)
            wanted = model_mesh_pb2.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
            status = model_mesh_pb2.ModelStatusInfo.FromString(call(wanted.SerializeToString(), timeout=20))
            assert status.status == States.LOADED
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            answer = infer(request("m"), timeout=20)
        assert inference_pb2.ModelInferResponse.FromString(answer).model_name == "m"
    finally:
        runtime.kill()
