"""What the pages of proofs in tests/integration name is there, and each of their rows names something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
#: The pages, and the fewest rows that they have.
PAGES = {"README-mesh.md": 50, "README-controller.md": 55}


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_tests_that_there_are(page: str) -> None:
    text = (TESTS / "integration" / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= PAGES[page]
    for row in rows:
        named = re.findall(r"`((?:unit|integration|conformance|bench|meta)/[\w/]+)`", row)
        assert named, row
        for one in named:
            root = TESTS.parent if one.startswith("bench/") else TESTS
            assert (root / f"{one}.py").is_file(), one


def test_words_in_brackets_are_those_of_tests() -> None:
    """Of the controller's page, where they are from the tests' names."""
    text = (TESTS / "integration" / "README-controller.md").read_text()
    for file, words in re.findall(r"`((?:unit|integration|meta)/[\w/]+)` \(([^)]*)\)", text):
        names = " ".join(re.findall(r"def (test_\w+)", (TESTS / f"{file}.py").read_text())).replace("_", " ")
        for one in words.partition(";")[0].split(","):
            assert one.strip().replace("_", " ") in names, (file, one)
