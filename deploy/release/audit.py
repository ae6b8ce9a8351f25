"""Ask for known weaknesses of what mmcore needs to run: ``python deploy/release/audit.py``; a part of ``make lint``.

The database is OSV's, over the network. Where that cannot be reached the check says so and is passed over: exit code 0.
With a finding it is 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

#: Extras that an instance may run with; frameworks are those of whoever installs them.
EXTRAS: Final = ("etcd", "all-stores", "s3", "gcs", "azure", "http", "controller", "tracing")
WITHIN_S: Final = 120
_NAME: Final = re.compile(r"^[A-Za-z0-9._-]+")


def main() -> int:
    """Ask, and print one line, or one for each finding."""
    needed = installed()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={found}\n" for name, found in sorted(needed.items())))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip",
                   "--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WITHIN_S)
            answered = json.loads(done.stdout)["dependencies"]
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            print("skipped audit: the database of weaknesses cannot be reached from here")
            return 0
    found = [(one["name"], one["version"], weakness["id"]) for one in answered for weakness in one.get("vulns", ())]
    for name, at, weakness in found:
        print(f"failed  audit: {name} {at}: {weakness}")
    if not found:
        print(f"ok      audit of {len(needed)} packages")
    return 1 if found else 0


def installed() -> dict[str, str]:
    """Name and version of each package that mmcore needs here, and of each that those need."""
    found: dict[str, str] = {}
    left = ["mmcore"]
    while left:
        name = left.pop()
        for one in requires(name) or ():
            wanted = extra_of(one)
            match = _NAME.match(one)
            assert match is not None
            needed = match.group().lower()
            if needed in found or needed == "mmcore" or (wanted and (name != "mmcore" or wanted not in EXTRAS)):
                continue
            try:
                found[needed] = version(needed)
            except PackageNotFoundError:
                continue  # for another system, or an extra that is not installed
            left.append(needed)
    return found


def extra_of(requirement: str) -> str:
    """The extra that a requirement is of; empty for one that always holds."""
    match = re.search(r"""extra == ["']([^"']+)["']""", requirement)
    return match.group(1) if match else ""


if __name__ == "__main__":
    sys.exit(main())
