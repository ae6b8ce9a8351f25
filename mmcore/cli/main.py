"""The ``mmcore`` command's entry: finds the sub-command, and turns errors into one line and an exit code.

Sub-commands live in modules of their own, imported when they are called: ``mmcore models`` must not pay for a server.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

import click

import mmcore
from mmcore.errors import MmcoreError, RpcError

#: Sub-command to the module that holds it and one line on what it does.
COMMANDS: Final = {
    "serve": ("mmcore.cli.serve", "Serve a folder of models over KServe v2, gRPC and REST."),
    "runtime": ("mmcore.cli.runtime", "Hold models for a mesh, here or in a server that an adapter speaks to."),
    "controller": ("mmcore.cli.controller", "Run the Kubernetes controller, or check manifests for it."),
    "infer": ("mmcore.cli.infer", "Ask a running instance for one inference."),
    "pull": ("mmcore.cli.pull", "Pull a model's files from a store into a folder."),
    "models": ("mmcore.cli.models", "List the models of a running instance, register and unregister them."),
    "vmodels": ("mmcore.cli.vmodels", "List the vmodels, set and delete them."),
    "status": ("mmcore.cli.status", "List the instances that work together; --watch follows them and their models."),
    "bench": ("mmcore.cli.bench", "Measure how many requests a model answers, and how quickly."),
    "config": ("mmcore.cli.config", "Check and print what serve would be told."),
    "completion": ("mmcore.cli.completion", "Print what a shell completes this command by."),
}


class LazyCommands(click.Group):
    """The group of sub-commands; a command's module is imported when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mmcore.__version__, prog_name="mmcore")
def group() -> None:
    """Serve very many machine-learning models from few machines."""


def main() -> None:
    """Run the command and leave with 0 when it ended well, 1 when it failed and 2 when it was called wrongly."""
    if sys.argv[1:2] in (["serve"], ["runtime"]):
        from mmcore.server.allocator import choose_allocator

        choose_allocator()
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run the command with ``args`` and answer the exit code; what went wrong is one line on standard error."""
    try:
        result = group.main(args, prog_name="mmcore", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted")
    except RpcError as error:
        return _fail(f"{error.details or 'no details'} ({error.status.name})")
    except MmcoreError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(str(error))
    return result if isinstance(result, int) else 0


def _fail(text: str) -> int:
    click.echo(f"mmcore: {text}", err=True)
    return 1


if __name__ == "__main__":
    main()
