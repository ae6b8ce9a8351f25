"""What tests of ``mmcore runtime`` share: its process, and a client of its protocol as any mesh has it."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import grpc

from mmcore.pb import model_runtime_pb2 as pb
from tests.guardian import guarded
from tests.serving import READY_WITHIN_S, command, environment

Status = pb.RuntimeStatusResponse.Status
METHODS = {
    "runtimeStatus": (pb.RuntimeStatusRequest, pb.RuntimeStatusResponse),
    "loadModel": (pb.LoadModelRequest, pb.LoadModelResponse),
    "unloadModel": (pb.UnloadModelRequest, pb.UnloadModelResponse),
    "predictModelSize": (pb.PredictModelSizeRequest, pb.PredictModelSizeResponse),
    "modelSize": (pb.ModelSizeRequest, pb.ModelSizeResponse),
}


class HeldProcess:
    """``mmcore runtime`` with these flags; it can be killed and started again at the same addresses."""

    def __init__(self, log: Path, *args: object) -> None:
        self._args = args
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, wait: bool = True) -> None:
        with self._log.open("a") as stderr:
            self._process = guarded(
                subprocess.Popen(
                    command("runtime", *self._args), stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
                )
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        timer = threading.Timer(READY_WITHIN_S, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        assert line, self.log_text()
        self.ready = json.loads(line)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._close()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._close()

    def _close(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        code = self._process.wait(20)
        self._process.stdout.close()
        self._process = None
        return code

    def log_text(self) -> str:
        return self._log.read_text()


class Mesh:
    """A client of ``mmesh.ModelRuntime``; answers are messages, and ``future`` gives calls that can be cancelled."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)

    def future(self, method: str, timeout_s: float = 20.0, **fields: Any) -> Any:
        request, response = METHODS[method]
        call = self.channel.unary_unary(
            f"/mmesh.ModelRuntime/{method}", lambda message: message.SerializeToString(), response.FromString
        )
        return call.future(request(**fields), timeout=timeout_s)

    def __call__(self, method: str, timeout_s: float = 20.0, **fields: Any) -> Any:
        return self.future(method, timeout_s, **fields).result()

    def load(self, name: str, kind: str, path: Path, key: str = "") -> int:
        size: int = self("loadModel", modelId=name, modelType=kind, modelPath=str(path), modelKey=key).sizeInBytes
        return size

    def unload(self, name: str) -> None:
        self("unloadModel", modelId=name)

    def refusal(self, method: str, **fields: Any) -> tuple[grpc.StatusCode, str]:
        error = self.future(method, **fields).exception()
        assert isinstance(error, grpc.RpcError), f"{method} was answered"
        return error.code(), error.details()

    def close(self) -> None:
        self.channel.close()
