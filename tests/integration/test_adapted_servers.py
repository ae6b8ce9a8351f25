"""Real servers as runtimes: MLServer and Triton behind an instance, from the first load to eviction and their end."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import joblib
import lightgbm
import numpy as np
import pytest
import xgboost
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from bench.environments import mlserver, site_packages, triton
from bench.peers.served import free_ports
from bench.peers.triton import remove_regions
from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as pb
from tests.certificates import Authority
from tests.guardian import guarded
from tests.management import Manager, States
from tests.runtime_processes import HeldProcess
from tests.serving import Instance, Serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]] * 10, dtype=np.float32)
LABELS = np.array([0, 1, 1, 0] * 10)

#: A process of its own, with some 77 MiB: two of them fit into 200 MiB.
TRITON_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.weights = b"x" * (60 << 20)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(one, "X").as_numpy() for one in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", one * 2)]) for one in inputs]
"""
TRITON_CONFIG = """
name: "whatever" backend: "python" max_batch_size: 0
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1, 2 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1, 2 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


DOUBLED = list((ROWS[:4] * 2).ravel())


def write_triton_model(folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(TRITON_MODEL)
    (folder / "config.pbtxt").write_text(TRITON_CONFIG)


class Server:
    """A server's process, which can be killed and started again on the same ports."""

    def __init__(self, argv: list[str], address: str, log: Path, **env: str) -> None:
        self.address = address
        self._argv = argv
        self._log = log
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, *argv: object) -> None:
        self._argv += map(str, argv)

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = guarded(
                subprocess.Popen(self._argv, stdout=log, stderr=log, env=self._env, start_new_session=True)
            )

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait(20)
            self._process = None


@pytest.fixture
def mlserver_repository(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    environment = mlserver(Console())
    http_port, grpc_port, metrics_port = free_ports(3)
    repository = tmp_path / "repository"
    repository.mkdir()
    settings = {
        "host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port,
        "parallel_workers": 0, "load_models_at_startup": False,
    }  # fmt: skip
    (repository / "settings.json").write_text(json.dumps(settings))
    server = Server(
        [str(environment / "bin" / "mlserver"), "start", str(repository)], f"127.0.0.1:{grpc_port}", tmp_path / "log"
    )
    yield server, repository
    server.kill()


@pytest.fixture
def triton_repository(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    environment = triton(Console())
    http_port, grpc_port = free_ports(2)
    repository = tmp_path / "repository"
    repository.mkdir()
    packages = site_packages(environment)
    bundled = packages / "pytriton" / "tritonserver"
    regions = f"mmcore_test_triton_{os.getpid()}_"
    argv = [
        str(bundled / "bin" / "tritonserver"), f"--model-repository={repository}", "--model-control-mode=explicit",
        f"--backend-directory={environment / 'backends'}", f"--cache-directory={bundled / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name={regions}", "--strict-readiness=false",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc_port}", "--http-address=127.0.0.1",
        f"--http-port={http_port}", "--allow-metrics=false", "--exit-timeout-secs=1",
    ]  # fmt: skip
    server = Server(
        argv, f"127.0.0.1:{grpc_port}", tmp_path / "log",
        PATH=f"{environment / 'bin'}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="",
        LD_LIBRARY_PATH=f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    )  # fmt: skip
    yield server, repository
    server.kill()
    remove_regions(regions)


class Front:
    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.manager = Manager(instance.grpc)
        self.channel = grpc.insecure_channel(instance.grpc)

    def register(self, name: str, kind: str, path: Path) -> None:
        self.manager.register(name, pb.ModelInfo(type=f"mt:{kind}", path=str(path)))

    def infer(self, name: str, rows: Any = ROWS[:4], input_name: str = "X") -> inference_pb2.ModelInferResponse:
        request = inference_pb2.ModelInferRequest(model_name=name, raw_input_contents=[rows.tobytes()])
        request.inputs.add(name=input_name, datatype="FP32", shape=rows.shape)
        call = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        response = inference_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=60))
        assert response.model_name == name
        return response

    @staticmethod
    def have_forgotten(server: Server, name: str) -> None:
        """Have the server lose a model that this instance has loaded."""
        with grpc.insecure_channel(server.address) as channel:
            unload = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelUnload")
            unload(inference_pb2.RepositoryModelUnloadRequest(model_name=name).SerializeToString(), timeout=20)

    def states(self, *names: str) -> list[str]:
        return [self.manager.state(name) for name in names]

    def close(self) -> None:
        self.channel.close()
        self.manager.__exit__()


def predicted(response: inference_pb2.ModelInferResponse) -> list[float]:
    (output,) = response.outputs
    if response.raw_output_contents:
        types = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}
        return list(np.frombuffer(response.raw_output_contents[0], types[output.datatype]))
    contents = output.contents
    return [*contents.int64_contents, *contents.fp32_contents, *contents.fp64_contents]


def test_an_adapter_in_a_process_of_its_own_holds_models_in_triton_for_a_mesh_over_mutual_tls(
    triton_repository: tuple[Server, Path], serve: Serve, tmp_path: Path
) -> None:
    server, repository = triton_repository
    authority = Authority(tmp_path)
    theirs, between, ours = (authority.sign(name, "IP:127.0.0.1") for name in ("triton", "adapter", "mesh"))
    server.add(
        "--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true", f"--grpc-root-cert={authority.certificate}",
        f"--grpc-server-cert={theirs.certificate}", f"--grpc-server-key={theirs.key}",
    )  # fmt: skip
    (port,) = free_ports(1)
    held = HeldProcess(
        tmp_path / "held.log", "--grpc-port", port, "--capacity", "200MiB",
        "--adapter", f"triton://{server.address}?repo={repository}", "--adapter-ca", authority.certificate,
        "--tls-cert", between.certificate, "--tls-key", between.key, "--tls-client-ca", authority.certificate,
    )  # fmt: skip
    held.start(wait=False)
    server.start()
    held.wait_ready()
    tls = ("--runtime-ca", authority.certificate, "--runtime-cert", ours.certificate, "--runtime-key", ours.key)
    front = Front(serve(None, "--runtime", f"127.0.0.1:{port}", *tls, "--min-residency", "0", "--eviction", "lru"))
    try:
        trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", trusted) as nobody, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(nobody).result(timeout=1)
        for name in ("a", "b", "c"):
            write_triton_model(tmp_path / "models" / name)
            front.register(name, "python", tmp_path / "models" / name)
            assert predicted(front.infer(name)) == DOUBLED
        assert sorted(front.states("a", "b", "c")) == ["LOADED", "LOADED", "NOT_LOADED"]
        assert len(list(repository.iterdir())) == 2
        # The server is killed: the adapter refills it, and the mesh notices nothing but the wait.
        server.kill()
        server.start()
        for name in ("a", "b", "c"):
            assert predicted(front.infer(name)) == DOUBLED
        # The adapter is killed: the mesh refills it, and it the server.
        held.kill()
        held.start(wait=False)
        for name in ("a", "b", "c"):
            assert predicted(front.infer(name)) == DOUBLED
    finally:
        front.close()
        held.kill()


def test_mlserver_answers_for_three_formats_is_evicted_from_and_comes_back(
    mlserver_repository: tuple[Server, Path], serve: Serve, tmp_path: Path
) -> None:
    server, repository = mlserver_repository
    server.start()
    joblib.dump(LogisticRegression().fit(ROWS, LABELS), tmp_path / "any-name.joblib")
    booster = xgboost.train({"objective": "binary:logistic", "min_child_weight": 0}, xgboost.DMatrix(ROWS, LABELS), 3)
    booster.save_model(tmp_path / "model.json")
    lightgbm.train(
        {"min_data_in_leaf": 1, "verbose": -1, "num_threads": 1}, lightgbm.Dataset(ROWS, LABELS), 3
    ).save_model(tmp_path / "model.bst")
    runtime = f"mlserver://{server.address}?repo={repository}"
    front = Front(
        serve(None, "--runtime", runtime, "--capacity", "2500000", "--min-residency", "0", "--eviction", "lru")
    )
    try:
        for name, kind, file in (
            ("sk", "sklearn", "any-name.joblib"), ("xgb", "xgboost", "model.json"), ("lgb", "lightgbm", "model.bst")
        ):  # fmt: skip
            front.register(name, kind, tmp_path / file)
        assert predicted(front.infer("sk")) == [0, 1, 1, 0]
        assert [value > 0.5 for value in predicted(front.infer("xgb"))] == [False, True, True, False]
        assert [value > 0.5 for value in predicted(front.infer("lgb"))] == [False, True, True, False]
        # Two of them fit.
        assert front.states("sk", "xgb", "lgb") == ["NOT_LOADED", "LOADED", "LOADED"]
        assert not (repository / "sk").exists()
        assert predicted(front.infer("sk")) == [0, 1, 1, 0]
        (tmp_path / "broken.joblib").write_bytes(b"no pickle")
        front.register("broken", "sklearn", tmp_path / "broken.joblib")
        with pytest.raises(grpc.RpcError) as error:
            front.infer("broken")
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        front.have_forgotten(server, "sk")
        assert predicted(front.infer("sk")) == [0, 1, 1, 0]
        server.kill()
        server.start()
        assert predicted(front.infer("sk")) == [0, 1, 1, 0]
    finally:
        front.close()


def test_triton_answers_is_evicted_from_and_comes_back(
    triton_repository: tuple[Server, Path], serve: Serve, tmp_path: Path
) -> None:
    server, repository = triton_repository
    server.start()
    for name in ("a", "b", "c"):
        write_triton_model(tmp_path / "models" / name)
    runtime = f"triton://{server.address}?repo={repository}"
    front = Front(
        serve(None, "--runtime", runtime, "--capacity", "200MiB", "--min-residency", "0", "--eviction", "lru")
    )
    try:
        for name in ("a", "b", "c"):
            front.register(name, "python", tmp_path / "models" / name)
            assert predicted(front.infer(name)) == DOUBLED
        assert front.states("a", "b", "c") == ["NOT_LOADED", "LOADED", "LOADED"]
        assert predicted(front.infer("a")) == DOUBLED
        # Its own words for bad requests come through.
        with pytest.raises(grpc.RpcError) as error:
            front.infer("a", input_name="WRONG")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        front.have_forgotten(server, "a")
        assert predicted(front.infer("a")) == DOUBLED
        server.kill()
        began = time.monotonic()
        server.start()
        assert predicted(front.infer("a")) == DOUBLED
        assert time.monotonic() - began < 60
        assert States.Name(front.manager.status("a").status) == "LOADED"
    finally:
        front.close()
