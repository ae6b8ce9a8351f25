"""``mmcore completion``: what a shell needs to complete commands, options and the names of models."""

from __future__ import annotations

import asyncio
import os
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

#: A key is being pressed: whoever does not answer by then is not waited for.
_WITHIN_S: Final = 1.0
_NAMES: Final = 200
_SHELLS: Final = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
def command(shell: str) -> None:
    """Print what SHELL completes this command by.

    \b
    eval "$(mmcore completion bash)"        in ~/.bashrc
    eval "$(mmcore completion zsh)"         in ~/.zshrc
    mmcore completion fish | source         in ~/.config/fish/config.fish
    """
    from mmcore.cli.main import group

    kind = get_completion_class(shell)
    assert kind is not None  # click has each of the choices
    click.echo(kind(group, {}, "mmcore", "_MMCORE_COMPLETE").source())


def model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models of the instance that the command line, or the environment, names; none if it does not answer."""
    from mmcore.cli.connection import CLUSTER, Connection
    from mmcore.errors import RpcError
    from mmcore.pb import cluster_pb2
    from mmcore.transport import Channel

    target = ctx.params.get("target") or os.environ.get("MMCORE_TARGET") or "127.0.0.1:8033"

    async def ask() -> list[str]:
        channel = Channel(target)
        try:
            request = cluster_pb2.ListRequest(prefix=incomplete, limit=_NAMES)
            connection = Connection(channel, _WITHIN_S, os.environ.get("MMCORE_CLIENT_TOKEN"))
            answer = await connection.call("ListModels", request, cluster_pb2.ListModelsResponse, service=CLUSTER)
            return sorted({model.name for model in answer.models})
        finally:
            await channel.close()

    try:
        return [CompletionItem(name) for name in asyncio.run(ask())]
    except (RpcError, OSError, ValueError):  # the last: the environment's address is none
        return []
