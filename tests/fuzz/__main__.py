"""Runs every fuzz target, or those named, for some seconds each: ``make fuzz SECONDS_EACH=N [TARGETS="..."]``.

Prints the executions of each and, last, of all together. What a target finds is written to ``build/fuzz/found/``, the
inputs that reached something new to ``build/fuzz/corpus/``, where the next run begins. Exits with 1 after a finding.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.fuzz.targets import CORPUS, NATIVE, PYTHON, TARGETS

_EXECUTED: Final = re.compile(rb"stat::number_of_executed_units:\s+(\d+)")
#: An input that takes longer is a finding, and so is more memory.
_SLOWEST_S: Final = 20
_MEMORY_MIB: Final = 4096
_LONGEST: Final = 4096
#: What a run may take beside its seconds: reading the corpus, instrumenting.
_BESIDE_S: Final = 300
#: AddressSanitizer's allocator took most of the time: it keeps what is freed from use for a while, and each
#: allocation's stack. For the stacks of a finding run it again alone, by :mod:`tests.fuzz.one`.
_ALLOCATOR: Final = "malloc_context_size=1:quarantine_size_mb=8:thread_local_quarantine_size_kb=64"


def main() -> int:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"), help="where corpora and findings are kept")
    options = parser.parse_args()
    total, failed = 0, []
    for name in options.targets or [*TARGETS, *NATIVE]:
        executions, fine = run(name, options.seconds, options.work)
        total += executions
        if not fine:
            failed.append(name)
        print(f"{name:<20}{executions:>15,} executions{'' if fine else '   FAILED'}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; inputs in {options.work / 'found'}, output in {options.work / 'log'}")
    print(f"{'total':<20}{total:>15,} executions")
    return 1 if failed else 0


def run(name: str, seconds: int, work: Path) -> tuple[int, bool]:
    """One target: how often it was executed, and whether nothing was found."""
    grown, found, log = work / "corpus" / name, work / "found", work / "log"
    for folder in (grown, found, log):
        folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "tests.fuzz.one", name),
        *(f"-max_total_time={seconds}", "-print_final_stats=1", f"-timeout={_SLOWEST_S}", f"-max_len={_LONGEST}"),
        *(f"-rss_limit_mb={_MEMORY_MIB}", f"-artifact_prefix={found}/{name}-", "-print_funcs=0"),
        *(str(grown), str(CORPUS / NATIVE.get(name, name))),
    ]
    # Python's own allocator would hide reads behind the end of an object from AddressSanitizer, but is faster.
    environment = os.environ | {
        "PYTHONMALLOC": "pymalloc" if name in PYTHON else "malloc",
        "ASAN_OPTIONS": f"{_ALLOCATOR}:{os.environ.get('ASAN_OPTIONS', '')}",
    }
    with (log / name).open("wb") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=environment, timeout=seconds + _BESIDE_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    executed = _EXECUTED.findall((log / name).read_bytes())
    return (int(executed[-1]) if executed else 0), code == 0 and bool(executed)


if __name__ == "__main__":
    sys.exit(main())
