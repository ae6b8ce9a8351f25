"""What tests of a running instance share: sample models, and instances as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 30.0


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
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


class Instances:
    """Starts instances and ends those still running when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Instance] = []

    def __call__(self, models: Path | None = None, *args: object, **env: str) -> Instance:
        log = self._folder / f"instance-{len(self._started)}-{os.urandom(4).hex()}.log"
        call = command("serve", "--grpc-port", "0", *(["--models", models] if models else []), *args)
        with log.open("w") as stderr:
            process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(**env))
        assert process.stdout is not None
        # A start that hangs must fail the test, not the suite.
        timer = threading.Timer(READY_WITHIN_S, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            code = process.wait()
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts ``mmcore serve`` on a free port: ``serve(models_dir, *flags)``; ended after the test."""
    instances = Instances(tmp_path)
    yield instances
    instances.end()


@pytest.fixture(scope="session")
def serve_for_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The same for instances that many tests share."""
    instances = Instances(tmp_path_factory.mktemp("instances"))
    yield instances
    instances.end()
