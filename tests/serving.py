"""What tests of a running instance share: instances as processes of their own, and small models for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.guardian import guarded

ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 60.0


class Instance:
    """A running ``mmcore serve``; ``ready`` is its ready line."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any], log: Path) -> None:
        self.process = process
        self.ready = ready
        self.log = log

    @property
    def grpc(self) -> str:
        address = self.ready["grpc"]
        assert isinstance(address, str)
        return address

    @property
    def metrics(self) -> str:
        address = self.ready["metrics"]
        assert isinstance(address, str)
        return address

    @property
    def rest(self) -> str:
        address = self.ready["rest"]
        assert isinstance(address, str)
        return address

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def log_text(self) -> str:
        return self.log.read_text()


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mmcore.cli.main", *map(str, args)]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMCORE_")}
    # As with the gRPC port, many instances run at once.
    ports = {"MMCORE_REST_PORT": "0", "MMCORE_METRICS_PORT": "0"}
    return {**kept, **ports, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


class Instances:
    """Starts instances and ends those still running when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Instance] = []

    def __call__(self, models: Path | None = None, *args: object, **env: str) -> Instance:
        log = self._folder / f"instance-{len(self._started)}-{os.urandom(4).hex()}.log"
        call = command("serve", "--grpc-port", "0", *(["--models", models] if models else []), *args)
        with log.open("w") as stderr:
            process = guarded(
                subprocess.Popen(call, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(**env))
            )
        assert process.stdout is not None
        # A start that hangs must fail the test, not the suite.
        timer = threading.Timer(READY_WITHIN_S, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            code = process.wait()
            process.stdout.close()
            raise AssertionError(f"no ready line, exit code {code}:\n{log.read_text()}")
        instance = Instance(process, json.loads(line), log)
        self._started.append(instance)
        return instance

    def end(self) -> None:
        for instance in self._started:
            if instance.process.poll() is None:
                instance.process.kill()
            instance.process.wait()
            if instance.process.stdout:
                instance.process.stdout.close()


Serve = Callable[..., Instance]


def write_model(root: Path, name: str, source: str, *, settings: str = "", version: str = "") -> Path:
    """A model that is a Python class, moved into ``root`` in one step so that a watching server sees it whole."""
    made = root / f".{name}.tmp"
    folder = made / version if version else made
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(source)
    if settings:
        (made / "mmcore.yaml").write_text(settings)
    return made.rename(root / name)


ADD_SUB = """
class Model:
    inputs = [("INPUT0", "INT32", [-1, 16]), ("INPUT1", "INT32", [-1, 16])]
    outputs = [("OUTPUT0", "INT32", [-1, 16]), ("OUTPUT1", "INT32", [-1, 16])]

    def predict(self, inputs):
        a, b = inputs["INPUT0"], inputs["INPUT1"]
        return {"OUTPUT0": a + b, "OUTPUT1": a - b}
"""

IDENTITY = """
class Model:
    inputs = [("INPUT0", "DATATYPE", [-1, -1])]
    outputs = [("OUTPUT0", "DATATYPE", [-1, -1])]

    def predict(self, inputs):
        return {"OUTPUT0": inputs["INPUT0"]}
"""

#: Answers when the file named by its input exists; until then it blocks the thread it runs in.
WAITING = """
import os, time

class Model:
    inputs = [("FILE", "BYTES", [1])]
    outputs = [("DONE", "BOOL", [1])]

    def predict(self, inputs):
        file = inputs["FILE"][0]
        open(file + b".started", "wb").close()
        while not os.path.exists(file):
            time.sleep(0.005)
        return {"DONE": [True]}
"""

FAILING = """
class Model:
    inputs = [("INPUT0", "FP32", [-1])]
    outputs = [("OUTPUT0", "FP32", [-1])]

    def predict(self, inputs):
        raise ValueError("seven is not a number I like")
"""
