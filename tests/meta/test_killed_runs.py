"""A run of the tests that is killed leaves none of the processes that it has started."""

from __future__ import annotations

import subprocess
import sys

import psutil

from tests.serving import ROOT

#: Starts one that leads a group with a child of its own, and one that has ended when the run is killed.
RUN = """
import subprocess, sys, threading
from tests.guardian import guarded

line = ["sh", "-c", "sleep 1000 & echo $!; wait"]
guarded(subprocess.Popen(["true"])).wait()
leader = guarded(subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True))
found = []
thread = threading.Thread(target=lambda: found.append(guarded(subprocess.Popen(["sleep", "1000"]))))
thread.start()
thread.join()
print(leader.pid, leader.stdout.readline().strip(), found[0].pid, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_has_started_ends_with_it() -> None:
    pipe = subprocess.PIPE
    # A warning would come first.
    line = [sys.executable, "-W", "always", "-c", RUN]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as run:
        assert run.stdout is not None
        started = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        assert len(started) == 3
        assert all(one.is_running() for one in started)
        run.kill()
        _, alive = psutil.wait_procs(started, 20)
        assert alive == []
