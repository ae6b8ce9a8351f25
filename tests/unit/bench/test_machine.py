"""Clocks and cores: what the CPU figures rest on."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from bench.machine import busy_ns, card, cores, cpu_ns, pinned


def test_cpu_time_of_a_process_is_what_it_says_itself() -> None:
    before, own = cpu_ns([os.getpid()]), time.process_time_ns()
    while time.process_time_ns() - own < 20_000_000:
        sum(range(1000))
    assert 20_000_000 <= cpu_ns([os.getpid()]) - before < 200_000_000


def test_a_process_that_is_gone_counts_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert cpu_ns([child.pid]) == 0


def test_the_machine_s_time_holds_ours() -> None:
    before, own = busy_ns(), time.process_time_ns()
    while time.process_time_ns() - own < 60_000_000:
        sum(range(1000))
    # Counted in ticks of 10 ms.
    assert busy_ns() - before >= 30_000_000


def test_a_process_started_pinned_stays_on_its_core_and_we_do_not() -> None:
    allowed = os.sched_getaffinity(0)
    core = cores()[1]
    with pinned(core):
        told = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert told.stdout.strip() == str({core})
    assert os.sched_getaffinity(0) == allowed


def test_the_card_tells_the_processor() -> None:
    assert card()["cpu"]
