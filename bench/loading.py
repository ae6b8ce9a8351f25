"""SUITE=sizes and SUITE=load-cycles: what models are counted for, and what is left of them when they have gone."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.machine import cores
from bench.model_zoo import Zoo
from bench.processes import Process
from bench.rows import Row

MODELS: Final = 1000
QUICK_MODELS: Final = 120
CYCLES: Final = 100_000
QUICK_CYCLES: Final = 2_000
#: Different models in the cycles.
CYCLED: Final = 40
#: design.md §9: of the size that was counted, and of the memory after the cycles.
SIZE_ERROR: Final = 0.10
LEFT_OVER: Final = 0.05
WITHIN_S: Final = 7200.0


def ask(models: int, question: str) -> dict[str, Any]:
    """What a process with so many models of the zoo answers."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        Zoo().write(Path(folder), range(models))
        argv = [sys.executable, "-m", "bench.peers.loading", folder]
        with Process("loading", argv, core=cores()[0], environment={"TMPDIR": temporary}) as process:
            answer: dict[str, Any] = json.loads(process.ask(question, WITHIN_S))
            return answer


def sizes(console: Console, plan: Plan) -> list[Row]:
    """Count mixed models beside what the process really grows by."""
    found = ask(MODELS if plan.duration_s >= 1 else QUICK_MODELS, "sizes")
    found["all"] = {key: sum(one[key] for one in found.values()) for key in ("models", "counted", "grown")}
    rows = []
    for name, one in found.items():
        error = one["counted"] / one["grown"] - 1
        console.print(f"{name}: {one['models']} models, {one['counted'] / 1e6:.1f} MB counted, size error {error:+.1%}")
        counted, grown = one["counted"] / 1e6, one["grown"] / 1e6
        rows.append(Row(f"sizes {name}", "counted", counted, "grown", grown, grown / counted, "MB"))
    error = found["all"]["counted"] / found["all"]["grown"] - 1
    _summary("sizes", {"size_error": error, "within": abs(error) <= SIZE_ERROR, "formats": found})
    return rows


def load_cycles(console: Console, plan: Plan) -> list[Row]:
    """Load and unload again and again; memory, descriptors, threads and files in the end beside those after a tenth."""
    found = ask(CYCLED, f"cycles {CYCLES if plan.duration_s >= 1 else QUICK_CYCLES}")
    early, late = found["early"], found["late"]
    growth = late["rss"] / early["rss"] - 1
    console.print(f"{found['cycles']} cycles in {found['seconds']:.0f} s: memory {growth:+.1%}, {early} to {late}")
    kept = all(late[key] <= early[key] for key in ("descriptors", "threads", "files"))
    _summary("load-cycles", {**found, "rss_growth": growth, "within": growth <= LEFT_OVER and kept})
    units = {"rss": ("MB", 1e6), "descriptors": ("", 1.0), "threads": ("", 1.0), "files": ("", 1.0)}
    rows = [
        Row("load-cycles", key, late[key] / by, "after a tenth", early[key] / by, early[key] / late[key], unit)
        for key, (unit, by) in units.items()
    ]
    return [*rows, Row("load-cycles", "cycles", found["cycles"] / found["seconds"], "", None, None, "cycles/s")]


def _summary(suite: str, content: dict[str, Any]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{suite}.summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
