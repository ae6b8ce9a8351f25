"""What tests/integration/README-mesh.md names is there, and each of its rows names something."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS / "integration" / "README-mesh.md"


def test_every_row_names_tests_that_there_are() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`((?:unit|integration|conformance|bench)/[\w/]+)`", row)
        assert named, row
        for one in named:
            root = TESTS.parent if one.startswith("bench/") else TESTS
            assert (root / f"{one}.py").is_file(), one
