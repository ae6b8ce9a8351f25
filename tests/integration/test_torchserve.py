"""An instance before a real TorchServe: archives registered, answered for, evicted, and its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from bench.environments import torchserve
from bench.peers.served import free_ports
from mmcore.pb import model_mesh_pb2 as pb
from tests.certificates import RSA, Authority
from tests.guardian import guarded
from tests.management import Manager
from tests.serving import Instance, Serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("java") is None, reason="TorchServe is a Java program"),
]

PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MIB = 2**20

#: Answers in capitals, and takes 60 MiB.
HANDLER = """
KEPT = []

def handle(data, context):
    if not KEPT:
        KEPT.append(b"x" * (60 << 20))
    if data is None:
        return None
    return [bytes(row.get("data") or row.get("body")).upper() for row in data]
"""


class TorchServe:
    """One that speaks TLS on both of its gRPC ports; in plain text it is asked by test_shipped_runtimes."""

    def __init__(self, folder: Path, environment: Path) -> None:
        self.authority = Authority(folder)
        signed = self.authority.sign("torchserve", "IP:127.0.0.1", key=RSA)  # it reads no others
        self.store = folder / "store"
        self.store.mkdir()
        ports = free_ports(6)
        self.address = f"torchserve://127.0.0.1:{ports[0]}?repo={self.store}&management={ports[1]}"
        names = ("inference", "management", "metrics")
        lines = [
            f"grpc_inference_port={ports[0]}", f"grpc_management_port={ports[1]}",
            *(f"{name}_address=http://127.0.0.1:{port}" for name, port in zip(names, ports[2:5], strict=True)),
            # Its workers' sockets are told apart by that, in a folder that all servers share.
            f"initial_worker_port={ports[5]}",
            "enable_grpc_ssl=true", f"certificate_file={signed.certificate}", f"private_key_file={signed.key}",
            "enable_envvars_config=false", "disable_system_metrics=true",
            "disable_token_authorization=true", "enable_model_api=true",
        ]  # fmt: skip
        (folder / "config.properties").write_text("\n".join(lines))
        self._folder = folder
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def archive(self, name: str) -> Path:
        (self._folder / "handler.py").write_text(HANDLER)
        archiver = self._environment / "bin" / "torch-model-archiver"
        made = ["--model-name", name, "--version", "1.0", "--export-path", str(self._folder), "--force"]
        subprocess.run(
            [str(archiver), *made, "--handler", str(self._folder / "handler.py")], check=True, capture_output=True
        )
        return self._folder / f"{name}.mar"

    def start(self) -> None:
        argv = ["--start", "--foreground", "--ncs", "--model-store", str(self.store)]
        with (self._folder / "log").open("ab") as log:
            self._process = guarded(subprocess.Popen(
                [str(self._environment / "bin" / "torchserve"), *argv, "--ts-config", "config.properties"],
                stdout=log, stderr=log, start_new_session=True, cwd=self._folder,
                env={
                    **os.environ, "PATH": f"{self._environment / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"
                },
            ))  # fmt: skip

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait(20)
            self._process = None

    def log_text(self) -> str:
        return (self._folder / "log").read_text()[-3000:]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TorchServe]:
    server = TorchServe(tmp_path, torchserve(Console(file=sys.stderr)))
    server.start()
    yield server
    server.kill()


def predict(instance: Instance, model: str, value: bytes) -> bytes:
    """One call of the server's own protocol: model_name 1, input 3, a map of text to bytes; prediction 1."""
    entry = b"\n\x04data\x12" + bytes([len(value)]) + value
    body = b"\n" + bytes([len(model)]) + model.encode() + b"\x1a" + bytes([len(entry)]) + entry
    with grpc.insecure_channel(instance.grpc) as channel:
        answer: bytes = channel.unary_unary(PREDICTIONS)(body, timeout=90)
    return answer[2:]


def test_torchserve_answers_is_evicted_from_and_comes_back(server: TorchServe, serve: Serve, tmp_path: Path) -> None:
    archive = server.archive("upper")
    # A worker is Python and torch beside its 60 MiB: two of them do not fit.
    flags = ("--capacity", "330MiB", "--min-residency", "0", "--eviction", "lru")
    tls = ("--runtime-ca", server.authority.certificate)
    instance = serve(None, "--runtime", server.address, *tls, *flags)
    with Manager(instance.grpc) as manager:
        for name in ("a", "b"):
            manager.register(name, pb.ModelInfo(type="mt:pytorch-mar", path=str(archive)))
            assert predict(instance, name, b"hello") == b"HELLO", server.log_text()
        # What a model takes is what its worker takes, so the second one has sent the first one away.
        assert [manager.state(name) for name in ("a", "b")] == ["NOT_LOADED", "LOADED"], instance.log_text()
        assert [entry.name for entry in server.store.glob("*.mar")] == ["b.mar"]
        manager.register("none", pb.ModelInfo(type="mt:pytorch-mar", path=str(tmp_path / "handler.py")))
        with pytest.raises(grpc.RpcError) as error:
            predict(instance, "none", b"hello")
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        server.kill()
        server.start()
        assert predict(instance, "b", b"again") == b"AGAIN", server.log_text()
