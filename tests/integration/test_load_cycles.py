"""Loading and unloading real models again and again leaves nothing behind."""

from __future__ import annotations

import pytest

from bench.loading import CYCLED, LEFT_OVER, ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_cycles_of_all_formats_leave_no_memory_descriptor_thread_or_file() -> None:
    found = ask(CYCLED, "cycles 400")
    early, late = found["early"], found["late"]
    assert late["rss"] <= early["rss"] * (1 + LEFT_OVER)
    for what in ("descriptors", "threads", "files"):
        assert late[what] <= early[what], what
