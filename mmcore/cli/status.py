"""``mmcore status``: the instances that work together and what each of them holds."""

from __future__ import annotations

import sys
from functools import partial

import click

from mmcore.cli.connection import ask, connection_options
from mmcore.cli.instances import INSTANCE_TITLES, instance_row, list_instances, plain_instance
from mmcore.cli.models import list_options
from mmcore.cli.parameters import DURATION
from mmcore.cli.tables import print_json, print_rest, print_table
from mmcore.cli.top import follow


@click.command("status")
@connection_options
@list_options
@click.option("--watch", is_flag=True, help="Go on, with the models that are asked most; Ctrl-C ends it.")
@click.option("--every", type=DURATION, default="2s", show_default=True, help="How often, with --watch.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Models told of, with --watch.")
def command(target: str, timeout: float, limit: int, as_json: bool, watch: bool, every: float, top: int) -> None:
    """List the instances that work together, as one of them knows them: memory, models and load of each.

    With --watch it is a top for models: rates, mean times and failures of the models of the instance that is asked. On
    a terminal it is drawn anew each time; otherwise, or with --json, each look is a line of JSON.
    """
    if watch:
        follow(target, timeout, every, top, as_json=as_json or not sys.stdout.isatty())
        return

    found, total = ask(target, timeout, partial(list_instances, limit=limit))
    if as_json:
        print_json([plain_instance(one) for one in found])
    else:
        print_table(INSTANCE_TITLES, [instance_row(one) for one in found])
    print_rest(len(found), total)
