"""The quickstart overlay: its etcd, its store, its model and the instances for them, as processes of this machine."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from mmcore.controller.deployment import Place, deployment
from mmcore.controller.mesh import Mesh
from mmcore.controller.mesh_manifests import constraints_map
from mmcore.controller.objects import CLUSTER_SERVING_RUNTIME, Object
from mmcore.controller.runtimes import Runtime, effective_runtimes
from mmcore.controller.selection import select
from mmcore.controller.serving_config import CONFIG_KEY, ServingConfig
from mmcore.controller.wanted import of_predictor
from mmcore.pb import model_mesh_pb2 as pb
from tests.etcds import binary, free_port
from tests.overlays import kustomized, named
from tests.pods import Pod, beside, mounted

pytestmark = pytest.mark.slow

WITHIN_S = 60.0
#: Names of Services and their ports, which stand for addresses of this machine here.
SERVICES = ("etcd.model-serving:2379", "store.model-serving:9000")


class Cluster:
    """The overlay's objects with the addresses that its Services have here, and the processes that are its pods."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {name: free_port() for name in SERVICES}
        self.objects = named(kustomized("kustomize/quickstart"))
        self.started: list[subprocess.Popen[bytes]] = []

    def placed(self, text: str) -> str:
        for name, port in self._ports.items():
            text = text.replace(name, f"127.0.0.1:{port}")
            # Where its server listens.
            text = text.replace(f"0.0.0.0:{name[-4:]}", f"127.0.0.1:{port}").replace(
                f"addr=:{name[-4:]}", f"addr=127.0.0.1:{port}"
            )
        return text

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """What a Secret or ConfigMap holds."""
        data = self.objects[kind, name]["data"]
        texts = {key: base64.b64decode(text).decode() if kind == "Secret" else text for key, text in data.items()}
        return {key: self.placed(text).encode() for key, text in texts.items()}

    def start(self, name: str, program: list[str]) -> None:
        """Start a Deployment: first its container for the beginning, then the one that ``program`` is the image of."""
        item = self.objects["Deployment", name]
        files = {"quickstart-models": self.files("ConfigMap", "quickstart-models")}
        folders = mounted(item, self._folder / name, files)
        pod = item["spec"]["template"]["spec"]
        for one in pod.get("initContainers", []):
            line = [self.placed(word) for word in beside(item, one["name"], folders)[0]]
            subprocess.run([sys.executable, *line[1:]], check=True, timeout=WITHIN_S)
        [container] = pod["containers"]
        line = [self.placed(word) for word in beside(item, container["name"], folders)[0]]
        self.started.append(subprocess.Popen([*program, *line], stderr=subprocess.DEVNULL))
        [port] = [port for known, port in self._ports.items() if known.startswith(name)]
        ends_at = time.monotonic() + WITHIN_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                assert time.monotonic() < ends_at and self.started[-1].poll() is None
                time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait(20)


async def load(pod: Pod, predictor: Object, runtimes: list[Runtime]) -> None:
    """As the controller does."""
    model = of_predictor(predictor)
    runtime = select(model, runtimes)
    assert isinstance(runtime, Runtime) and runtime.name == "mmcore"
    moved = asyncio.Event()
    mesh = Mesh("model-serving", lambda names: moved.set())
    mesh.set_addresses([pod.target("grpc")])
    info = pb.ModelInfo(type=runtime.label, path=model.path, key=model.key)
    request = pb.SetVModelRequest(
        vModelId=model.name, targetModelId="iris__ksp-1", modelInfo=info, loadNow=True, owner=model.owner
    )
    try:
        async with asyncio.timeout(WITHIN_S):
            await mesh.set_vmodel(request)
            while (status := mesh.vmodels["iris"].activeModelStatus).status != pb.ModelStatusInfo.LOADED:
                assert not status.errors, status.errors
                moved.clear()
                await moved.wait()
    finally:
        await mesh.close()


def test_the_quickstart_answers(cluster: Cluster, tmp_path: Path) -> None:
    # Their images' programs: etcd is named by the manifest, rclone is its image's entry point.
    rclone = Path(sys.executable).parent / "rclone"
    cluster.start("etcd", ["env", f"PATH={binary('3.5').parent}:{os.environ['PATH']}"])
    cluster.start("store", [str(rclone if rclone.exists() else shutil.which("rclone"))])
    config = ServingConfig.read(cluster.files("ConfigMap", "model-serving-config")[CONFIG_KEY].decode())
    runtimes = [item for (kind, _), item in cluster.objects.items() if kind == CLUSTER_SERVING_RUNTIME.name]
    for item in runtimes:
        item["metadata"]["uid"] = "1"
    effective = effective_runtimes([], runtimes)
    own = next(one for one in effective if one.name == "mmcore")
    made = deployment(own, config, Place("model-serving", "model-serving-etcd"), config.pods_per_runtime)
    texts = constraints_map(config, "model-serving", effective)["data"]
    files = {
        "tc-config": {key: text.encode() for key, text in texts.items()},
        "model-serving-etcd": cluster.files("Secret", "model-serving-etcd"),
        "storage-config": cluster.files("Secret", "storage-config"),
    }
    pod = Pod(made, tmp_path, files, tmp_path)
    try:
        pod.ready()
        asyncio.run(load(pod, cluster.objects["Predictor", "iris"], effective))
        tensor = triton.InferInput("x", [1, 4], "FP64")
        tensor.set_data_from_numpy(np.array([[5.1, 3.5, 1.4, 0.2]]))
        with triton.InferenceServerClient(pod.target("grpc")) as client:
            answer = client.infer("iris", [tensor], client_timeout=WITHIN_S).as_numpy("predict")
        assert answer is not None and answer.tolist() == [[0]]
    finally:
        pod.end()
