"""The runtimes of ``deploy/runtimes`` for other servers: both containers of a pod, started as the manifests say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import joblib
import numpy as np
import pytest
import yaml
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from bench.environments import mlserver, site_packages, torchserve, triton
from bench.peers.served import free_ports
from mmcore.controller.deployment import Place, deployment
from mmcore.controller.objects import CLUSTER_SERVING_RUNTIME, Object
from mmcore.controller.runtimes import Runtime
from mmcore.controller.serving_config import ServingConfig
from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as pb
from tests.management import Manager
from tests.pods import beside, instance_of, mounted, variables
from tests.serving import ROOT, Serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROWS = np.array([[0.0, 1.0], [1.0, 0.0]] * 10, dtype=np.float32)

DOUBLE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(one, "X").as_numpy() for one in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", one * 2)]) for one in inputs]
"""
DOUBLE_CONFIG = """
backend: "python" max_batch_size: 0
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1, 2 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1, 2 ] } ]
"""


@dataclass
class Pod:
    """A pod's manifest with ports that are free here, and the folders of its mounts."""

    manifest: Object
    folders: dict[str, Path]
    started: list[subprocess.Popen[bytes]]

    def start_server(self, name: str, image: list[str], log: Path, **env: str) -> None:
        """Start the other server; ``image`` is what its image would start with where the manifest names no command."""
        line, stated = beside(self.manifest, name, self.folders)
        with log.open("wb") as file:
            process = subprocess.Popen(
                image + line, stdout=file, stderr=file, env={**os.environ, **stated, **env}, start_new_session=True
            )
        self.started.append(process)

    def instance_address(self) -> str:
        return variables(instance_of(self.manifest), self.folders, "127.0.0.1")["MMCORE_RUNTIME"]


@pytest.fixture
def pod(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pod]:
    """Of the runtime in the file that the test's parameter names."""
    file = ROOT / f"deploy/runtimes/cluster/{request.param}.yaml"
    text = file.read_text()
    ports = sorted(set(re.findall(r"\b(?:8[08][08]\d|707\d)\b", text)))
    for port, free in zip(ports, free_ports(len(ports)), strict=True):
        text = text.replace(port, str(free))
    # A container has a /tmp of its own.
    text = text.replace("/tmp/", f"{tmp_path}/")
    item = yaml.safe_load(text)
    item["metadata"]["uid"] = "1"
    runtime = Runtime.of(item, CLUSTER_SERVING_RUNTIME)
    made = deployment(runtime, ServingConfig(), Place("models", "etcd"), 1)
    started: list[subprocess.Popen[bytes]] = []
    yield Pod(made, mounted(made, tmp_path / "pod", {"tc-config": {}, "etcd": {}}), started)
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def infer(target: str, name: str) -> inference_pb2.ModelInferResponse:
    request = inference_pb2.ModelInferRequest(model_name=name, raw_input_contents=[ROWS.tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=ROWS.shape)
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return inference_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=90))


@pytest.mark.parametrize("pod", ["mlserver"], indirect=True)
def test_mlserver_beside_an_instance(pod: Pod, serve: Serve, tmp_path: Path) -> None:
    program = mlserver(Console()) / "bin/mlserver"
    models = pod.folders["models-dir"] / "_mlserver_models"
    # The release that can be installed here starts no worker processes on the newest uvloop.
    env = {"OMP_NUM_THREADS": "1", "MLSERVER_PARALLEL_WORKERS": "0"}
    pod.start_server("mlserver", [str(program), "start", str(models)], tmp_path / "log", **env)
    joblib.dump(LogisticRegression().fit(ROWS, ROWS[:, 0] > 0.5), tmp_path / "model.joblib")
    instance = serve(None, "--runtime", pod.instance_address(), "--capacity", "1GiB")
    with Manager(instance.grpc) as manager:
        manager.register("m", pb.ModelInfo(type="mt:sklearn:0", path=str(tmp_path / "model.joblib")))
        [output] = infer(instance.grpc, "m").outputs
    assert output.name == "predict" and list(output.shape) == [len(ROWS), 1]
    assert models.is_dir()


@pytest.mark.parametrize("pod", ["triton"], indirect=True)
def test_triton_beside_an_instance(pod: Pod, serve: Serve, tmp_path: Path) -> None:
    environment = triton(Console())
    packages = site_packages(environment)
    bundled = packages / "pytriton" / "tritonserver"
    # What NVIDIA's image has in its own places.
    places = [
        f"--backend-directory={environment / 'backends'}", f"--cache-directory={bundled / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name=mmcore_shipped_{os.getpid()}_", "--allow-metrics=false",
        "--exit-timeout-secs=1",
    ]  # fmt: skip
    program = tmp_path / "bin/tritonserver"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([str(bundled / "bin/tritonserver"), *places])} "$@"\n')
    program.chmod(0o755)
    pod.start_server(
        "triton", [], tmp_path / "log",
        PATH=f"{program.parent}:{environment / 'bin'}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="",
        LD_LIBRARY_PATH=f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    )  # fmt: skip
    (tmp_path / "model/1").mkdir(parents=True)
    (tmp_path / "model/1/model.py").write_text(DOUBLE)
    (tmp_path / "model/config.pbtxt").write_text(DOUBLE_CONFIG)
    instance = serve(None, "--runtime", pod.instance_address(), "--capacity", "1GiB")
    with Manager(instance.grpc) as manager:
        manager.register("m", pb.ModelInfo(type="mt:python", path=str(tmp_path / "model")))
        answer = infer(instance.grpc, "m")
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == (ROWS * 2).ravel().tolist()


@pytest.mark.skipif(shutil.which("java") is None, reason="TorchServe is a Java program")
@pytest.mark.parametrize("pod", ["torchserve"], indirect=True)
def test_torchserve_beside_an_instance(pod: Pod, serve: Serve, tmp_path: Path) -> None:
    environment = torchserve(Console())
    (tmp_path / "handler.py").write_text("def handle(data, context):\n    return data and ['7'] * len(data)\n")
    archived = ["--model-name", "seven", "--version", "1.0", "--handler", str(tmp_path / "handler.py"), "--force"]
    subprocess.run(
        [str(environment / "bin/torch-model-archiver"), *archived, "--export-path", str(tmp_path)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    # Workers have sockets in a folder of the machine, told apart by this.
    env = {"TS_INITIAL_WORKER_PORT": str(free_ports(1)[0]), "LOG_LOCATION": str(tmp_path), "PATH": path}
    pod.start_server("torchserve", [], tmp_path / "log", **env, METRICS_LOCATION=str(tmp_path), OMP_NUM_THREADS="1")
    instance = serve(None, "--runtime", pod.instance_address(), "--capacity", "4GiB")
    with Manager(instance.grpc) as manager:
        manager.register("seven", pb.ModelInfo(type="mt:pytorch-mar", path=str(tmp_path / "seven.mar")))
        # model_name 1, input 3: a map of text to bytes; the prediction is 1 of the answer.
        body = b"\n\x05seven\x1a\x09\n\x04data\x12\x01x"
        with grpc.insecure_channel(instance.grpc) as channel:
            call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
            assert call(body, timeout=120) == b"\n\x017"


@pytest.mark.parametrize("pod", ["ovms"], indirect=True)
def test_what_stands_for_ovms_beside_an_instance(pod: Pod, serve: Serve, tmp_path: Path) -> None:
    # No such server can be had here: tests/ovms_server.py stands for its program.
    line, _ = beside(pod.manifest, "ovms", pod.folders)
    text = line[-1].replace("exec /ovms/bin/ovms", f"exec {tmp_path}/ovms")
    program = tmp_path / "ovms"
    options = dict(re.findall(r"--(\w+)=(\S+)", text))
    assert options["file_system_poll_wait_seconds"] == "0" and options["grpc_bind_address"] == "127.0.0.1"
    targets = [f"127.0.0.1:{options[name]}" for name in ("port", "rest_port")]
    words = [sys.executable, "-m", "tests.ovms_server", *targets, options["config_path"]]
    program.write_text(f"#!/bin/sh\ntest -s {options['config_path']} || exit 1\nexec {shlex.join(words)}\n")
    program.chmod(0o755)
    pod.started.append(subprocess.Popen(["/bin/sh", "-c", text], cwd=ROOT, start_new_session=True))
    instance = serve(None, "--runtime", pod.instance_address(), "--capacity", "1GiB")
    (tmp_path / "net.onnx").write_bytes(b"weights")
    with Manager(instance.grpc) as manager:
        manager.register("m", pb.ModelInfo(type="mt:onnx:1", path=str(tmp_path / "net.onnx")))
        assert infer(instance.grpc, "m").raw_output_contents[0] == ROWS.tobytes()
