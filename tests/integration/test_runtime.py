"""``mmcore runtime``: what a mesh tells it to hold it holds, and nothing else; and `mmcore serve` is such a mesh."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import joblib
import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
import xgboost
from onnx import TensorProto, helper
from sklearn.linear_model import LogisticRegression

from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as mesh_pb
from tests.management import BROKEN, SCALE, SLOW_LOAD, Manager
from tests.runtime_processes import HeldProcess, Mesh, Status
from tests.serving import Instance, Serve, write_model

pytestmark = pytest.mark.slow

ROWS = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]] * 10, dtype=np.float32)
LABELS = np.array([0, 1, 1, 0] * 10)
MIB = 2**20

LARGE = """
class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def load(self, path, parameters):
        self.weights = b"x" * (200 * 2**20)

    def predict(self, inputs):
        return {"Y": inputs["X"]}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each of three formats."""
    folder = tmp_path_factory.mktemp("models")
    joblib.dump(LogisticRegression().fit(ROWS, LABELS), folder / "model.joblib")
    booster = xgboost.train({"objective": "binary:logistic", "min_child_weight": 0}, xgboost.DMatrix(ROWS, LABELS), 3)
    booster.save_model(folder / "model.json")
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("X", "Y")]
    graph = helper.make_graph([helper.make_node("Neg", ["X"], ["Y"])], "neg", [tensors[0]], [tensors[1]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "neg.onnx")
    return folder


FORMATS = {"sk": ("sklearn", "model.joblib"), "xgb": ("xgboost", "model.json"), "neg": ("onnx", "neg.onnx")}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldProcess]:
    """One for all tests: each begins with the question for its status, which empties it."""
    folder = tmp_path_factory.mktemp("runtime")
    process = HeldProcess(folder / "runtime.log", "--grpc-port", "0", "--uds", folder / "r.sock", "--capacity", "1GiB")
    process.start()
    assert "metrics" in process.ready  # tests/serving.py asks for the port
    yield process
    process.kill()


@pytest.fixture
def mesh(held: HeldProcess) -> Iterator[Mesh]:
    mesh = Mesh(held.ready["grpc"])
    assert Status.Name(mesh("runtimeStatus").status) == "READY"
    yield mesh
    mesh.close()


def infer(mesh: Mesh, model: str, value: float = 2.0) -> float:
    request = inference_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="X", datatype="FP32", shape=[1])
    tensor.contents.fp32_contents.append(value)
    call = mesh.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer = inference_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=20))
    return answer.outputs[0].contents.fp32_contents[0]


def held_bytes(process: HeldProcess) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


# What it says and obeys.


def test_it_says_what_it_takes_on_both_its_addresses(held: HeldProcess, mesh: Mesh) -> None:
    for client in (mesh, Mesh(f"unix:{held.ready['uds']}")):
        said = client("runtimeStatus")
        assert Status.Name(said.status) == "READY"
        assert (said.capacityInBytes, said.maxLoadingConcurrency, said.modelLoadingTimeoutMs) == (2**30, 2, 90_000)
        assert list(said.methodInfos["inference.GRPCInferenceService/ModelInfer"].idInjectionPath) == [1]
        assert not said.allowAnyMethod
        client.close()
    assert held.end() == 0
    held.start()


def test_a_model_answers_from_its_load_to_its_unload_and_is_never_loaded_unasked(mesh: Mesh, tmp_path: Path) -> None:
    path = write_model(tmp_path, "m", SCALE.replace("FACTOR", "3"))
    with pytest.raises(grpc.RpcError) as error:
        infer(mesh, "m")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    size = mesh.load("m", "python", path, '{"disk_size_bytes": 7, "more": 1}')
    assert 0 < size == mesh("modelSize", modelId="m").sizeInBytes < MIB
    assert infer(mesh, "m") == 6
    assert mesh.load("m", "python", path, '{"disk_size_bytes": 7, "more": 1}') == size
    mesh.unload("m")
    mesh.unload("m")
    with pytest.raises(grpc.RpcError) as error:
        infer(mesh, "m")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert mesh.refusal("modelSize", modelId="m")[0] is grpc.StatusCode.NOT_FOUND


def test_a_mesh_that_asks_for_the_status_finds_no_models(mesh: Mesh, tmp_path: Path) -> None:
    path = write_model(tmp_path, "m", SCALE.replace("FACTOR", "3"))
    mesh.load("m", "python", path)
    assert Status.Name(mesh("runtimeStatus").status) == "READY"
    assert mesh.refusal("modelSize", modelId="m")[0] is grpc.StatusCode.NOT_FOUND


def test_an_unload_is_answered_when_the_memory_has_been_given_back(
    held: HeldProcess, mesh: Mesh, tmp_path: Path
) -> None:
    before = held_bytes(held)
    mesh.load("m", "python", write_model(tmp_path, "m", LARGE))
    assert held_bytes(held) - before > 190 * MIB
    mesh.unload("m")
    assert held_bytes(held) - before < 100 * MIB


def test_a_cancelled_load_leaves_nothing_and_its_unload_waits_for_the_framework(mesh: Mesh, tmp_path: Path) -> None:
    release = tmp_path / "release"
    began = tmp_path / "began"
    source = f"open({str(began)!r}, 'w').close()\n" + SLOW_LOAD
    path = write_model(tmp_path, "m", source, settings=f"parameters: {{release: {release}}}\n")
    load = mesh.future("loadModel", modelId="m", modelType="python", modelPath=str(path))
    ends_at = time.monotonic() + 20
    while not began.exists():
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    load.cancel()
    unload = mesh.future("unloadModel", modelId="m")
    with pytest.raises(grpc.FutureTimeoutError):
        unload.result(timeout=0.2)
    release.touch()
    unload.result()
    assert mesh.refusal("modelSize", modelId="m")[0] is grpc.StatusCode.NOT_FOUND
    # A new load begins anew.
    assert mesh.load("m", "python", path) > 0


def test_a_failed_load_says_why_and_can_be_tried_again_at_once(mesh: Mesh, tmp_path: Path) -> None:
    path = write_model(tmp_path / "a", "m", BROKEN)
    code, text = mesh.refusal("loadModel", modelId="m", modelType="python", modelPath=str(path))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "the weights are missing" in text
    fine = write_model(tmp_path / "b", "m", SCALE.replace("FACTOR", "3"))
    assert mesh.load("m", "python", fine) > 0


@pytest.mark.parametrize(("fields", "code", "text"), [
    ({"modelPath": "/nowhere"}, "INVALID_ARGUMENT", "modelId is missing"),
    ({"modelId": "m", "modelPath": "relative"}, "INVALID_ARGUMENT", "absolute"),
    ({"modelId": "m", "modelPath": "/nowhere/at/all"}, "FAILED_PRECONDITION", "/nowhere/at/all does not exist"),
    ({"modelId": "m", "modelPath": "/etc", "modelKey": "{"}, "FAILED_PRECONDITION", "not JSON"),
    ({"modelId": "m", "modelPath": "/etc/hostname", "modelType": "mt:pmml"}, "FAILED_PRECONDITION", "pmml"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_refused(mesh: Mesh, fields: dict[str, str], code: str, text: str) -> None:
    refused, said = mesh.refusal("loadModel", **fields)
    assert (refused.name, text in said) == (code, True), said


def test_another_model_of_the_same_id_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    mesh.load("m", "python", write_model(tmp_path / "a", "m", SCALE.replace("FACTOR", "3")))
    other = write_model(tmp_path / "b", "m", SCALE.replace("FACTOR", "4"))
    code, _ = mesh.refusal("loadModel", modelId="m", modelType="python", modelPath=str(other))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert infer(mesh, "m") == 6


def test_a_models_size_is_told_before_it_is_loaded_and_better_afterwards(mesh: Mesh, models: Path) -> None:
    fields = {"modelId": "sk", "modelType": "mt:sklearn", "modelPath": str(models / "model.joblib")}
    first = mesh("predictModelSize", **fields).sizeInBytes
    assert first >= (models / "model.joblib").stat().st_size
    size = mesh("loadModel", **fields).sizeInBytes
    assert mesh("predictModelSize", **fields).sizeInBytes == size


def test_a_models_own_idle_timeout_is_not_looked_at(mesh: Mesh, tmp_path: Path) -> None:
    path = write_model(tmp_path, "m", SCALE.replace("FACTOR", "3"), settings="idle_timeout: 100ms\n")
    mesh.load("m", "python", path)
    ends_at = time.monotonic() + 1.5  # the cache looks every half second
    while time.monotonic() < ends_at:
        assert mesh("modelSize", modelId="m").sizeInBytes > 0
        time.sleep(0.1)


def test_it_is_watched_by_a_port_of_its_own(held: HeldProcess, mesh: Mesh, tmp_path: Path) -> None:
    def read(path: str) -> str:
        with urllib.request.urlopen(f"http://{held.ready['metrics']}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    mesh.load("m", "python", write_model(tmp_path, "m", SCALE.replace("FACTOR", "3")))
    infer(mesh, "m")
    assert read("/live") == '{"live":true}'
    assert read("/ready") == '{"ready": true}'
    told = dict(line.rsplit(" ", 1) for line in read("/metrics").splitlines() if not line.startswith("#"))
    assert float(told["mmcore_capacity_bytes"]) == 2**30
    assert told['mmcore_models{state="resident"}'] == "1"
    assert float(told['mmcore_inference_requests_total{outcome="success"}']) >= 1
    assert 'mmcore_pulls_total{outcome="pulled"}' not in told
    assert json.loads(read("/debug/state"))["loaded"][0]["model"] == "m"


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_clients_of_inference_load_and_unload_nothing(mesh: Mesh, tmp_path: Path, method: str) -> None:
    mesh.load("m", "python", write_model(tmp_path, "m", SCALE.replace("FACTOR", "3")))
    request = getattr(inference_pb2, f"{method}Request")(model_name="m").SerializeToString()
    with pytest.raises(grpc.RpcError) as error:
        mesh.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(request, timeout=20)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "by the mesh alone" in error.value.details()
    assert infer(mesh, "m") == 6


# Under `mmcore serve`.


class Front:
    """An instance before the runtime."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.manager = Manager(instance.grpc)
        self.grpc = tritonclient.grpc.InferenceServerClient(instance.grpc)

    def register(self, models: Path) -> None:
        for name, (kind, file) in FORMATS.items():
            self.manager.register(name, mesh_pb.ModelInfo(type=f"mt:{kind}:1", path=str(models / file)))

    def infer(self, name: str, client: Any = None, kind: Any = tritonclient.grpc) -> Any:
        tensor = kind.InferInput("X", [4, 2], "FP32")
        tensor.set_data_from_numpy(ROWS[:4])
        result = (client or self.grpc).infer(name, [tensor])
        (output,) = result.get_response()["outputs"] if kind is tritonclient.http else result.get_response().outputs
        return result.as_numpy(output["name"] if kind is tritonclient.http else output.name)

    def check(self, name: str, answer: Any) -> None:
        expected = {"sk": LABELS[:4], "xgb": LABELS[:4], "neg": -ROWS[:4]}[name]
        np.testing.assert_array_equal(np.round(answer).reshape(expected.shape), expected)

    def close(self) -> None:
        self.grpc.close()
        self.manager.__exit__()


@pytest.fixture
def front(serve: Serve, held: HeldProcess) -> Iterator[Front]:
    front = Front(serve(None, "--runtime", f"unix:{held.ready['uds']}", "--min-residency", "0"))
    yield front
    front.close()


def test_an_instance_serves_three_formats_from_it_to_real_clients(front: Front, models: Path) -> None:
    front.register(models)
    rest = tritonclient.http.InferenceServerClient(front.instance.rest)
    for name in FORMATS:
        front.check(name, front.infer(name))
        front.check(name, front.infer(name, rest, tritonclient.http))
        metadata = front.grpc.get_model_metadata(name)
        assert (metadata.name, [one.datatype for one in metadata.inputs]) == (name, ["FP32"])
        assert front.grpc.get_model_config(name).config.name == name
    rest.close()


def test_the_instance_evicts_from_it_and_each_model_comes_back(serve: Serve, held: HeldProcess, tmp_path: Path) -> None:
    runtime = f"unix:{held.ready['uds']}"
    flags = ("--min-residency", "0", "--eviction", "lru", "--capacity", "500MiB")
    instance = serve(None, "--runtime", runtime, *flags)
    before = held_bytes(held)
    with Manager(instance.grpc) as manager, tritonclient.grpc.InferenceServerClient(instance.grpc) as client:
        for name in ("a", "b", "c"):
            path = write_model(tmp_path / "large", name, LARGE, settings=f"size_bytes: {220 * MIB}\n")
            manager.register(name, mesh_pb.ModelInfo(type="python", path=str(path)))
        for name in ("a", "b", "c", "a", "b", "c"):
            tensor = tritonclient.grpc.InferInput("X", [1], "FP32")
            tensor.set_data_from_numpy(np.ones(1, np.float32))
            assert client.infer(name, [tensor]).as_numpy("Y") == 1
            assert held_bytes(held) - before < 560 * MIB
        states = [manager.state(name) for name in ("a", "b", "c")]
    assert states == ["NOT_LOADED", "LOADED", "LOADED"]


def test_it_is_killed_under_load_and_started_again_and_every_request_is_answered(
    front: Front, held: HeldProcess, models: Path
) -> None:
    front.register(models)
    for name in FORMATS:
        front.infer(name)
    stop = threading.Event()

    def ask(name: str) -> int:
        count = 0
        with tritonclient.grpc.InferenceServerClient(front.instance.grpc) as client:
            while not stop.is_set():
                front.check(name, front.infer(name, client))
                count += 1
        return count

    with futures.ThreadPoolExecutor(len(FORMATS)) as pool:
        asking = [pool.submit(ask, name) for name in FORMATS]
        try:
            held.kill()
            held.start()
            ends_at = time.monotonic() + 60
            while [front.manager.state(name) for name in FORMATS] != ["LOADED"] * len(FORMATS):
                assert time.monotonic() < ends_at, front.instance.log_text()
                time.sleep(0.05)
        finally:
            stop.set()
        assert all(one.result(timeout=60) > 0 for one in asking)


def test_it_lets_its_models_go_when_the_instance_ends(front: Front, mesh: Mesh, models: Path) -> None:
    front.register(models)
    front.infer("neg")
    assert mesh("modelSize", modelId="neg").sizeInBytes > 0
    front.instance.signal()
    assert front.instance.wait() == 0
    assert mesh.refusal("modelSize", modelId="neg")[0] is grpc.StatusCode.NOT_FOUND


def test_schema_and_key_reach_it(front: Front, models: Path, tmp_path: Path) -> None:
    schema = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [4, 2]}]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    key = {"storage_params": {"type": "local"}, "schema_path": str(tmp_path / "schema.json")}
    front.manager.register("neg", mesh_pb.ModelInfo(type="onnx", path=str(models / "neg.onnx"), key=json.dumps(key)))
    front.check("neg", front.infer("neg"))
    assert list(front.grpc.get_model_metadata("neg").inputs[0].shape) == [4, 2]
