"""How the commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: object) -> None:
    """One JSON value, indented."""
    click.echo(json.dumps(value, indent=2))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows under titles, for a console; text in them is text, not markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    for title in titles:
        made.add_column(title, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under titles; lines are folded to a terminal's width, and not where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table(titles, rows))


def print_rest(shown: int, total: int) -> None:
    """Tell of what a limit has cut off, where it cannot be taken for output."""
    if total > shown:
        click.echo(f"and {total - shown} more; raise --limit, or name a prefix", err=True)


def ago(since_ms: int) -> str:
    """How long ago a time in milliseconds of the epoch is: ``90 s``, ``3 min``, ``2 h``, ``5 d``."""
    if not since_ms:
        return ""
    seconds = max(0.0, time.time() - since_ms / 1000)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
