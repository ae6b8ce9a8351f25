"""What a third-party server is told to serve, and how its process is kept: started, waited for, ended with all it left.

The launchers (``bench.peers.mlserver``, ``bench.peers.triton``) run in this repository's environment and start the
server, which lives in its own, as a child; they stand between it and the suite because it prints no ready line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

import grpc

from bench.peers.paths import SERVICE
from mmcore.pb import inference_pb2

#: Shorter than what a suite waits for the launcher itself.
STOP_S: Final = 3.5
READY_S: Final = 100.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its name, the loader of ``frameworks`` and the file, its one input and its outputs.

    ``shape`` is the input's without the batch axis; ``outputs`` are (name, V2 datatype).
    """

    name: str
    framework: str
    path: str
    input: str
    datatype: str
    shape: tuple[int, ...]
    outputs: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """One argument of a launcher."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServedModel:
        """The inverse of ``to_json``."""
        fields = json.loads(text)
        fields["shape"] = tuple(fields["shape"])
        fields["outputs"] = tuple((name, datatype) for name, datatype in fields["outputs"])
        return cls(**fields)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now, each another."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def keep(
    argv: Sequence[str], environment: Mapping[str, str], port: int, http_port: int, models: Sequence[ServedModel]
) -> None:
    """Run the server until it ends, stdin ends or SIGTERM comes; the ready line is printed once all models are ready.

    Raises:
        SystemExit: always; tells why, if it was not asked for.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A session of its own: what it has started is ended with it. Its log goes where the launcher's does.
    child = subprocess.Popen(
        argv, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        _wait_until_ready(child, port, models)
        ready = {"event": "ready", "grpc": f"127.0.0.1:{port}", "rest": f"127.0.0.1:{http_port}"}
        print(json.dumps(ready), flush=True)
        sys.exit(f"the server ended with {child.wait()}")
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_until_ready(child: subprocess.Popen[bytes], port: int, models: Sequence[ServedModel]) -> None:
    give_up = time.monotonic() + READY_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ready = channel.unary_unary(
            f"/{SERVICE}/ModelReady",
            request_serializer=inference_pb2.ModelReadyRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelReadyResponse.FromString,
        )
        waiting = [model.name for model in models]
        while waiting:
            if child.poll() is not None:
                sys.exit(f"the server ended with {child.returncode} before it was ready")
            if time.monotonic() > give_up:
                sys.exit(f"not ready after {READY_S:.0f} s: {', '.join(waiting)}")
            try:
                if ready(inference_pb2.ModelReadyRequest(name=waiting[0]), timeout=2).ready:
                    waiting.pop(0)
                    continue
            except grpc.RpcError:
                pass  # not listening yet, or still loading: ask again
            time.sleep(0.2)
