"""``mmcore config``: what ``mmcore serve`` would go by, and where each of it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mmcore.cli.options import Described, described
from mmcore.cli.serve import command as serve
from mmcore.cli.tables import print_json, print_table

_FROM = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


@click.command(
    "config", context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS] [OPTIONS OF SERVE]"
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--example", is_flag=True, help="Print a file for --config with every option and its default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(options: tuple[str, ...], example: bool, as_json: bool) -> None:
    """Check what 'mmcore serve' would be told, and print it with where it comes from.

    It takes the options of serve. What is wrong in them, in the environment or in the file is said as serve says it.

    \b
    mmcore config --config mmcore.yaml
    mmcore config --example > mmcore.yaml
    """
    known = [one for one in described(serve) if one.name != "config"]
    if example:
        for one in known:
            click.echo(_commented(one))
        return
    context = serve.make_context("serve", list(options))
    told = {one.name: (_plain(context.params[one.name]), _source(context, one.name)) for one in known}
    if as_json:
        print_json({_key(name): {"value": value, "from": source} for name, (value, source) in told.items()})
    else:
        rows = [(_key(name), _shown(value), source) for name, (value, source) in told.items()]
        print_table(("OPTION", "VALUE", "FROM"), rows)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _source(context: click.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return _FROM.get(source, "default") if source is not None else "default"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _commented(one: Described) -> str:
    """An option as a comment of the file: what it is for, and how its default would be written."""
    # JSON is YAML.
    value = json.dumps(one.value) if one.value is not None else ""
    default = f" Default: {one.default}." if one.default and one.value is None else ""
    return f"# {one.help}{default}\n#{_key(one.name)}: {value}".rstrip() + "\n"
