"""The acceptance cases of ModelMesh's own tests that concern one instance, driven by grpcio and tritonclient."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as pb
from tests.management import BROKEN, SLOW_LOAD, Manager, States, VStates, files, scale
from tests.serving import IDENTITY, Instance, Serve

pytestmark = pytest.mark.slow

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def mesh(serve_for_session: Serve, root: Path) -> Instance:
    return serve_for_session(None, "--management-port", "0", "--model-cache", str(root / "cache"))


@pytest.fixture
def manager(mesh: Instance) -> Iterator[Manager]:
    with Manager(mesh.grpc) as made:
        yield made


@pytest.fixture
def client(mesh: Instance) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(mesh.grpc) as made:
        yield made


def tensor(values: Any = (1.0,), name: str = "X") -> triton.InferInput:
    data = np.array(values, np.float32)
    made = triton.InferInput(name, list(data.shape), "FP32")
    made.set_data_from_numpy(data)
    return made


def ask(client: triton.InferenceServerClient, model: str, headers: dict[str, str] | None = None) -> float:
    answer = client.infer(model, [tensor()], headers=headers, client_timeout=15.0).as_numpy("Y")
    assert answer is not None
    return float(answer[0])


def call(
    address: str, body: bytes, *headers: tuple[str, str | bytes], method: str = INFER
) -> inference_pb2.ModelInferResponse:
    """One call with metadata that tritonclient cannot send: a name more than once, or binary."""
    with grpc.insecure_channel(address) as channel:
        unary = channel.unary_unary(
            method,
            request_serializer=lambda message: message,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )
        answer: inference_pb2.ModelInferResponse = unary(body, metadata=headers, timeout=15)
        return answer


def message(name: str = "") -> bytes:
    request = inference_pb2.ModelInferRequest(model_name=name)
    request.inputs.add(name="X", datatype="FP32", shape=[1])
    request.raw_input_contents.append(np.ones(1, np.float32).tobytes())
    return request.SerializeToString()


def values(response: inference_pb2.ModelInferResponse) -> list[float]:
    return [float(np.frombuffer(raw, np.float32)[0]) for raw in response.raw_output_contents]


def test_a_model_from_its_registration_to_its_end(
    manager: Manager, client: triton.InferenceServerClient, mesh: Instance, root: Path
) -> None:
    unknown = manager.status("grpc-test")
    assert (unknown.status, list(unknown.errors)) == (States.NOT_FOUND, [])
    manager.register("grpc-test", scale(root, 2), loadNow=True, sync=True)
    assert ask(client, "grpc-test") == 2.0
    loaded = manager.status("grpc-test")
    assert (loaded.status, list(loaded.errors)) == (States.LOADED, [])
    (copy,) = loaded.modelCopyInfos
    assert (copy.location, copy.copyStatus) == (mesh.ready["instance"], States.LOADED)
    assert time.time() * 1000 - 15_000 < copy.time <= time.time() * 1000
    manager.register("large", files(root, "large", IDENTITY.replace("DATATYPE", "FP32")))
    answer = client.infer("large", [tensor(np.ones((1, 500_000)), "INPUT0")], client_timeout=5.0).as_numpy("OUTPUT0")
    assert answer is not None
    assert answer.sum() == 500_000
    # The runtime loses it behind everybody's back: it comes back within the next request.
    client.unload_model("grpc-test")
    client.load_model("grpc-test")
    assert ask(client, "grpc-test") == 2.0
    manager.unregister("grpc-test")
    manager.unregister("grpc-test")
    assert manager.state("grpc-test") == "NOT_FOUND"
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'grpc-test' is not found"):
        ask(client, "grpc-test")


def test_a_registered_model_is_a_model_like_any_other(
    manager: Manager, client: triton.InferenceServerClient, root: Path
) -> None:
    manager.register("like-any", scale(root, 2))
    manager.set_vmodel("like-any-alias", "like-any")
    for name in ("like-any", "like-any-alias"):
        assert client.is_model_ready(name)
        assert client.get_model_metadata(name).inputs[0].name == "X"
        assert client.get_model_config(name).config.input[0].name == "X"
        assert ask(client, name) == 2.0
        assert client.get_inference_statistics(name).model_stats[0].name == "like-any"
    assert client.get_inference_statistics("like-any").model_stats[0].inference_count == 2
    rows = {row.name: row for row in client.get_model_repository_index().models}
    assert (rows["like-any"].state, rows["like-any"].version) == ("READY", "1")
    assert "like-any-alias" not in rows
    assert client.is_model_ready("", headers={"mm-vmodel-id": "like-any-alias"})
    assert not client.is_model_ready("", headers={"mm-vmodel-id": "like-any"})
    manager.delete_vmodel("like-any-alias")
    manager.unregister("like-any")
    assert not client.is_model_ready("like-any")


def test_a_failed_load_is_told_with_its_reason(
    manager: Manager, client: triton.InferenceServerClient, root: Path
) -> None:
    status = manager.register("broken", files(root, "broken", BROKEN), loadNow=True, sync=True)
    for one in (status, manager.status("broken")):
        assert one.status == States.LOADING_FAILED
        (error,) = one.errors
        assert error.endswith("the weights are missing")
        (copy,) = one.modelCopyInfos
        assert copy.copyStatus == States.LOADING_FAILED
        assert copy.location
        assert 0 <= time.time() * 1000 - copy.time < 15_000
    with pytest.raises(InferenceServerException, match="the weights are missing") as refused:
        ask(client, "broken")
    assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert not client.is_model_ready("broken")
    manager.unregister("broken")
    gone = manager.register(
        "gone", pb.ModelInfo(type="python", path="/no/such", key='{"storage_params": {"type": "local"}}')
    )
    assert gone.status == States.NOT_LOADED
    assert "does not exist" in manager.ensure_loaded("gone", sync=True).errors[0]


def test_a_load_on_its_way_is_told_of(manager: Manager, root: Path) -> None:
    release = root / "release"
    info = files(root, "slow", SLOW_LOAD, settings=f"parameters: {{release: {release}}}")
    started = manager.register("slow", info, loadNow=True)
    assert started.status == States.LOADING
    assert [copy.copyStatus for copy in started.modelCopyInfos] == [States.LOADING]
    assert manager.ensure_loaded("slow").status == States.LOADING
    release.touch()
    assert manager.ensure_loaded("slow", sync=True).status == States.LOADED


@pytest.mark.parametrize(
    ("method", "request_", "code", "text"),
    [
        ("registerModel", pb.RegisterModelRequest(), "INVALID_ARGUMENT", "must provide non-empty modelId"),
        ("registerModel", pb.RegisterModelRequest(modelId="m"), "INVALID_ARGUMENT", "non-empty model type string"),
        ("unregisterModel", pb.UnregisterModelRequest(), "INVALID_ARGUMENT", "must provide non-empty modelId"),
        ("getModelStatus", pb.GetStatusRequest(), "INVALID_ARGUMENT", "must provide non-empty modelId"),
        ("ensureLoaded", pb.EnsureLoadedRequest(), "INVALID_ARGUMENT", "must provide non-empty modelId"),
        ("setVModel", pb.SetVModelRequest(targetModelId="m"), "INVALID_ARGUMENT", "Must provide vModelId"),
        ("setVModel", pb.SetVModelRequest(vModelId="v"), "INVALID_ARGUMENT", "Must provide targetModelId"),
        ("setVModel", pb.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=pb.ModelInfo()),
         "INVALID_ARGUMENT", "non-empty model type string"),
        ("setVModel", pb.SetVModelRequest(vModelId="v", targetModelId="absent"), "NOT_FOUND", "model not found"),
        ("setVModel", pb.SetVModelRequest(vModelId="v", targetModelId="m", updateOnly=True),
         "NOT_FOUND", "vmodel not found"),
        ("deleteVModel", pb.DeleteVModelRequest(), "INVALID_ARGUMENT", "Must provide vModelId"),
        ("getVModelStatus", pb.GetVModelStatusRequest(), "INVALID_ARGUMENT", "Must provide vModelId"),
        ("noSuchMethod", pb.GetStatusRequest(), "UNIMPLEMENTED", ""),
    ],
)  # fmt: skip
def test_what_is_refused(manager: Manager, method: str, request_: Any, code: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        manager.call(method, request_, pb.ModelStatusInfo)
    assert refused.value.code().name == code
    assert text in refused.value.details()


def test_no_model_id_is_a_secret_command(manager: Manager) -> None:
    for name in ("***LOGCACHE***", "***GETSTATE***"):
        assert manager.status(name) == pb.ModelStatusInfo()


def test_registering_again_as_something_else_is_refused(manager: Manager, root: Path) -> None:
    manager.register("twice", scale(root, 2))
    assert manager.register("twice", scale(root, 2)).status == States.NOT_LOADED
    with pytest.raises(grpc.RpcError, match="Model already exists with different attribute values") as refused:
        manager.register("twice", scale(root, 3))
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    manager.unregister("twice")


def test_old_names_and_the_port_of_its_own(mesh: Instance, manager: Manager, root: Path) -> None:
    for service in ("mmesh.ModelMesh", "com.ibm.watson.tas.proto.TasRuntime"):
        with Manager(mesh.ready["management"], service) as old:
            request = pb.RegisterModelRequest(modelId="old", modelInfo=scale(root, 2))
            assert old.call("addModel", request, pb.ModelStatusInfo).status == States.NOT_LOADED
            assert manager.state("old") == "NOT_LOADED"
            old.call("deleteModel", pb.UnregisterModelRequest(modelId="old"), pb.UnregisterModelResponse)
            assert old.state("old") == "NOT_FOUND"


def test_reflection_tells_of_it(mesh: Instance) -> None:
    for address in (mesh.grpc, mesh.ready["management"]):
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {"mmesh.ModelMesh", "mmcore.Cluster"} <= set(database.get_services())
            file = database.FindFileContainingSymbol("mmesh.ModelMesh")
            assert file.service[0].method[0].name == "registerModel"


def test_vmodels(manager: Manager, client: triton.InferenceServerClient, root: Path) -> None:
    first = manager.set_vmodel("my-vmodel", "my-model", scale(root, 2), loadNow=True, sync=True)
    assert (first.status, first.activeModelId, first.targetModelId) == (VStates.DEFINED, "my-model", "my-model")
    assert first.activeModelStatus.status == States.LOADED
    assert not first.HasField("targetModelStatus")
    assert ask(client, "my-vmodel") == 2.0
    with pytest.raises(grpc.RpcError, match="Model my-model has referents") as refused:
        manager.unregister("my-model")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    moved = manager.set_vmodel(
        "my-vmodel",
        "my-model-2",
        scale(root, 3),
        sync=True,
        expectedTargetModelId="my-model",
        autoDeleteTargetModel=True,
    )
    assert (moved.status, moved.activeModelId, moved.targetModelId) == (VStates.DEFINED, "my-model-2", "my-model-2")
    assert moved.activeModelStatus.status == States.LOADED
    assert ask(client, "my-vmodel") == 3.0
    # The first was not to be deleted with its last vmodel.
    assert manager.state("my-model") == "LOADED"
    again = manager.set_vmodel("my-vmodel", "my-model-2", scale(root, 3), sync=True)
    assert again == moved
    for name, expected in (("my-vmodel", "my-model"), ("another", "my-model")):
        with pytest.raises(grpc.RpcError) as refused:
            manager.set_vmodel(name, "my-model-3", scale(root, 4), expectedTargetModelId=expected)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "vmodel another not found" in refused.value.details()
    assert manager.state("my-model-3") == "NOT_FOUND"

    release = root / "release-3"
    slow = files(root, "my-model-3", SLOW_LOAD, settings=f"parameters: {{release: {release}}}")
    started = manager.set_vmodel("my-vmodel", "my-model-3", slow)
    for status in (started, manager.vmodel_status("my-vmodel")):
        assert (status.status, status.activeModelId, status.targetModelId) == (
            VStates.TRANSITIONING,
            "my-model-2",
            "my-model-3",
        )
        assert status.targetModelStatus.status == States.LOADING
    assert ask(client, "my-vmodel") == 3.0
    release.touch()
    ended = manager.set_vmodel("my-vmodel", "my-model-3", sync=True)
    assert (ended.status, ended.activeModelId) == (VStates.DEFINED, "my-model-3")
    assert ask(client, "my-vmodel") == 1.0
    assert manager.state("my-model-2") == "NOT_FOUND"

    manager.delete_vmodel("my-vmodel")
    assert manager.vmodel_status("my-vmodel") == pb.VModelStatusInfo()
    assert manager.state("my-model-3") == "LOADED"
    for model in ("my-model", "my-model-3"):
        manager.unregister(model)
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'my-vmodel' is not found"):
        ask(client, "my-vmodel")


def test_no_request_by_a_vmodels_name_is_lost_while_it_moves(mesh: Instance, manager: Manager, root: Path) -> None:
    manager.set_vmodel("moving", "moving-0", scale(root, 2), loadNow=True, sync=True, autoDeleteTargetModel=True)
    ended = threading.Event()

    def keep_asking() -> tuple[int, set[float]]:
        asked, seen = 0, set()
        with triton.InferenceServerClient(mesh.grpc) as client:
            while not ended.is_set():
                seen.add(ask(client, "moving"))
                asked += 1
        return asked, seen

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            for number in range(1, 21):
                moved = manager.set_vmodel(
                    "moving", f"moving-{number}", scale(root, 2 + number % 2), sync=True, autoDeleteTargetModel=True
                )
                assert moved.activeModelId == f"moving-{number}"
                assert manager.state(f"moving-{number - 1}") == "NOT_FOUND"
        finally:
            ended.set()
        for one in asking:
            asked, seen = one.result()
            assert asked > 20
            assert seen == {2.0, 3.0}
    manager.delete_vmodel("moving")
    assert manager.state("moving-20") == "NOT_FOUND"


def test_vmodels_have_owners(manager: Manager, root: Path) -> None:
    assert manager.set_vmodel("owned-by-none", "owned", scale(root, 2)).owner == ""
    assert manager.set_vmodel("owned", "owned", owner="me").owner == "me"
    assert manager.set_vmodel("owned", "owned", owner="me") == manager.set_vmodel("owned", "owned")
    with pytest.raises(grpc.RpcError, match="vmodel owned already exists with different owner 'me'") as refused:
        manager.set_vmodel("owned", "owned", owner="you")
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert manager.vmodel_status("owned", "you").status == VStates.NOT_FOUND
    assert manager.vmodel_status("owned", "me").status == VStates.DEFINED
    manager.delete_vmodel("owned", "you")
    assert manager.vmodel_status("owned").owner == "me"
    manager.delete_vmodel("owned", "me")
    assert manager.vmodel_status("owned").status == VStates.NOT_FOUND
    manager.delete_vmodel("owned-by-none")
    manager.unregister("owned")


def test_a_failed_transition_leaves_what_serves(
    manager: Manager, client: triton.InferenceServerClient, root: Path
) -> None:
    manager.set_vmodel("stays", "good", scale(root, 2), loadNow=True, sync=True)
    failed = manager.set_vmodel("stays", "bad", files(root, "bad", BROKEN), sync=True, autoDeleteTargetModel=True)
    assert (failed.status, failed.activeModelId) == (VStates.TRANSITION_FAILED, "good")
    assert failed.targetModelStatus.status == States.LOADING_FAILED
    assert failed.targetModelStatus.errors[0].endswith("the weights are missing")
    assert ask(client, "stays") == 2.0
    assert manager.set_vmodel("stays", "good").status == VStates.DEFINED
    assert manager.state("bad") == "NOT_FOUND"
    manager.delete_vmodel("stays")
    manager.unregister("good")


@pytest.fixture(scope="module")
def three(mesh: Instance, root: Path) -> None:
    with Manager(mesh.grpc) as manager:
        for factor in (2, 3, 4):
            manager.register(f"times-{factor}", scale(root, factor))
        manager.register("mal-ü", scale(root, 5))
        manager.set_vmodel("times", "times-2")


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("headers", "answers"),
    [
        ([("mm-model-id", "times-2")], [2.0]),
        ([("mm-model-id-bin", "mal-ü".encode())], [5.0]),
        ([("mm-vmodel-id", "times")], [2.0]),
        ([("mm-vmodel-id-bin", b"times")], [2.0]),
        ([("tas-model-id", "times-3"), ("mm-balanced", "true")], [3.0]),
        ([("mm-model-id", f"times-{factor}") for factor in (4, 2, 3)], [4.0, 2.0, 3.0]),
        ([("mm-model-id", f"times-{factor}") for factor in (2, 2, 2, 3, 3, 3)], [2.0] * 3 + [3.0] * 3),
        ([("mm-model-id", "absent"), ("mm-model-id", "times-3"), ("mm-model-id", "times")], [3.0]),
        ([("mm-vmodel-id", "times"), ("mm-vmodel-id", "times-3")], [2.0]),
    ],
)
def test_metadata_names_one_model_or_several(
    mesh: Instance, headers: list[tuple[str, str | bytes]], answers: list[float]
) -> None:
    for _ in range(2):
        assert values(call(mesh.grpc, message(), *headers)) == answers
    # A name in the message goes before the headers.
    assert values(call(mesh.grpc, message("times-4"), *headers)) == [4.0]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("headers", "code", "text"),
    [
        ([], "INVALID_ARGUMENT", "must include mm-model-id header"),
        ([("mm-model-id", "")], "INVALID_ARGUMENT", "provided model-id header must be non-empty"),
        (
            [("mm-model-id", "times-2"), ("mm-vmodel-id", "times")],
            "INVALID_ARGUMENT",
            "only one of model id and vmodel id",
        ),
        ([("mm-model-id", "absent")], "NOT_FOUND", "model not found"),
        ([("mm-vmodel-id", "times-2")], "NOT_FOUND", "vmodel not found"),
        ([("mm-model-id", "absent"), ("mm-model-id", "times")], "NOT_FOUND", "none of the requested models were found"),
        (
            [("mm-model-id", "absent"), ("mm-model-id", "times-2"), ("mm-required", "all")],
            "NOT_FOUND",
            "model not found",
        ),
    ],
)
def test_metadata_that_names_no_model(mesh: Instance, headers: list[tuple[str, str]], code: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(mesh.grpc, message(), *headers)
    assert refused.value.code().name == code
    assert text in refused.value.details()


@pytest.mark.usefixtures("three")
def test_an_error_of_one_of_several_models_is_the_answer(mesh: Instance, manager: Manager, root: Path) -> None:
    manager.register("fails-to-load", files(root, "fails-to-load", BROKEN))
    with pytest.raises(grpc.RpcError, match="the weights are missing") as refused:
        call(mesh.grpc, message(), ("mm-model-id", "times-2"), ("mm-model-id", "fails-to-load"))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.usefixtures("three")
def test_rest_knows_the_same_names(mesh: Instance) -> None:
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1], "data": [1.0]}]}).encode()
    for name, factor in (("times", 2.0), ("times-3", 3.0)):
        url = f"http://{mesh.ready['rest']}/v2/models/{name}"
        with urllib.request.urlopen(f"{url}/infer", body, timeout=15) as answer:
            assert json.load(answer)["outputs"][0]["data"] == [factor]
        with urllib.request.urlopen(f"{url}/ready", timeout=15) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{mesh.ready['rest']}/v2/models/absent/infer", body, timeout=15)


@pytest.mark.usefixtures("three")
def test_streams_are_named_by_their_metadata_too(mesh: Instance) -> None:
    request = message()
    with grpc.insecure_channel(mesh.grpc) as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=lambda body: body,
            response_deserializer=inference_pb2.ModelStreamInferResponse.FromString,
        )
        answers = list(stream(iter([request] * 3), metadata=[("mm-vmodel-id", "times")], timeout=15))
    assert [values(one.infer_response) for one in answers] == [[2.0]] * 3


def dataplane(serve: Serve, folder: Path, root: Path, config: dict[str, Any]) -> tuple[Instance, Path]:
    file = folder / "dataplane.json"
    file.write_text(json.dumps(config))
    instance = serve(None, "--dataplane-config", str(file), "--model-cache", str(root / "cache"))
    with Manager(instance.grpc) as manager:
        for factor in (2, 3):
            manager.register(f"times-{factor}", scale(root, factor))
        manager.set_vmodel("times", "times-3")
    return instance, file


SERVICE = "inference.GRPCInferenceService"


def test_ids_are_found_where_the_configuration_says(serve: Serve, tmp_path: Path, root: Path) -> None:
    """The id's path is given as the request's own id, field 3, so that it is not found in the usual place by chance."""
    config = {"rpcConfigs": {f"{SERVICE}/ModelInfer": {"idExtractionPath": [3]}}, "allowOtherRpcs": True}
    instance, file = dataplane(serve, tmp_path, root, config)
    body = inference_pb2.ModelInferRequest.FromString(message())
    assert values(call(instance.grpc, body.SerializeToString(), ("mm-model-id", "times-2"))) == [2.0]
    body.id = "times-3"
    assert values(call(instance.grpc, body.SerializeToString())) == [3.0]
    # An id in the body goes before a conflicting header, and is a model's.
    assert values(call(instance.grpc, body.SerializeToString(), ("mm-model-id", "times-2"))) == [3.0]
    body.id = "times"
    with pytest.raises(grpc.RpcError, match="model not found: times"):
        call(instance.grpc, body.SerializeToString())
    with triton.InferenceServerClient(instance.grpc) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("times")

    # Read again when it changes: the id is a vmodel's now, and other methods are refused.
    file.write_text(json.dumps({"rpcConfigs": {f"{SERVICE}/ModelInfer": {"idExtractionPath": [3], "vModelId": True}}}))
    deadline = time.monotonic() + 15
    while True:
        try:
            assert values(call(instance.grpc, body.SerializeToString())) == [3.0]
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline
    body.id = "times-3"
    with pytest.raises(grpc.RpcError, match="vmodel not found: times-3"):
        call(instance.grpc, body.SerializeToString())
    with triton.InferenceServerClient(instance.grpc) as client:
        for refused in (
            client.is_server_ready,
            lambda: client.is_model_ready("times"),
            client.get_model_repository_index,
        ):
            with pytest.raises(InferenceServerException, match="Method not found or not permitted"):
                refused()
    with Manager(instance.grpc) as manager:
        assert manager.state("times-3") == "LOADED"
