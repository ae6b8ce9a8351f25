"""A thread of the process that wakes up has the core soon, though another of its threads has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, threading
from mmcore.server import time_slices

nice = os.nice(1)
before = time_slices.slice_ns()
if POLICY is not None:
    os.sched_setscheduler(0, POLICY, os.sched_param(0))
took = time_slices.take_short_slices()
found = []
thread = threading.Thread(target=lambda: found.append(time_slices.slice_ns()))
thread.start()
thread.join()
print(before, took, time_slices.slice_ns(), found[0], os.nice(0) == nice, os.sched_getscheduler(0))
"""


def run(policy: str) -> list[str]:
    program = PROGRAM.replace("POLICY", policy)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_threads_started_later_have_the_short_slice_too_and_the_priority_stays() -> None:
    before, took, own, threads, nice, policy = run("None")
    assert took == "True"
    assert (nice, policy) == ("True", "0")
    if before == "None":
        pytest.skip("this kernel does not tell of slices; Linux 6.12 does")
    assert int(before) > int(own) == int(threads) == 100_000


def test_another_policy_is_left_alone() -> None:
    _, took, _, _, nice, policy = run("os.SCHED_BATCH")
    assert (took, nice, policy) == ("False", "True", "3")
