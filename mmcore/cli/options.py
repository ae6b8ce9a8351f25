"""The options of a command as people are told of them: for ``mmcore config`` and the reference in ``docs/``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click


class Described(NamedTuple):
    """One option.

    Attributes:
        name: as the command's function has it.
        flag: as it is typed, what it takes behind it: ``--grpc-port PORT``.
        environment: the variable that stands for it.
        default: what holds without it, in words; empty for nothing.
        value: the same as a file would state it; None for nothing, and for what is found at the start.
        help: what it is for.
    """

    name: str
    flag: str
    environment: str
    default: str
    value: bool | int | float | str | None
    help: str


def described(command: click.Command) -> Iterator[Described]:
    """The options of a command in their order, those without a variable left out."""
    context = click.Context(command)
    for option in command.params:
        if isinstance(option, click.Option) and isinstance(option.envvar, str):
            flag = "/".join((*option.opts, *option.secondary_opts))
            taken = "" if option.is_flag else f" {_taken(option)}"
            value = option.get_default(context)
            value = value if isinstance(value, bool | int | float | str) and value != "" else None
            yield Described(
                option.name or "", flag + taken, option.envvar, _in_words(option, value), value, option.help or ""
            )


def _taken(option: click.Option) -> str:
    if option.metavar is not None:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    if isinstance(option.type, click.Path):
        return "DIR" if not option.type.file_okay else "FILE" if not option.type.dir_okay else "PATH"
    if isinstance(option.type, click.types.IntParamType):
        return "N"
    return option.type.name.upper()


def _in_words(option: click.Option, value: object) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if value is not None else ""
