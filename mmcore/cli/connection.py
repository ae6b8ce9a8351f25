"""How the commands that ask a running instance reach it: options, one channel, one event loop per command."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import click
from google.protobuf.message import Message

from mmcore.cli.serve import DURATION
from mmcore.config import TransportSettings
from mmcore.errors import RpcError, Status
from mmcore.transport import Channel

#: The instance's own limit is the one that matters; this keeps a wrong address from filling the memory.
ANSWER_LIMIT_BYTES: Final = 2**30
#: The services that commands ask.
V2: Final = "/inference.GRPCInferenceService"
MANAGEMENT: Final = "/mmesh.ModelMesh"
CLUSTER: Final = "/mmcore.Cluster"

ResultT = TypeVar("ResultT")
ResponseT = TypeVar("ResponseT", bound=Message)
_Decorated = Callable[..., Any]


def connection_options(function: _Decorated) -> _Decorated:
    """Add ``--target`` and ``--timeout`` to a command."""
    function = click.option(
        "--timeout", type=DURATION, default="60s", show_default=True, help="How long to wait for the answer."
    )(function)
    return click.option(
        "--target",
        default="127.0.0.1:8033",
        envvar="MMCORE_TARGET",
        show_default=True,
        show_envvar=True,
        help="The instance: HOST:PORT or unix:PATH.",
    )(function)


class Connection:
    """One instance, asked with a deadline that holds for every call of the command."""

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s

    async def call(
        self, method: str, request: Message, response_type: type[ResponseT], *, service: str = V2
    ) -> ResponseT:
        """One unary call.

        Raises:
            RpcError: what the instance answered instead.
        """
        return response_type.FromString(await self.send(method, request.SerializeToString(), service=service))

    async def send(self, method: str, body: bytes, *, service: str = V2) -> bytes:
        """The same with the messages' bytes."""
        return await self._channel.unary(f"{service}/{method}", body, timeout_s=self._timeout_s)


def ask(target: str, timeout_s: float, work: Callable[[Connection], Awaitable[ResultT]]) -> ResultT:
    """Run ``work`` with a connection to ``target`` and close it.

    Raises:
        click.ClickException: nothing answers at ``target``.
        RpcError: what the instance answered instead.
    """

    async def run() -> ResultT:
        channel = Channel(target, settings=TransportSettings(max_message_bytes=ANSWER_LIMIT_BYTES))
        try:
            return await work(Connection(channel, timeout_s))
        except RpcError as error:
            if error.status is not Status.UNAVAILABLE:
                raise
            raise click.ClickException(
                f"no instance answers at {target}: {error.details}\n"
                "Start one with 'mmcore serve --models DIR', or name another with --target."
            ) from error
        finally:
            await channel.close()

    return asyncio.run(run())
