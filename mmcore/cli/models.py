"""``mmcore models``: the models of a running instance and the state each is in."""

from __future__ import annotations

import json
import sys

import click

from mmcore.cli.connection import Connection, ask, connection_options
from mmcore.pb import inference_pb2


@click.command("models")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table.")
def command(target: str, timeout: float, as_json: bool) -> None:
    """List the models of a running instance: name, version, state and the reason for it."""

    async def index(connection: Connection) -> inference_pb2.RepositoryIndexResponse:
        return await connection.call(
            "RepositoryIndex", inference_pb2.RepositoryIndexRequest(), inference_pb2.RepositoryIndexResponse
        )

    rows = [
        {"name": row.name, "version": row.version, "state": row.state, "reason": row.reason}
        for row in ask(target, timeout, index).models
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows:
        click.echo(f"{target} serves no models; give 'mmcore serve' a folder of them with --models.")
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "VERSION", "STATE", "REASON"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    # A pipe has no width; lines must not be folded there.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
