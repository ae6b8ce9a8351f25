"""Processes that a suite starts: servers with a ready line, the generator and loops that answer line by line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, Self

import psutil

from bench.load.job import Job, Outcome
from bench.machine import pinned

ROOT: Final = Path(__file__).resolve().parent.parent
READY_S: Final = 60.0
STOP_S: Final = 5.0


class PeerFailed(Exception):
    """A process did not come up, ended early or gave a wrong answer; the text says which and shows its last lines."""


class Process:
    """A child pinned to a core whose first line on stdout is JSON with ``"event": "ready"``.

    A context manager: leaving it ends the child, and only the child.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        core: int,
        environment: Mapping[str, str] | None = None,
        ready_s: float = READY_S,
    ) -> None:
        self.name = name
        self._ready_s = ready_s
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop
        with pinned(core):
            self._child = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=ROOT,
                env={**os.environ, "MMCORE_REST_PORT": "0", "MMCORE_METRICS_PORT": "0", **(environment or {})},
            )
        self.ready: dict[str, object] = {}

    def __enter__(self) -> Self:
        try:
            self.ready = self._until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """The gRPC address of the ready line, ``host:port``."""
        return str(self.ready["grpc"])

    @property
    def rest(self) -> str:
        """The HTTP address of the ready line, ``host:port``."""
        return str(self.ready["rest"])

    @property
    def pids(self) -> tuple[int, ...]:
        """The child and its descendants now."""
        return (self._child.pid, *(child.pid for child in psutil.Process(self._child.pid).children(recursive=True)))

    def ask(self, line: str, timeout_s: float) -> str:
        """Write a line to the child, wait for one from it.

        Raises:
            PeerFailed: it ended, or did not answer in time.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None
        return self._read_line(timeout_s)

    def stop(self) -> None:
        """Ask it to end, then make it; idempotent."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _until_ready(self) -> dict[str, object]:
        line = self._read_line(self._ready_s)
        try:
            ready = json.loads(line)
        except ValueError:
            raise self._failed(f"said {line!r} instead of its ready line") from None
        if not isinstance(ready, dict) or ready.get("event") != "ready":
            raise self._failed(f"said {line!r} instead of its ready line")
        return ready

    def _read_line(self, timeout_s: float) -> str:
        stdout = self._child.stdout
        assert stdout is not None
        # The child writes whole lines and waits to be asked again, so nothing stays behind in Python's buffer.
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise self._failed(f"did not answer within {timeout_s:.0f} s")
        line = stdout.readline().decode().strip()
        if not line:
            raise self._failed("ended")
        return line

    def _failed(self, what: str) -> PeerFailed:
        self._stderr.seek(0)
        tail = self._stderr.read()[-2000:].decode(errors="replace").strip()
        return PeerFailed(f"{self.name} {what}" + (f"; its last words:\n{tail}" if tail else ""))


class Generator(Process):
    """The load generator's process."""

    def __init__(self, core: int) -> None:
        super().__init__("load generator", [sys.executable, "-m", "bench.load"], core=core)

    def measure(self, job: Job) -> Outcome:
        """Run a job.

        Raises:
            PeerFailed: an answer was wrong, the server failed, or the generator ended.
        """
        outcome = Outcome.from_json(self.ask(job.to_json(), job.warmup_s + job.duration_s + 60))
        if outcome.error:
            raise PeerFailed(outcome.error)
        return outcome


def python_server(name: str, module: str, *args: str, core: int) -> Process:
    """A server of this repository, ``python -m MODULE ARGS``."""
    return Process(name, [sys.executable, "-m", module, *args], core=core)
