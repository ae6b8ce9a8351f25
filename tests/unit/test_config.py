from __future__ import annotations

from pathlib import Path

import pytest

from mmcore.config import default_capacity, memory_limit, parse_collector, parse_duration, parse_size, parse_target


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("2GiB", 2 * 2**30),
        ("500MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        (" 16 MiB ", 16 * 2**20),
        ("3Ki", 3072),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "2XB", "1e9", "2 GiB please", "0.1b"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("250ms", 0.25), ("2h", 7200.0), ("0", 0.0)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["models:8033", "[::1]:8033", "unix:/run/mmcore.sock"])
def test_addresses_are_taken_as_they_are(text: str) -> None:
    assert parse_target(text) == text


@pytest.mark.parametrize(
    "text", ["", "models", ":8033", "models:", "models:0", "models:65536", "unix:", "http://m:8033"]
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_target(text)


@pytest.mark.parametrize("text", ["", "collector:4318", "http://", "grpc://collector:4317"])
def test_what_is_no_collector_is_refused_with_an_example(text: str) -> None:
    assert parse_collector("https://collector:4318") == "https://collector:4318"
    with pytest.raises(ValueError, match="http://HOST:4318"):
        parse_collector(text)


@pytest.mark.parametrize("text", ["", "-1s", "1d", "soon"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="90s"):
        parse_duration(text)


def machine(root: Path, *, membership: str, **limits: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:       1000 kB\n")
    (root / "proc/self/cgroup").write_text(membership)
    for place, text in limits.items():
        file = root / "sys/fs/cgroup" / place.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert memory_limit(machine(tmp_path, membership="")) == 1_024_000


def test_a_limit_of_the_own_group_holds(tmp_path: Path) -> None:
    root = machine(tmp_path, membership="0::/pods/a\n", **{"pods__a__memory.max": "500000\n"})
    assert memory_limit(root) == 500_000


def test_a_limit_further_up_holds_and_max_is_none(tmp_path: Path) -> None:
    root = machine(
        tmp_path, membership="0::/pods/a\n", **{"pods__a__memory.max": "max\n", "pods__memory.max": "400000"}
    )
    assert memory_limit(root) == 400_000


def test_in_a_container_the_mounted_top_is_read(tmp_path: Path) -> None:
    root = machine(tmp_path, membership="0::/host/path/not/mounted\n", **{"memory.max": "300000"})
    assert memory_limit(root) == 300_000


def test_the_first_hierarchy_is_read_too(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        membership="5:cpu,cpuacct:/a\n4:memory:/a\n",
        **{"memory__a__memory.limit_in_bytes": "200000", "memory__memory.limit_in_bytes": "9223372036854771712"},
    )
    assert memory_limit(root) == 200_000


def test_the_default_capacity_leaves_a_fifth_for_the_rest() -> None:
    assert default_capacity() == int(memory_limit() * 0.8)
