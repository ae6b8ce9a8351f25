"""Rows: which way a ratio points, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.micro import pair
from bench.rows import compare, show, write


def test_a_ratio_above_one_says_that_ours_is_better() -> None:
    assert compare("small", "throughput", 200.0, "raw-c", 100.0).ratio == 2
    assert compare("small", "cpu", 4.0, "raw-c", 2.0).ratio == 0.5
    assert compare("small", "p99", 1.0, "raw-c", 3.0).ratio == 3
    assert compare("small", "p99", 0.0, "raw-c", 3.0).ratio is None


def test_rows_are_written_as_a_list_of_objects(tmp_path: Path) -> None:
    path = write(tmp_path, "transport", [compare("small", "cpu", 4.0, "raw-c", 2.0)])
    (row,) = json.loads(path.read_text())
    expected = {"case": "small", "metric": "cpu", "ours": 4.0, "peer": "raw-c", "peer_value": 2.0, "ratio": 0.5}
    assert expected.items() <= row.items()
    assert json.loads((tmp_path / "transport.machine.json").read_text())["cores"] >= 1


def test_a_case_that_is_run_alone_leaves_the_figures_of_the_others(tmp_path: Path) -> None:
    """``--case``: its figures replace its own earlier ones, and each case tells when it was taken."""
    write(tmp_path, "density", {"summary": {"resident": 10}, "registered": {"start_s": 1.0}}, adds=True)
    path = write(tmp_path, "density", {"registered": {"start_s": 2.0}}, adds=True)
    assert json.loads(path.read_text()) == {"summary": {"resident": 10}, "registered": {"start_s": 2.0}}
    parts = json.loads((tmp_path / "density.machine.json").read_text())["parts"]
    assert set(parts) == {"summary", "registered"}
    assert all(part["taken"] for part in parts.values())
    write(tmp_path, "density", {"summary": {"resident": 20}})
    assert json.loads(path.read_text()) == {"summary": {"resident": 20}}


@pytest.mark.parametrize("left", ["", "[1]", "{"])
def test_what_is_no_object_is_not_added_to(tmp_path: Path, left: str) -> None:
    (tmp_path / "density.json").write_text(left)
    path = write(tmp_path, "density", {"summary": {}}, adds=True)
    assert json.loads(path.read_text()) == {"summary": {}}


def test_the_table_puts_peers_side_by_side_and_marks_the_generator_s_limit() -> None:
    console = Console(width=160, record=True)
    limited = compare("small", "throughput", 200_000.0, "raw-c", 210_000.0, ("peer",))
    show(console, "transport", [limited, compare("small", "throughput", 200_000.0, "grpc-aio", 2_000.0)])
    text = console.export_text()
    assert "210,000*  0.95×" in text
    assert "100.00×" in text
    assert "generator" in text


def entry(group: str | None, name: str, params: dict[str, str], median_s: float) -> dict[str, object]:
    param = "-".join(params.values()) or None
    return {"group": group, "name": name, "param": param, "params": params or None, "stats": {"median": median_s}}


def test_micro_benchmarks_of_one_group_are_paired_with_ours() -> None:
    rows = pair(
        [
            entry("decode small", "test_decode[small-mmcore]", {"case": "small", "side": "mmcore"}, 1e-6),
            entry("decode small", "test_decode[small-protobuf]", {"case": "small", "side": "protobuf"}, 5e-6),
            entry("lookup", "test_lookup_ours", {}, 1e-7),
            entry("lookup", "test_lookup_dict", {}, 5e-8),
        ]
    )
    assert [(row.case, row.peer, row.ratio) for row in rows] == [
        ("decode small", "protobuf", pytest.approx(5)),
        ("lookup", "lookup_dict", pytest.approx(0.5)),
    ]


def test_micro_benchmarks_without_a_pair_stand_alone() -> None:
    rows = pair([entry(None, "test_touch[1000]", {"size": "1000"}, 1e-7), entry("lookup", "test_lookup", {}, 2e-7)])
    assert [(row.case, row.peer, row.peer_value, row.ratio) for row in rows] == [
        ("test_touch[1000]", "", None, None),
        ("lookup", "", None, None),
    ]
