"""SUITE=micro: runs the pytest-benchmark suites of bench/micro and pairs what they timed.

Tests that time the same work share a ``benchmark.group``, which is the case. Within it the entry whose parameter
``side`` is ``mmcore`` (or ``ours``, or whose test is called so) is ours; every other one is a peer by that parameter.
A group without such a pair gives a row for each test, without a peer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any, Final

from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.machine import cores, pinned
from bench.processes import ROOT, PeerFailed
from bench.rows import Row, compare

_OURS: Final = frozenset({"ours", "mmcore"})


def run(console: Console, plan: Plan) -> list[Row]:
    """Run the suites pinned to one core.

    Raises:
        PeerFailed: a test failed; holds the end of pytest's output.
    """
    raw = FOLDER / "micro.raw.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider", "--benchmark-only",
            "--benchmark-disable-gc", f"--benchmark-json={raw}", f"--benchmark-min-rounds={plan.rounds}",
            f"--benchmark-max-time={plan.duration_s:g}"]  # fmt: skip
    with pinned(cores()[0]):
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise PeerFailed(f"pytest bench/micro failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return pair(json.loads(raw.read_text(encoding="utf-8"))["benchmarks"])


def pair(benchmarks: list[dict[str, Any]]) -> list[Row]:
    """Rows of the median times in µs, from the ``benchmarks`` of pytest-benchmark's JSON."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for entry in benchmarks:
        group = entry.get("group") or entry["name"]
        groups.setdefault(group, []).append((_side(entry), entry["stats"]["median"] * 1e6))
    found = []
    for group, entries in groups.items():
        ours = next((time for side, time in entries if side == ""), None)
        if ours is None or len(entries) == 1:
            names = [side for side, _ in entries]
            cases = [group if len(entries) == 1 else f"{group} {name}" for name in names]
            found += [
                Row(case, "time", time, "", None, None, "µs") for case, (_, time) in zip(cases, entries, strict=True)
            ]
        else:
            found += [compare(group, "time", ours, side, time) for side, time in entries if side]
    return found


def _side(entry: dict[str, Any]) -> str:
    """The peer's name, empty for ours."""
    parameters: dict[str, Any] = entry.get("params") or {}
    test = str(entry["name"])
    name = str(parameters.get("side") or entry.get("param") or test.removeprefix("test_"))
    return "" if name in _OURS or any(word in _OURS for word in re.split("[^a-z]+", test)) else name
