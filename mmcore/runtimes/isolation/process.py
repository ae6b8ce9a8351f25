"""One worker process as the serving process holds it: its start, its end, and what passes between.

Nothing that the worker writes to its connection, its shared memory or its output is believed; what it prints is logged.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pickle
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

from mmcore.config import THREAD_POOLS
from mmcore.errors import MmcoreError
from mmcore.model import ModelSource
from mmcore.runtimes.isolation.cgroup import WorkerGroups, place_for_workers
from mmcore.runtimes.isolation.frames import BrokenFrame, Described, Kind, description_in, error_in, frame, receive
from mmcore.runtimes.isolation.segment import Segment
from mmcore.runtimes.isolation.totals import totals

log = logging.getLogger(__name__)

_PROGRAM: Final = Path(__file__).with_name("confined.py")
#: Users that nobody has, which workers of a server that is root become (systemd's range for such).
_USERS: Final = range(61184, 65520)
#: What a worker sees of our environment: how to find programs, libraries and texts, and how many threads to use; no
#: credentials, no addresses.
_PASSED: Final = (
    *("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "CUDA_VISIBLE_DEVICES"),
    *THREAD_POOLS,
)
#: An operation on the connection returns after so long to look whether somebody still waits for it.
LOOK_S: Final = 0.05
#: As a C ``struct timeval``.
_TIMEOUT: Final = struct.pack("@ll", 0, int(LOOK_S * 1e6))
#: Lines a worker may have logged in a while, and how long each may be.
_LINES: Final = 200
_LINES_WHILE_S: Final = 10.0
_LINE_LIMIT: Final = 2000
_CLOSE_S: Final = 3.0


class WorkerEnded(Exception):
    """The worker is gone. ``handed_over``: it has read what it was asked, and may have ended because of it."""

    def __init__(self, handed_over: bool) -> None:
        super().__init__()
        self.handed_over = handed_over


class WorkerProcess:
    """A process that holds one model.

    The thread that makes it watches it (:meth:`watch`) and must live as long as it does, since the worker ends with
    that thread. :meth:`ask` and :meth:`hear` are for the thread that holds ``turn``; :meth:`kill` is for any.

    Attributes:
        turn: held while the worker is asked something.
        described: what it has loaded; None before that.
        refused: why it did not load.
        reason: how it ended; empty before that.
        overdue: set before it is killed because it took too long.
        lost: whether it is not to be asked any more, although its end may not have been noticed yet.
    """

    def __init__(self, source: ModelSource, memory_bytes: int | None, *, network: bool = False) -> None:
        self.turn = threading.Lock()
        self.described: Described | None = None
        self.refused: MmcoreError | None = None
        self.reason = ""
        self.overdue = False
        self.lost = False
        self._name = source.name
        self._ended = threading.Event()
        self._ending = threading.Lock()
        self._output = _Output(source.name)
        with contextlib.ExitStack() as handed_over, contextlib.ExitStack() as undo:
            self.inputs = Segment.create()
            undo.callback(self.inputs.close)
            self.outputs = Segment.create()
            undo.callback(self.outputs.close)
            self._sock, theirs = socket.socketpair()
            undo.enter_context(self._sock)
            handed_over.enter_context(theirs)
            self._home = tempfile.mkdtemp(prefix="mmcore-worker-")
            undo.callback(shutil.rmtree, self._home, ignore_errors=True)
            self._user = next(_next_user) if os.geteuid() == 0 else None
            if self._user is not None:
                os.chown(self._home, self._user, self._user)
            confinement = {
                "user": self._user, "read": _readable(source), "home": self._home, "network": network,
                "cpus": source.settings.isolation_cpus,
            }  # fmt: skip
            self._process = _start((theirs.fileno(), self.inputs.fd, self.outputs.fd), confinement)
            handed_over.close()
            undo.enter_context(self._process)
            undo.callback(self._process.kill)
            self.pid = self._process.pid
            self._group = _groups().make(memory_bytes, source.settings.isolation_cpus)
            undo.callback(self._group.end)
            self._group.add(self.pid)
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        totals.begun(self)
        with contextlib.suppress(OSError):
            # An OSError is its end, which is noticed by watching it.
            self._sock.sendall(frame(Kind.LOAD, pickle.dumps((source, memory_bytes))))

    def watch(self, stop: int) -> bool:
        """Take in what happens to it until it has loaded, has ended or ``stop`` (an eventfd) is set.

        True when it has ended, for which nothing of it is left.
        """
        stopped_at: float | None = None
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        poll.register(stop, select.POLLIN)
        if self.described is None:
            poll.register(self._sock, select.POLLIN)
        while True:
            wait_s = None if stopped_at is None else max(0.0, stopped_at + _CLOSE_S - time.monotonic())
            events = [descriptor for descriptor, _ in poll.poll(None if wait_s is None else wait_s * 1000)]
            if self._pidfd in events:
                self._end()
                return True
            if not events:
                self.kill()
            if output in events and not self._output.take(output):
                poll.unregister(output)
            if stop in events:
                poll.unregister(stop)
                stopped_at = time.monotonic()
                self.shut()
            if self._sock.fileno() in events:
                poll.unregister(self._sock)
                self._load_answered()
                if self.described is not None and stopped_at is None:
                    return False

    def _load_answered(self) -> None:
        try:
            answer = receive(self._sock)
            match answer:
                case (Kind.LOADED, data):
                    self.described = description_in(data)
                    # The kernel's own timeouts: one call into it for each read, where Python's take two.
                    for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                        self._sock.setsockopt(socket.SOL_SOCKET, direction, _TIMEOUT)
                case (Kind.FAILED, data):
                    self.refused = error_in(data)
                    self.shut()
                case None:
                    self.shut()
                case _:
                    raise BrokenFrame("another answer than to the order to load")
        except (BrokenFrame, OSError) as error:
            log.warning("model %s: its worker said what cannot be: %s", self._name, error)
            self.kill()

    def _end(self) -> None:
        """Reap it and let go of everything."""
        # While it is not reaped its process group cannot be anybody else's. What the model started goes with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._user is not None:
            _end_all(self._user)
        self._group.end()
        stdout = self._process.stdout
        assert stdout is not None
        os.set_blocking(stdout.fileno(), False)
        while self._output.take(stdout.fileno()):
            pass
        self._output.finish()
        totals.ended(self)
        shutil.rmtree(self._home, ignore_errors=True)
        with self._ending:
            self.reason = _how(self._process.wait())
            os.close(self._pidfd)
            self.lost = True
            self._ended.set()
        stdout.close()
        # Wakes who waits for an answer, also when another process has the other end still open.
        self.shut()
        with self.turn:
            self._sock.close()
            self.inputs.close()
            self.outputs.close()

    def wait_ended(self) -> None:
        """Wait, for seconds at most, until it is reaped and ``reason`` is known."""
        self._ended.wait(_CLOSE_S)

    def shut(self) -> None:
        """End the connection, by which the worker ends of its own accord."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """End the process now."""
        self.lost = True
        with self._ending:
            if not self._ended.is_set():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def resident_bytes(self) -> int:
        """Memory that it holds now; 0 when it is gone."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def ask(self, request: bytes) -> None:
        """Hand a request over.

        Raises:
            WorkerEnded: it did not get there.
        """
        sent = 0
        try:
            while sent < len(request):
                try:
                    sent += self._sock.send(memoryview(request)[sent:])
                except BlockingIOError:
                    # It is alive and reads nothing, which a worker of ours does not do.
                    self.kill()
        except OSError:
            self.lost = True
            raise WorkerEnded(handed_over=False) from None

    def hear(self) -> tuple[Kind, bytes] | None:
        """Its next frame; None when there is none yet, after a moment.

        Raises:
            WorkerEnded: there will be none.
        """
        try:
            answer = receive(self._sock)
        except BlockingIOError:
            return None
        except BrokenFrame as error:
            log.warning("model %s: its worker said what cannot be: %s", self._name, error)
            self.kill()
            raise WorkerEnded(handed_over=True) from None
        except OSError as error:
            self.lost = True
            # What a Unix socket says when the other side has gone without having read everything.
            raise WorkerEnded(handed_over=not isinstance(error, ConnectionResetError)) from None
        if answer is None:
            self.lost = True
            raise WorkerEnded(handed_over=True)
        return answer


class _Output:
    """What a worker prints, cut into lines for the log, at a bounded rate."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""
        self._until = 0.0
        self._left = 0
        self._dropped = 0

    def take(self, descriptor: int) -> bool:
        """Read what is there; False when there is nothing or nothing will come any more."""
        try:
            data = os.read(descriptor, 2**16)
        except OSError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._log(line)
        if len(self._rest) > _LINE_LIMIT:
            self._log(self._rest)
            self._rest = b""
        return bool(data)

    def finish(self) -> None:
        """Log what has no end of line."""
        if self._rest:
            self._log(self._rest)
            self._rest = b""
        if self._dropped:
            log.warning("model %s: %d lines of its worker were dropped", self._name, self._dropped)

    def _log(self, line: bytes) -> None:
        now = time.monotonic()
        if now >= self._until:
            if self._dropped:
                log.warning("model %s: %d lines of its worker were dropped", self._name, self._dropped)
            self._until = now + _LINES_WHILE_S
            self._left, self._dropped = _LINES, 0
        if not self._left:
            self._dropped += 1
            return
        self._left -= 1
        text = line[:_LINE_LIMIT].decode(errors="replace")
        # A model is not to forge other lines of the log.
        log.info("model %s: %s", self._name, "".join(one if one.isprintable() else "?" for one in text))


def _readable(source: ModelSource) -> list[str]:
    """Where a worker finds what it runs and what it loads."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    interpreter: list[str | Path] = [
        sys.prefix,
        sys.exec_prefix,
        sys.base_prefix,
        sys.base_exec_prefix,
        *sys.path,
        *libraries,
    ]
    places = [*interpreter, source.folder or source.path]
    return list({os.path.realpath(path): None for path in places if path})


def _end_all(user: int) -> None:
    """End every process of a user that only a worker has: a model's own may have left its process group."""
    for _ in range(100):
        left = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == user and _runs(entry):
                    left.append(int(entry.name))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _runs(entry: Path) -> bool:
    """Whether a process of /proc is more than a zombie (proc(5): its state follows its name in brackets)."""
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


#: Workers started one after another have different ones, so that they cannot look into each other.
_next_user: Final = itertools.cycle(random.sample(_USERS, len(_USERS)))


@cache
def _groups() -> WorkerGroups:
    return WorkerGroups(place_for_workers())


def _start(descriptors: tuple[int, int, int], confinement: dict[str, Any]) -> subprocess.Popen[bytes]:
    arguments = [json.dumps(confinement), *(str(number) for number in (*descriptors, os.getpid()))]
    return subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-P", "-s", "-u", "-X", "faulthandler", str(_PROGRAM), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=_environment(confinement["home"]),
        pass_fds=descriptors,
        start_new_session=True,
    )


def _environment(home: str) -> dict[str, str]:
    # As many threads as there are processors in each of very many workers would be too many.
    kept = dict.fromkeys(THREAD_POOLS, "1") | {name: os.environ[name] for name in _PASSED if name in os.environ}
    # Where this process finds its modules; the worker is to find the same ones.
    path = os.pathsep.join(path for path in sys.path if path)
    return kept | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": home, "TMPDIR": home, "USER": "mmcore"}


def _how(code: int) -> str:
    """How a process ended, by its exit code as ``subprocess`` gives it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
