"""Where other instances reach this one: a listener with the same services, for calls that were passed on.

Metadata that instances send each other counts on it and nowhere else, and nobody is asked for a token, so it is not for
clients: it belongs on a network that only instances reach, or under ``--peer-ca``.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from mmcore.config import ServeSettings
from mmcore.errors import Unavailable, Unimplemented
from mmcore.routing import Registered, Router
from mmcore.routing.actions import Haste
from mmcore.routing.mesh import UNLOAD_PATH
from mmcore.server.calls import Body, Waiting
from mmcore.server.ports import listening
from mmcore.transport import Server, ServerCall
from mmcore.transport.tls import server_context

#: The workers of one command ask each other by it for what their dashboards show.
DASHBOARD_PATH: Final = "/mmcore.Peer/Dashboard"


async def listen_for_peers(server: Server, settings: ServeSettings) -> str | None:
    """Listen as the settings say; returns the address that other instances are to be told, or None where it is off.

    That is ``unix:PATH`` between the workers of one machine, else ``host:port``, for instances that ``peer_ca`` has
    signed where that is set.

    Raises:
        Unavailable: the address cannot be listened on, or none can be told; the text names the option to change.
    """
    if settings.peer_uds is not None:
        try:
            return await server.listen_unix(str(settings.peer_uds), internal=True)
        except OSError as error:
            raise Unavailable(f"cannot listen on {settings.peer_uds}: {error}") from error
    if settings.peer_port is None:
        return None
    tls = None
    if settings.tls is not None and settings.peer_ca is not None:
        tls = server_context(replace(settings.tls, client_ca=settings.peer_ca))
    with listening(settings.host, settings.peer_port, "--peer-port"):
        bound = await server.listen_tcp(settings.host, settings.peer_port, ssl=tls, internal=True)
    return advertised(bound, settings.advertise)


def advertised(bound: str, advertise: str | None) -> str:
    """The address to tell others: what was said, with the bound port unless it names one; else where we listen.

    Raises:
        Unavailable: we listen on every address, and this machine's name leads to none that others could use.
    """
    host, _, port = bound.rpartition(":")
    if advertise is not None:
        named = advertise.rpartition(":")[2]
        return advertise if named.isdecimal() and not _is_address(advertise) else f"{_bracketed(advertise)}:{port}"
    if not ipaddress.ip_address(host.strip("[]")).is_unspecified:
        return bound
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        found = ""
    if not found or ipaddress.ip_address(found).is_loopback:
        raise Unavailable(f"other instances cannot be told where this one is: {name!r} is no address; use --advertise")
    return f"{_bracketed(str(found))}:{port}"


def _is_address(text: str) -> bool:
    """Whether this is an address alone: an IPv6 one has colons of its own."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def add_peer_methods(
    server: Server,
    router: Router,
    registered: Registered,
    dashboard: Callable[[bytes], Coroutine[Any, Any, Body]] | None = None,
) -> None:
    """Serve what instances ask of each other beside requests: to load a model, and to give up a copy.

    ``dashboard`` answers what other workers of the same command ask for theirs; None: there are none.
    """

    def own(call: ServerCall, body: bytes) -> str:
        if not call.internal:
            raise Unimplemented(f"{call.method} is for other instances")
        return body.decode(errors="replace")

    waiting = Waiting()

    async def load(name: str, haste: Haste) -> Body:
        await registered.load_here(name, haste)
        return b""

    def loader(haste: Haste) -> Callable[[ServerCall, bytes], None]:
        return lambda call, body: waiting.start(call, load(own(call, body), haste), "Load")

    def unload(call: ServerCall, body: bytes) -> bytes:
        router.unload_copies(own(call, body))
        return b""

    if dashboard is not None:
        server.add_unary(
            DASHBOARD_PATH, lambda call, body: waiting.start(call, dashboard(own(call, body).encode()), "Dashboard")
        )
    for haste in Haste:
        server.add_unary(haste.value, loader(haste))
    server.add_unary(UNLOAD_PATH, unload)
