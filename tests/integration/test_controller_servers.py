"""Servers beside instances, by the runtimes that are shipped: the archived release's tests of what they answer.

The numbers in the comments are those of its suite. Its models for TensorFlow, Keras and TorchScript go to instances
themselves here (``test_controller_frameworks.py``). Of Triton only the Python backend can be had: LightGBM's library in
it stands for the FIL backend. OVMS cannot be had at all: OpenVINO behind its interfaces stands for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
import sysconfig
import urllib.request
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost
import yaml
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from bench.environments import mlserver, site_packages, triton
from bench.peers.served import free_ports
from bench.peers.triton import remove_regions
from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.controller.objects import POD, PREDICTOR, Object, at
from mmcore.errors import RpcError, Status
from mmcore.transport import Channel
from tests import predict_messages
from tests.clusters import Cluster, failed, predictor, runtime, state
from tests.etcds import free_port
from tests.framework_models import openvino_model, rows
from tests.integration.test_controller_models import LABELS, ROWS, sklearn_file
from tests.pods import Program
from tests.serving import ROOT
from tests.toy_processes import request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WITHIN_S = 120.0
INFER = "/inference.GRPCInferenceService/ModelInfer"
TRITON_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(one, "X").as_numpy() for one in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", one * FACTOR)]) for one in inputs]
"""
TRITON_CONFIG = """
backend: "python" max_batch_size: 0
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
"""
TREES_MODEL = """
import os

import lightgbm
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        file = os.path.join(args["model_repository"], args["model_version"], "model.txt")
        self.trees = lightgbm.Booster(model_file=file)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(one, "input__0").as_numpy() for one in requests]
        answers = [self.trees.predict(one).astype("float32").reshape(-1, 1) for one in inputs]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output__0", one)]) for one in answers]
"""
TREES_CONFIG = """
backend: "python" max_batch_size: 8192
input [ { name: "input__0" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "output__0" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""


def shipped(name: str) -> Object:
    """A runtime as it is shipped, with ports that are free here, for a namespace."""
    text = (ROOT / f"deploy/runtimes/cluster/{name}.yaml").read_text()
    ports = sorted(set(re.findall(r"\b8(?:00[0-9]|888)\b", text)))
    for port, free in zip(ports, free_ports(len(ports)), strict=True):
        text = text.replace(port, str(free))
    item: Object = yaml.safe_load(text)
    return {**item, "kind": "ServingRuntime"}


def mlserver_image() -> Program:
    program = mlserver(Console()) / "bin/mlserver"
    # The release that can be installed here starts no worker processes on the newest uvloop.
    env = {"OMP_NUM_THREADS": "1", "MLSERVER_PARALLEL_WORKERS": "0"}
    return Program(["/bin/sh", "-c", f'exec {shlex.quote(str(program))} start "$MLSERVER_MODELS_DIR"'], env)


def triton_image(folder: Path, regions: str) -> Program:
    environment = triton(Console())
    packages = site_packages(environment)
    bundled = packages / "pytriton" / "tritonserver"
    # What NVIDIA's image has in its own places.
    places = [
        f"--backend-directory={environment / 'backends'}", f"--cache-directory={bundled / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name={regions}", "--allow-metrics=false", "--exit-timeout-secs=1",
    ]  # fmt: skip
    program = folder / "bin/tritonserver"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([str(bundled / "bin/tritonserver"), *places])} "$@"\n')
    program.chmod(0o755)
    env = {
        "PATH": f"{program.parent}:{environment / 'bin'}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    }
    return Program((), env)


def ovms_program(folder: Path) -> Path:
    """What stands for OVMS, started by the server's own options."""
    program = folder / "bin/ovms"
    program.write_text(
        f"""#!/bin/sh
for option; do case $option in
    --config_path=*) config=${{option#*=}} ;; --port=*) grpc=${{option#*=}} ;; --rest_port=*) rest=${{option#*=}} ;;
esac; done
cd {ROOT} && exec {sys.executable} -m tests.ovms_server 127.0.0.1:$grpc 127.0.0.1:$rest $config
"""
    )
    program.chmod(0o755)
    return program


def write_models(models: Path) -> dict[str, Any]:
    """The models; what those of rows say of all of them, by the names of their Predictors."""
    (models / "svm").mkdir()
    (models / "svm/model.joblib").write_bytes(sklearn_file(LABELS))
    (models / "trees").mkdir()
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(ROWS, LABELS), 4)
    booster.save_model(models / "trees/model.json")
    (models / "boosted").mkdir()
    options = {"objective": "binary", "verbose": -1, "min_data_in_leaf": 1, "num_threads": 1}
    boosted = lightgbm.train(options, lightgbm.Dataset(ROWS, LABELS), 4)
    boosted.save_model(models / "boosted/model.bst")
    for factor in (2, 3):
        folder = models / f"times-{factor}"
        (folder / "1").mkdir(parents=True)
        (folder / "1/model.py").write_text(TRITON_MODEL.replace("FACTOR", str(factor)))
        (folder / "config.pbtxt").write_text(TRITON_CONFIG)
    (models / "fil/1").mkdir(parents=True)
    boosted.save_model(models / "fil/1/model.txt")
    (models / "fil/1/model.py").write_text(TREES_MODEL)
    (models / "fil/config.pbtxt").write_text(TREES_CONFIG)
    svm = LogisticRegression().fit(ROWS, LABELS)
    return {
        "sk": svm.predict(ROWS), "xgb": booster.predict(xgboost.DMatrix(ROWS)), "lgb": boosted.predict(ROWS)
    }  # fmt: skip


async def refused(cluster: Cluster, name: str, rows: Any, given: str = "X") -> str:
    with pytest.raises(RpcError) as error:
        await cluster.ask(name, rows, name=given)
    return error.value.details


async def test_servers_beside_instances_answer_as_they_do(cluster: Cluster, tmp_path: Path) -> None:
    regions = f"mmcore_cluster_{os.getpid()}_"
    programs = {"mlserver": mlserver_image(), "triton": triton_image(tmp_path, regions), "ovms": Program()}
    cluster.kubelet.programs = programs
    expected = write_models(cluster.models)
    try:
        await servers(cluster, expected, ovms_program(tmp_path))
    finally:
        await cluster.stop_controller()
        remove_regions(regions)


async def servers(cluster: Cluster, expected: dict[str, Any], ovms: Path) -> None:
    for name in ("mlserver", "triton"):
        await cluster.apply(shipped(name))
    model_server = shipped("ovms")
    [container] = model_server["spec"]["containers"]
    container["args"] = [text.replace("/ovms/bin/ovms", str(ovms)) for text in container["args"]]
    await cluster.apply(model_server)
    await cluster.apply(runtime("own", "python"))
    digits = openvino_model(cluster.models)
    for name, path, kind in (("sk", "svm", "sklearn"), ("xgb", "trees", "xgboost"), ("lgb", "boosted", "lightgbm")):
        await cluster.apply(predictor(name, path, model_type=kind))
    await cluster.apply(predictor("times", "times-2", model_type="any", runtime={"name": "triton-2.x"}))
    await cluster.apply(predictor("fil", "fil", model_type="lightgbm", runtime={"name": "triton-2.x"}))
    await cluster.apply(predictor("ir", "openvino", model_type="openvino_ir", protocolVersion="grpc-v1"))
    await cluster.apply(predictor("scale", "scale-2"))
    for name in ("sk", "xgb", "lgb", "times", "fil", "ir", "scale"):
        status = (await cluster.until(PREDICTOR, name, state("Loaded"), within_s=WITHIN_S))["status"]
        assert (status["available"], status["transitionStatus"]) == (True, "UpToDate")

    # P18: over gRPC and REST, with the server's own words for what it cannot take, and metadata.
    # P19, P23
    for name, answers in expected.items():
        assert np.allclose((await cluster.ask(name, ROWS, name="predict")).ravel(), answers)
    base = f"http://{await cluster.instance()}:{cluster.rest_port}/v2/models/sk"
    body = {"inputs": [{"name": "predict", "shape": [1, 4], "datatype": "FP32", "data": ROWS[0].tolist()}]}
    found = await asyncio.to_thread(read, f"{base}/infer", json.dumps(body).encode())
    assert (found["model_name"], found["outputs"][0]["data"]) == ("sk", [int(expected["sk"][0])])
    assert "features" in await refused(cluster, "sk", ROWS[:, :2], "predict")
    assert (await asyncio.to_thread(read, base))["name"] == "sk"
    # P24
    boosted = (await cluster.ask("fil", ROWS, name="input__0")).ravel()
    assert np.allclose(boosted, expected["lgb"], rtol=1e-5)
    assert "input__0" in await refused(cluster, "fil", ROWS[:, :2], "input__0")
    # P16: by the name of the Predictor in the server's own protocol, at any pod, also at those whose models are not
    # asked by it.
    pods = [pod["status"]["podIP"] for pod in (await cluster.api.list(POD, cluster.namespace))[0]]
    assert len(pods) == 4
    for address in pods:
        answer = await predict(cluster, address, "ir", Input3=rows("openvino"))
        assert np.allclose(answer, digits, rtol=1e-4, atol=1e-4)
        with pytest.raises(RpcError) as error:
            await predict(cluster, address, "ir", Input3=rows("openvino")[0])
        assert error.value.status is Status.INVALID_ARGUMENT
        assert error.value.details.startswith("Invalid number of shape dimensions")
        for name in ("scale", "times"):
            with pytest.raises(RpcError) as error:
                await predict(cluster, address, name, X=ROWS[:1])
            assert error.value.status is Status.UNIMPLEMENTED
    # P20: a model that names the runtime, by its own configuration.
    # Whichever instance is asked: what the other one passes on comes by the Predictor's name.
    for pod in (await cluster.api.list(POD, cluster.namespace))[0]:
        channel = Channel(f"{pod['status']['podIP']}:{cluster.grpc_port}")
        try:
            body = await channel.unary(INFER, encode_infer_request("times", [("X", "FP32", ROWS[:2])]), timeout_s=20)
        finally:
            await channel.close()
        assert decode_infer_response(body).outputs[0].array().tolist() == (ROWS[:2] * 2).tolist()
    assert "unexpected shape for input 'X'" in await refused(cluster, "times", ROWS[:2, :3])

    # P4, P5: another model, and then one that is none.
    await cluster.apply(predictor("times", "times-3", model_type="any", runtime={"name": "triton-2.x"}))
    done = lambda one: one["status"].get("observedGeneration") == 2 and state("Loaded")(one)  # noqa: E731
    await cluster.until(PREDICTOR, "times", done)
    assert (await cluster.ask("times", ROWS[:1])).tolist() == (ROWS[:1] * 3).tolist()
    await cluster.apply(predictor("times", "svm", model_type="any", runtime={"name": "triton-2.x"}))
    status = (await cluster.until(PREDICTOR, "times", state("Loaded", "FailedToLoad")))["status"]
    assert status["available"] and status["lastFailureInfo"]["reason"] == "ModelLoadFailed"
    assert (await cluster.ask("times", ROWS[:1])).tolist() == (ROWS[:1] * 3).tolist()
    # P11: in place, to a model of another server.
    await cluster.apply(predictor("times", "svm", model_type="sklearn"))
    await cluster.until(PREDICTOR, "times", lambda one: state("Loaded")(one) and not failed("ModelLoadFailed")(one))
    assert np.array_equal((await cluster.ask("times", ROWS, name="predict")).ravel(), expected["sk"])


async def predict(cluster: Cluster, address: str, name: str, **inputs: Any) -> Any:
    """The only output of TensorFlow Serving's Predict, asked for at one pod."""
    request = predict_messages.Request()
    request.model_spec.name = name
    predict_messages.fill(request.inputs, **inputs)
    channel = Channel(f"{address}:{cluster.grpc_port}")
    try:
        body = await channel.unary(predict_messages.METHOD, request.SerializeToString(), timeout_s=20)
    finally:
        await channel.close()
    [answer] = predict_messages.arrays(predict_messages.Response.FromString(body).outputs).values()
    return answer


def read(url: str, body: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as answer:
        return json.loads(answer.read())


async def test_limits_of_loads_and_requests_hold_for_the_server(cluster: Cluster) -> None:
    """It is the toy, which says other limits of itself."""
    address = f"127.0.0.1:{free_port()}"
    cluster.kubelet.programs = {"toy": Program([sys.executable], {"PYTHONPATH": str(ROOT)})}
    said = json.dumps({"loads": 1, "load_ms": 60_000, "limit": 4})
    container = {
        "name": "toy", "image": "toy", "command": ["-m", "tests.toy_runtime"], "args": [address, said],
        "resources": {"limits": {"memory": "1Gi"}},
    }  # fmt: skip
    item: Object = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {
            "name": "toy",
            "annotations": {"perModelConcurrencyLimit": "1", "maxLoadingConcurrency": "3"},
        },
        "spec": {
            "multiModel": True,
            "supportedModelFormats": [{"name": "onnx", "autoSelect": True}],
            "protocolVersions": ["grpc-v2"],
            "grpcEndpoint": f"port:{address.rpartition(':')[2]}",
            "builtInAdapter": {"modelLoadingTimeoutMillis": 700},
            "containers": [container],
        },
    }
    names = ("m-sleepy", "a-slow", "b-slow", "c-slow", "s-waits")
    for name in names:
        (cluster.models / f"{name}.onnx").write_bytes(b"weights")
    await cluster.apply(item)
    for name in names:
        await cluster.apply(predictor(name, f"{name}.onnx", model_type="onnx"))
    for name in names[:-1]:
        await cluster.until(PREDICTOR, name, state("Loaded"))
    found = await cluster.until(PREDICTOR, "s-waits", failed("ModelLoadFailed"))
    assert at(found, "status", "lastFailureInfo", "message") == "the runtime did not load it within 0.7 s"

    [pod] = (await cluster.api.list(POD, cluster.namespace))[0]
    front, toy = Channel(f"{pod['status']['podIP']}:{cluster.grpc_port}"), Channel(address)
    try:
        asked = [front.unary(INFER, request("m-sleepy"), timeout_s=15) for _ in range(6)]
        await asyncio.gather(*asked)
        journal = (await toy.unary("/toy.Toy/Journal", b"", timeout_s=10)).decode().splitlines()
    finally:
        await front.close()
        await toy.close()
    assert journal[-1] == "most 1"
    # More than the one that it says itself; that all three come together is not certain.
    assert journal[-2] in ("most loading 2", "most loading 3")
