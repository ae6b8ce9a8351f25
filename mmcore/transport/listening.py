"""TCP listeners: at one address, or at every one of both families."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from ssl import SSLContext
from typing import Final

#: As a host to listen on: every address of this machine, of IPv4 too.
EVERYWHERE: Final = "::"
_BACKLOG: Final = 4096


async def listen(
    protocol: Callable[[], asyncio.BaseProtocol],
    host: str,
    port: int,
    *,
    reuse_port: bool = False,
    ssl: SSLContext | None = None,
) -> asyncio.Server:
    """Listen; the port 0 takes a free one. :data:`EVERYWHERE` is all IPv4 addresses on a machine without IPv6.

    Raises:
        OSError: the address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    if host != EVERYWHERE:
        return await loop.create_server(protocol, host, port, reuse_port=reuse_port or None, backlog=_BACKLOG, ssl=ssl)
    # Event loops bind :: for IPv6 alone.
    held = bound(host, port, reuse_port=reuse_port)
    try:
        return await loop.create_server(protocol, sock=held, backlog=_BACKLOG, ssl=ssl)
    except BaseException:
        held.close()
        raise


def bound(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A socket that is bound to an address, and does not listen yet.

    Raises:
        OSError: the address cannot be bound.
    """
    everywhere = host == EVERYWHERE
    if everywhere and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104  # asked for
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if everywhere and made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made


def address_of(listener: asyncio.Server) -> str:
    """``host:port`` as bound, which tells the port chosen for 0."""
    return named(listener.sockets[0].getsockname())


def named(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """``host:port`` of a socket's address: IPv6 in brackets, and IPv4 as such where a socket of IPv6 has it."""
    host, port = address[0], address[1]
    if ":" not in host:
        return f"{host}:{port}"
    return f"{host.removeprefix('::ffff:')}:{port}" if "." in host else f"[{host}]:{port}"
