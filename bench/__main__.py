"""``python -m bench [SUITE …] [--quick]``: run suites, print their tables, write build/bench/SUITE.json."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import (
    batching,
    cold_loads,
    confirm,
    controller,
    density,
    formats,
    forward,
    idle,
    loading,
    many,
    micro,
    overload,
    passthrough,
    pull,
    registry,
    rest,
    transport,
    v2,
)
from bench.builds import FOLDER, NotMeasured
from bench.comparison import Plan
from bench.machine import cores
from bench.processes import PeerFailed
from bench.rows import Row, show, write
from bench.sim import cache as cache_sim
from bench.sim import placement

#: A suite returns rows of ours beside a peer's, which are shown here, or an object that it shows itself.
SUITES: Final[dict[str, Callable[[Console, Plan], list[Row] | Mapping[str, object]]]] = {
    "transport": transport.run,
    "v2": v2.run,
    "formats": formats.run,
    "batching": batching.run,
    "rest": rest.run,
    "forward": forward.run,
    "passthrough": passthrough.run,
    "idle": idle.run,
    "registry": registry.run,
    "many": many.run,
    "micro": micro.run,
    "pull": pull.run,
    "sim": placement.run,
    "confirm": confirm.run,
    "cache-sim": cache_sim.run,
    "sizes": loading.sizes,
    "load-cycles": loading.load_cycles,
    "cold-loads": cold_loads.run,
    "density": density.run,
    "controller": controller.run,
    "overload": overload.run,
}
THOROUGH: Final = Plan(rounds=5, warmup_s=0.2, duration_s=1.2)
QUICK: Final = Plan(rounds=3, warmup_s=0.1, duration_s=0.2)


def main() -> int:
    """Run the suites named, or all; 1 when one of them failed, after the others have run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(SUITES)}; all when absent")
    parser.add_argument("--quick", action="store_true", help="short windows: does it work, and roughly how fast")
    parser.add_argument("--case", action="append", default=[], help="only this case (may be repeated)")
    parser.add_argument("--peer", action="append", default=[], help="only this peer (may be repeated)")
    parser.add_argument("--rounds", type=int, help="rounds that the medians are taken of")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON files (default: build/bench)")
    arguments = parser.parse_args()
    for name in arguments.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}; known are {', '.join(SUITES)}")
    # Ended from outside, the servers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else 150)
    if len(set(cores())) == 1:
        console.print("only one core: the generator takes it from the server, so read cpu and capacity alone")
    plan = replace(
        QUICK if arguments.quick else THOROUGH, cases=frozenset(arguments.case), peers=frozenset(arguments.peer)
    )
    if arguments.rounds:
        plan = replace(plan, rounds=arguments.rounds)
    failed = 0
    for name in arguments.suites or SUITES:
        failed |= _run(console, name, plan, arguments.out)
    return failed


def _run(console: Console, name: str, plan: Plan, out: Path) -> int:
    began = time.monotonic()
    try:
        result = SUITES[name](console, plan)
    except (PeerFailed, NotMeasured) as failure:
        console.print(f"bench {name} failed: {failure}", style="red", markup=False)
        return 1
    if isinstance(result, list):
        show(console, name, result)
    path = write(out, name, result, adds=bool(plan.cases))
    console.print(f"{path}, {time.monotonic() - began:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
