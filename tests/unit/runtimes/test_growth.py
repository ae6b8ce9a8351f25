"""What a load makes a process gain is measured where the allocator can tell, and not told where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmcore.runtimes.size import _Mallinfo2, _ProcessCounter
from mmcore.server.allocator import find_jemalloc

PROGRAM = """
import json, threading
from mmcore.runtimes.size import Growth, uncounted

def measured(keep, others=()):
    for _ in range(10):  # after a count that took long, as on a busy machine, none is made for a while
        kept.clear()
        with Growth() as growth:
            for other in others:
                other()
            keep()
        if growth.bytes is not None:
            break
    return growth.bytes

kept = []
blocks = lambda: kept.append([bytes(10_000) for _ in range(1000)])
def imported():
    with uncounted():
        kept.append(bytes(5_000_000))
def elsewhere():
    thread = threading.Thread(target=lambda: kept.append(bytes(7_000_000)))
    thread.start()
    thread.join()
def nested():
    with Growth():
        kept.append(bytes(3_000_000))
print(json.dumps({
    "blocks": measured(blocks),
    "small": measured(lambda: kept.append([object() for _ in range(100_000)])),
    "freed": measured(lambda: bytes(50_000_000)),
    "imported": measured(blocks, [imported]),
    "elsewhere": measured(blocks, [elsewhere]),
    "nested": measured(nested),
}))
"""


def run(**environment: str) -> dict[str, int | None]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONMALLOC")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**kept, **environment}, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    answer: dict[str, int | None] = json.loads(done.stdout)
    return answer


def near(value: int | None, expected: int) -> bool:
    return value is not None and abs(value - expected) < 0.05 * expected


@pytest.mark.slow
def test_jemalloc_tells_what_this_thread_took() -> None:
    library = find_jemalloc()
    assert library is not None, "make test installs it"
    grown = run(LD_PRELOAD=str(library), PYTHONMALLOC="malloc")
    # Blocks of 10,033 bytes are given 10,240; objects of 16 bytes, and the list that holds them.
    assert near(grown["blocks"], 10_240_000)
    assert near(grown["small"], 2_400_000)
    assert grown["freed"] is not None
    assert abs(grown["freed"]) < 10_000
    assert near(grown["imported"], 10_240_000)
    assert near(grown["elsewhere"], 10_240_000)
    assert near(grown["nested"], 3_000_000)


@pytest.mark.slow
def test_glibc_tells_what_the_process_took_unless_two_are_measured() -> None:
    grown = run(PYTHONMALLOC="malloc")
    assert near(grown["blocks"], 10_050_000)
    assert near(grown["imported"], 10_050_000)
    assert near(grown["elsewhere"], 17_050_000)
    assert grown["nested"] is None


@pytest.mark.slow
def test_nothing_is_told_while_python_keeps_its_own_memory() -> None:
    assert set(run().values()) == {None}


def test_a_count_that_takes_long_is_not_made_at_every_load() -> None:
    """glibc's count of a heap with many models in it takes milliseconds, for which everybody waits."""
    now, walks, takes_s = 0.0, 0, 0.005

    def mallinfo2() -> _Mallinfo2:
        nonlocal now, walks
        now, walks = now + takes_s, walks + 1
        return _Mallinfo2(uordblks=1000 * walks)

    counter = _ProcessCounter(mallinfo2, lambda: now)
    told = []
    for _ in range(1000):
        before = counter.begin()
        now += 0.003  # the load
        after = counter.end()
        told.append(after is not None and after - before)
    assert walks == 2 * sum(map(bool, told))
    assert walks * takes_s < 0.1 * now
    assert set(told) == {1000, False}
    takes_s = 0.00002
    now += 1
    for _ in range(10):
        before = counter.begin()
        after = counter.end()
        assert after == before + 1000
