"""``mmcore serve --workers N``: serving processes that share a port, each an instance of its own in one mesh.

The parent serves nothing. It reserves the port, starts the workers, says once that all are ready, starts anew one that
ended by itself, and passes on what it is told. It has one thread and no event loop, so that it can fork at any time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from mmcore import log as logs
from mmcore.config import ServeSettings
from mmcore.errors import Unavailable
from mmcore.transport.listening import bound

log = logging.getLogger(__name__)

#: Before a worker that ended by itself is started anew; doubled each time it ends soon, up to the longest.
RESTART_S: Final = 0.2
LONGEST_RESTART_S: Final = 30.0
#: A worker that has run so long has started well.
SETTLED_S: Final = 60.0
_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
_PR_SET_PDEATHSIG: Final = 1
MEMORY: Final = ServeSettings().registry


class _Worker:
    """One place among the workers: the process in it now, or when the next one is to be started."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.pid = 0
        self.output = -1
        self.line = b""
        self.ready: dict[str, Any] | None = None
        self.pause_s = RESTART_S
        self.started_at = 0.0
        self.start_at = 0.0


class Workers:
    """The workers of one command, each with its settings.

    ``serve`` runs an instance in the worker's process and returns its exit code.
    """

    def __init__(self, settings: Iterable[ServeSettings], serve: Callable[[ServeSettings], int]) -> None:
        self._serve = serve
        self._told = 0
        self._announced = False
        self._failed = False
        self._workers = [_Worker(worker) for worker in settings]

    def run(self) -> int:
        """Run until told to end or until a worker cannot start; 0 when all have drained."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for worker in self._workers:
                self._start(worker)
            while any(worker.pid for worker in self._workers) or not self._told:
                self._wait()
            return 1 if self._failed or self._told > 1 else 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    # One turn.

    def _wait(self) -> None:
        """Wait for a signal, a ready line or the time to start a worker anew, and act upon it."""
        found = signal.sigtimedwait(_SIGNALS, 0.0 if self._hear() else self._patience_s())
        if found is not None and found.si_signo in (signal.SIGTERM, signal.SIGINT):
            self._told += 1
            self._tell(signal.SIGTERM)
        self._bury()
        now = time.monotonic()
        for worker in self._workers:
            if not worker.pid and not self._told and now >= worker.start_at:
                self._start(worker)

    def _patience_s(self) -> float:
        """Ready lines are looked for often while they are due; else the next restart is what may be."""
        if any(worker.output >= 0 for worker in self._workers):
            return 0.02
        starts = [worker.start_at - time.monotonic() for worker in self._workers if not worker.pid]
        return max(0.0, min([60.0, *starts]))

    def _tell(self, number: int) -> None:
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, number)

    # Starting.

    def _start(self, worker: _Worker) -> None:
        """Fork a worker whose standard output comes here until it is ready."""
        sys.stdout.flush()
        output, theirs = os.pipe()
        parent = os.getpid()
        worker.pid = os.fork()
        if worker.pid == 0:
            code = 1
            try:
                os.dup2(theirs, 1)
                os.close(output)
                os.close(theirs)
                _end_with(parent)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                code = self._serve(worker.settings)
            except BaseException as error:
                print(f"mmcore: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(theirs)
        os.set_blocking(output, False)
        worker.output, worker.line, worker.ready = output, b"", None
        worker.started_at = time.monotonic()

    def _hear(self) -> bool:
        """Take ready lines; whether one has come."""
        waiting = {worker.output: worker for worker in self._workers if worker.output >= 0}
        heard = False
        for output in select.select(list(waiting), [], [], 0)[0]:
            worker = waiting[output]
            piece = os.read(output, 65536)
            worker.line += piece
            if piece and not worker.line.endswith(b"\n"):
                continue
            os.close(output)
            worker.output = -1
            if piece:
                worker.ready = json.loads(worker.line)
                heard = True
        if heard and not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            print(self._ready_line(), flush=True)
        return heard

    def _ready_line(self) -> str:
        """That of the first worker, with the instances of all."""
        lines = [worker.ready or {} for worker in self._workers]
        instances = [line["instance"] for line in lines]
        ready = {key: value for key, value in lines[0].items() if key not in ("instance", "uds", "peer")}
        return json.dumps({**ready, "workers": instances}, separators=(",", ":"))

    # Ending.

    def _bury(self) -> None:
        """Note the workers that have ended, and when their successors start."""
        for worker in self._workers:
            if not worker.pid:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            worker.pid = 0
            if worker.output >= 0:
                os.close(worker.output)
                worker.output = -1
            if self._told:
                continue
            how = os.waitstatus_to_exitcode(status)
            if not self._announced:
                # What keeps a first worker from starting keeps every one.
                self._failed = True
                self._told = 1
                self._tell(signal.SIGTERM)
                continue
            now = time.monotonic()
            if now - worker.started_at > SETTLED_S:
                worker.pause_s = RESTART_S
            log.error("worker %d ended with %d; another is started in %g s", pid, how, worker.pause_s)
            worker.start_at = now + worker.pause_s
            worker.pause_s = min(2 * worker.pause_s, LONGEST_RESTART_S)


def run_workers(settings: ServeSettings, serve: Callable[[ServeSettings], int]) -> int:
    """Run ``settings.workers`` instances until told to end; the exit code.

    Raises:
        Unavailable: a port cannot be listened on.
    """
    logs.configure(settings.log_level, settings.log_format)
    folder = Path(tempfile.mkdtemp(prefix="mmcore-workers-"))
    try:
        with (
            _reserved(settings.host, settings.grpc_port) as grpc_port,
            _reserved(settings.host, settings.rest_port) as rest_port,
        ):
            shared = dataclasses.replace(settings, grpc_port=grpc_port, rest_port=rest_port, shares_ports=True)
            if settings.registry == MEMORY:
                # They are all there is, and leave together.
                shared = dataclasses.replace(shared, registry=f"sqlite:{folder / 'registry.db'}", hands_over=False)
            return Workers(_divided(shared, folder), serve).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port that the workers then share: a socket that is bound and does not listen gets no connection.

    Raises:
        Unavailable: it is in use.
    """
    try:
        held = bound(host, port, reuse_port=True)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with held:
        yield held.getsockname()[1]


def _divided(settings: ServeSettings, folder: Path) -> Iterator[ServeSettings]:
    """The settings of each worker: its part of the memory, and a socket of its own for the others."""
    for number in range(settings.workers):
        yield dataclasses.replace(
            settings,
            workers=1,
            capacity_bytes=max(1, settings.capacity_bytes // settings.workers),
            peer_uds=folder / f"peer-{number}.sock",
            # Each tells of itself alone.
            metrics_port=settings.metrics_port + number if settings.metrics_port else 0,
            # One process alone can listen on a path, or on a port that others do not share.
            uds=settings.uds if number == 0 else None,
            management_port=settings.management_port if number == 0 else None,
        )


def _end_with(parent: int) -> None:
    """Have this process told to end when its parent has (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
