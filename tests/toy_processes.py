"""The toy runtime as a process of its own, and an instance before it, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as pb
from tests.guardian import guarded
from tests.management import Manager
from tests.serving import ROOT, Instance


class StandIn:
    """A server of the tests in a process of its own, which says when it is ready."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, module: str, *args: str) -> None:
        self._process = guarded(
            subprocess.Popen([sys.executable, "-m", module, *args], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


class Runtime(StandIn):
    """The toy, on a Unix socket or a port."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def start(self, **settings: Any) -> None:
        self.run("tests.toy_runtime", self.address, json.dumps(settings))

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def call(self, method: str, body: bytes = b"") -> bytes:
        with grpc.insecure_channel(self.address) as channel:
            answer: bytes = channel.unary_unary(f"/toy.Toy/{method}")(body, timeout=10)
            return answer

    def wait_for(self, line: str, count: int = 1) -> None:
        """Until it has been asked for something so often."""
        ends_at = time.monotonic() + 15
        while self.journal.count(line) < count:
            assert time.monotonic() < ends_at, self.journal
            time.sleep(0.01)

    @property
    def journal(self) -> list[str]:
        return self.call("Journal").decode().splitlines()


class Front:
    """An instance before the runtime, and clients of it."""

    def __init__(self, instance: Instance, files: Path) -> None:
        self.instance = instance
        self.files = files
        self.channel = grpc.insecure_channel(instance.grpc)
        self.client = Manager(instance.grpc)

    def register(self, name: str, file: str = "", *, key: str = "", load: bool = False) -> pb.ModelStatusInfo:
        path = self.files / (file or f"{name}.onnx")
        path.write_bytes(b"weights")
        info = pb.ModelInfo(type="mt:onnx:1", path=str(path), key=key)
        return self.client.register(name, info, loadNow=load, sync=load)

    def infer(self, model: str, value: bytes = b"abcd", **metadata: str) -> inference_pb2.ModelInferResponse:
        body = self.call("inference.GRPCInferenceService/ModelInfer", request(model, value), 15.0, **metadata)
        return inference_pb2.ModelInferResponse.FromString(body)

    def call(self, method: str, body: bytes, timeout_s: float = 15.0, **metadata: str) -> bytes:
        pairs = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        answer: bytes = self.channel.unary_unary(f"/{method}")(body, timeout=timeout_s, metadata=pairs)
        return answer

    def close(self) -> None:
        self.channel.close()
        self.client.__exit__()


def request(model: str, value: bytes = b"abcd") -> bytes:
    message = inference_pb2.ModelInferRequest(model_name=model, id="7", raw_input_contents=[value])
    message.inputs.add(name="X", datatype="UINT8", shape=[len(value)])
    return message.SerializeToString()


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()
