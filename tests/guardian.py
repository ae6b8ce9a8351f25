"""Ends the processes that tests have started when their run is killed, which leaves it no chance to do so itself.

PR_SET_PDEATHSIG would do it with the thread that has started a process, and in a child forked from a program with
threads. So a process stands by that ends them when a pipe to it closes: with the run, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from typing import Final, TypeVar

P = TypeVar("P", "subprocess.Popen[str]", "subprocess.Popen[bytes]")

_starting: Final = threading.Lock()
_pipe: int | None = None
#: Kept, as one that is let go while it runs warns.
_guardian: subprocess.Popen[bytes] | None = None


def guarded(process: P) -> P:
    """The same process, which ends with this one; if it leads a group of processes, they do as well."""
    global _guardian, _pipe
    with _starting:
        if _pipe is None:
            theirs, _pipe = os.pipe()
            # A session of its own: it outlives whoever ends the run with all its group.
            null = subprocess.DEVNULL
            _guardian = subprocess.Popen(
                [sys.executable, __file__], stdin=theirs, stdout=null, stderr=null, start_new_session=True
            )
            os.close(theirs)
    os.write(_pipe, b"%d\n" % process.pid)
    return process


def main() -> None:
    """End the processes whose numbers have come when no more can come."""
    # By descriptors: a number may be another process's by then.
    held: dict[int, int] = {}
    for line in sys.stdin:
        for descriptor in [one for one in held if select.select([one], [], [], 0)[0]]:
            os.close(descriptor)
            del held[descriptor]
        with contextlib.suppress(ProcessLookupError):
            held[os.pidfd_open(int(line))] = int(line)
    for descriptor, pid in held.items():
        with contextlib.suppress(ProcessLookupError):
            leads = os.getpgid(pid) == pid
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if leads:
                os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
