"""Addresses to listen on: one, or all of both families."""

from __future__ import annotations

import asyncio
import socket

import pytest

from mmcore.config import ServeSettings
from mmcore.server.peer import listen_for_peers
from mmcore.transport import Channel, Server, ServerCall
from mmcore.transport.listening import EVERYWHERE, bound, listen, named


def has_ipv6() -> bool:
    try:
        bound("::1", 0, reuse_port=False).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (("10.0.0.1", 5), "10.0.0.1:5"),
        (("fd00::12", 5, 0, 0), "[fd00::12]:5"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1:5"),
    ],
)
def test_addresses_are_written_with_their_ports(address: tuple[str, int], name: str) -> None:
    assert named(address) == name


@needs_ipv6
async def test_everywhere_is_both_families_and_callers_go_by_their_own_addresses() -> None:
    server = Server()
    seen: list[str] = []

    def look(call: ServerCall, body: bytes) -> bytes:
        seen.append(str(call.peer))
        return b""

    server.add_unary("/a.A/Look", look)
    told = await server.listen_tcp(EVERYWHERE, 0)
    port = told.removeprefix("[::]:")
    for target in (f"127.0.0.1:{port}", f"[::1]:{port}"):
        channel = Channel(target)
        await channel.unary("/a.A/Look", b"", timeout_s=10)
        await channel.close()
    assert [one.rpartition(":")[0] for one in seen] == ["127.0.0.1", "[::1]"]
    await server.drain(0)


async def test_everywhere_is_all_of_ipv4_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    listener = await listen(asyncio.Protocol, EVERYWHERE, 0)
    assert listener.sockets[0].getsockname()[0] == "0.0.0.0"
    listener.close()


@needs_ipv6
async def test_a_pod_of_ipv6_alone_tells_its_address_in_brackets() -> None:
    server = Server()
    # What the controller's Deployments say: the pod's address without a port.
    told = await listen_for_peers(server, ServeSettings(host=EVERYWHERE, peer_port=0, advertise="fd00::12"))
    assert told is not None and told.startswith("[fd00::12]:")
    await server.drain(0)
