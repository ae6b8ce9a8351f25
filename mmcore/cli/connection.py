"""How the commands that ask a running instance reach it: options, one channel, one event loop per command."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

import click
from google.protobuf.message import Message

from mmcore.cli.parameters import DURATION, FILE, TARGET
from mmcore.config import TlsFiles, TransportSettings
from mmcore.errors import InvalidSetting, RpcError, Status
from mmcore.transport import Channel
from mmcore.transport.tls import client_context

#: The instance's own limit is the one that matters; this keeps a wrong address from filling the memory.
ANSWER_LIMIT_BYTES: Final = 2**30
#: The services that commands ask.
V2: Final = "/inference.GRPCInferenceService"
MANAGEMENT: Final = "/mmesh.ModelMesh"
CLUSTER: Final = "/mmcore.Cluster"

ResultT = TypeVar("ResultT")
ResponseT = TypeVar("ResponseT", bound=Message)
_Decorated = Callable[..., Any]


def _keep(ctx: click.Context, option: click.Parameter, value: object) -> None:
    """Keep how the instance is reached for :func:`ask`: no command has use for it."""
    ctx.meta[f"{__name__}.{option.name}"] = value


def _kept_option(flag: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    variable = f"MMCORE_CLIENT_{flag.removeprefix('--').replace('-', '_').upper()}"
    return click.option(
        flag, expose_value=False, callback=_keep, envvar=variable, show_envvar=True, **attributes
    )  # fmt: skip


def connection_options(function: _Decorated) -> _Decorated:
    """Add ``--target``, ``--timeout``, ``--token`` and what TLS needs to a command."""
    function = _kept_option("--tls-key", type=FILE, help="Its key.")(function)
    function = _kept_option("--tls-cert", type=FILE, help="Certificate of yours, where the instance asks for one.")(
        function
    )
    function = _kept_option("--tls-ca", type=FILE, help="Who has signed the instance's certificate; implies --tls.")(
        function
    )
    function = _kept_option("--tls", is_flag=True, help="Use TLS.")(function)
    function = _kept_option("--token", help="Bearer token, where the instance asks for one.")(function)
    function = click.option(
        "--timeout", type=DURATION, default="60s", show_default=True, help="How long to wait for the answer."
    )(function)
    return click.option(
        "--target",
        type=TARGET,
        metavar="ADDRESS",
        default="127.0.0.1:8033",
        envvar="MMCORE_TARGET",
        show_default=True,
        show_envvar=True,
        help="The instance: HOST:PORT or unix:PATH.",
    )(function)


class Connection:
    """One instance, asked with a deadline that holds for every call of the command."""

    def __init__(self, channel: Channel, timeout_s: float, token: str | None = None) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

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
        path = f"{service}/{method}"
        return await self._channel.unary(path, body, metadata=self._metadata, timeout_s=self._timeout_s)

    def sender(self, method: str, body: bytes) -> Callable[[], Awaitable[bytes]]:
        """What sends the same request of the inference service each time it is called."""
        return partial(self._channel.unary, f"{V2}/{method}", body, metadata=self._metadata, timeout_s=self._timeout_s)


def ask(
    target: str,
    timeout_s: float,
    work: Callable[[Connection], Awaitable[ResultT]],
    *,
    connections: int = 1,
    doing: str = "",
) -> ResultT:
    """Run ``work`` with a connection to ``target``, as the command's options say, and close it.

    What it is ``doing`` is told on a terminal while it lasts; empty: nothing is.

    Raises:
        click.ClickException: nothing answers at ``target``, or a file for TLS cannot be used.
        RpcError: what the instance answered instead.
    """

    meta = click.get_current_context().meta

    def kept(option: str) -> Any:
        return meta.get(f"{__name__}.{option}")

    async def run() -> ResultT:
        settings = TransportSettings(max_message_bytes=ANSWER_LIMIT_BYTES)
        channel = Channel(target, connections=connections, settings=settings, ssl=_tls(kept))
        try:
            return await work(Connection(channel, timeout_s, kept("token")))
        except RpcError as error:
            if error.status is not Status.UNAVAILABLE:
                raise
            raise click.ClickException(
                f"no instance answers at {target}: {error.details}\n"
                "Start one with 'mmcore serve --models DIR', or name another with --target."
            ) from error
        finally:
            await channel.close()

    if not doing or not sys.stderr.isatty():
        return asyncio.run(run())
    from rich.console import Console

    with Console(stderr=True).status(doing):
        return asyncio.run(run())


def _tls(kept: Callable[[str], Any]) -> Callable[[], ssl.SSLContext] | None:
    ca, certificate, key = kept("tls_ca"), kept("tls_cert"), kept("tls_key")
    if bool(certificate) != bool(key):
        raise click.UsageError("--tls-cert and --tls-key belong together")
    if not (kept("tls") or ca):
        return None
    try:
        return client_context(ca, TlsFiles(certificate, key) if certificate else None)
    except InvalidSetting as error:
        raise click.ClickException(str(error)) from None
