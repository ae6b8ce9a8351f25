"""How options are declared: their types, environment variables, and the ``--config`` file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from mmcore.config import parse_collector, parse_duration, parse_size, parse_target
from mmcore.registry import registry_url


class Parsed(click.ParamType[object]):
    """A value read by a function, whose ValueError is the usage error."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """The parsed value; numbers come from a configuration file."""
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def runtime_address(text: str) -> str:
    """The address of a runtime as it is; nothing is connected to.

    Raises:
        ValueError: it is none.
    """
    from mmcore.adapters import open_runtime

    open_runtime(text)
    return text


SIZE: Final = Parsed("size", parse_size)
FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
AUTHORITIES: Final = click.Path(exists=True, path_type=Path)
DURATION: Final = Parsed("duration", parse_duration)
REGISTRY: Final = Parsed("url", registry_url)
COLLECTOR: Final = Parsed("url", parse_collector)
TARGET: Final = Parsed("address", parse_target)
RUNTIME: Final = Parsed("address", runtime_address)


def option(flag: str, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A click option with its environment variable, and its default shown."""
    name = flag.partition("/")[0].removeprefix("--").replace("-", "_")
    attributes.setdefault("show_default", True)
    return click.option(flag, name, envvar=f"MMCORE_{name.upper()}", show_envvar=True, **attributes)


def read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Take the file's values as the defaults of all other options; it is read before them.

    Raises:
        click.BadParameter: the file is no mapping, not YAML, or names an option that does not exist.
    """
    if value is None:
        return
    import yaml

    try:
        content = yaml.safe_load(value.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{value}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise click.BadParameter(f"{value}: expected a mapping of options, got {type(content).__name__}")
    known = {name for other in ctx.command.params if (name := other.name) and name != param.name}
    defaults = {str(key).replace("-", "_"): entry for key, entry in content.items()}
    for name in defaults:
        if name not in known:
            flags = ", ".join(sorted(one.replace("_", "-") for one in known))
            raise click.BadParameter(f"{value}: unknown option {name.replace('_', '-')!r}; known are {flags}")
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=read_config,
    is_eager=True,
    expose_value=False,
    envvar="MMCORE_CONFIG",
    show_envvar=True,
    help="YAML file with any of the options below.",
)
