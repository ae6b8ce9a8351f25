"""What a suite reports: rows of ours beside a peer's, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.machine import card

#: Metrics of which more is better; of all others less is.
MORE_IS_BETTER: Final = frozenset({"throughput", "capacity", "bandwidth", "objects"})
UNITS: Final = {
    "throughput": "requests/s",
    "capacity": "requests per CPU second",
    "bandwidth": "MB/s",
    "objects": "objects/s",
    "p50": "µs",
    "p99": "µs",
    "cpu": "µs of CPU per request",
    "cpu_budget": "µs of CPU per request",
    "time": "µs",
    "rss": "MB",
    "ready": "ms",
    "threads": "threads",
    "join": "s",
    "change_p50": "ms",
    "change_p99": "ms",
    "idle_cpu": "ms of CPU per s and instance",
    "idle_requests": "requests/s per instance",
    "idle_bytes": "bytes/s per instance",
    "bytes": "bytes per model",
    "sync": "s",
    "requests": "requests",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of ours beside one peer's. ``ratio`` above 1: ours is better; None, as the value, without a peer.

    ``limited_by_load`` names the sides (``ours``, ``peer``) whose server still had time to spare while the generator
    had none: their throughput is the generator's, so read their ``capacity`` or ``cpu``.
    """

    case: str
    metric: str
    ours: float
    peer: str
    peer_value: float | None
    ratio: float | None
    unit: str
    limited_by_load: tuple[str, ...] = ()


def compare(
    case: str, metric: str, ours: float, peer: str, peer_value: float, limited_by_load: tuple[str, ...] = ()
) -> Row:
    """A row with its ratio; None where there is nothing to divide by."""
    above, below = (ours, peer_value) if metric in MORE_IS_BETTER else (peer_value, ours)
    ratio = above / below if below else None
    return Row(case, metric, ours, peer, peer_value, ratio, UNITS[metric], limited_by_load)


def write(folder: Path, suite: str, result: Sequence[Row] | Mapping[str, object], *, adds: bool = False) -> Path:
    """``SUITE.json``, the list of rows or the object, and ``SUITE.machine.json``, what they were taken on.

    With ``adds`` what an object in the file says under other keys stays; of each key the second file then tells apart
    when it was taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, machine = folder / f"{suite}.json", folder / f"{suite}.machine.json"
    content: Any = result if isinstance(result, Mapping) else [asdict(row) for row in result]
    taken: Any = card()
    if isinstance(result, Mapping) and adds:
        content = {**_object(path), **result}
        taken["parts"] = {**_object(machine).get("parts", {}), **dict.fromkeys(result, card())}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    machine.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")
    return path


def _object(path: Path) -> dict[str, Any]:
    """What an earlier run has left in a file; nothing where it left none, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show(console: Console, suite: str, rows: Sequence[Row]) -> None:
    """Cases and metrics down, ours and each peer across, the ratio behind each peer's figure."""
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer))
    table = Table(title=f"bench {suite} (medians; × above 1: mmcore is better)", title_justify="left")
    for column in ("case", "metric", "unit"):
        table.add_column(column)
    for column in ("mmcore", *peers):
        table.add_column(column, justify="right")
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    order = list(dict.fromkeys(row.case for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row.case)):
        cells.setdefault((row.case, row.metric), {})[row.peer] = row
    last_case = ""
    for (case, metric), by_peer in cells.items():
        first = next(iter(by_peer.values()))
        if last_case and case != last_case:
            table.add_section()
        ours = _number(first.ours) + _mark("ours", first)
        table.add_row(
            case if case != last_case else "", metric, first.unit, ours, *(_cell(by_peer.get(peer)) for peer in peers)
        )
        last_case = case
    console.print(table)
    if any(row.limited_by_load for row in rows):
        console.print("* the generator's core was full while the server's was not: compare capacity or cpu instead")


def _cell(row: Row | None) -> str:
    if row is None or row.peer_value is None:
        return "–"
    ratio = "" if row.ratio is None else f"  {row.ratio:.2f}×"
    return f"{_number(row.peer_value)}{_mark('peer', row)}{ratio}"


def _mark(side: str, row: Row) -> str:
    return "*" if side in row.limited_by_load and row.metric == "throughput" else ""


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
