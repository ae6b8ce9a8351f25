"""The address that other instances are told, and the listener behind it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mmcore.config import ServeSettings
from mmcore.errors import Unavailable
from mmcore.routing.hops import Arrival, Mode, arrival_of
from mmcore.server.peer import advertised, listen_for_peers
from mmcore.transport import Channel, Server, ServerCall


@pytest.mark.parametrize(
    ("bound", "advertise", "told"),
    [
        ("127.0.0.1:4000", None, "127.0.0.1:4000"),
        ("[::1]:4000", None, "[::1]:4000"),
        ("0.0.0.0:4000", "10.1.2.3", "10.1.2.3:4000"),
        ("0.0.0.0:4000", "10.1.2.3:5000", "10.1.2.3:5000"),
        ("0.0.0.0:4000", "pod-1.mesh.local", "pod-1.mesh.local:4000"),
        ("[::]:4000", "fd00::12", "[fd00::12]:4000"),
        ("[::]:4000", "[fd00::12]:5000", "[fd00::12]:5000"),
    ],
)
def test_what_is_told(bound: str, advertise: str | None, told: str) -> None:
    assert advertised(bound, advertise) == told


def test_an_instance_that_listens_everywhere_tells_what_its_name_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.9.8.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert advertised("0.0.0.0:4000", None) == "10.9.8.7:4000"
    found[0] = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    with pytest.raises(Unavailable, match="--advertise"):
        advertised("0.0.0.0:4000", None)


async def test_only_the_peer_port_takes_the_metadata_of_instances(tmp_path: Path) -> None:
    server = Server()
    seen: list[Arrival | None] = []

    def look(call: ServerCall, body: bytes) -> bytes:
        seen.append(arrival_of(call))
        return b""

    server.add_unary("/a.A/Look", look)
    assert await listen_for_peers(server, ServeSettings()) is None
    told = await listen_for_peers(server, ServeSettings(peer_port=0))
    unix = await listen_for_peers(server, ServeSettings(peer_port=0, peer_uds=tmp_path / "peer.sock"))
    assert unix == f"unix:{tmp_path / 'peer.sock'}"
    serving = await server.listen_tcp("127.0.0.1", 0)
    headers = ("load 1 a,b", "hit 2", "nonsense", "load x a")
    for target in (told, unix, serving):
        assert target is not None
        channel = Channel(target)
        for value in headers:
            await channel.unary("/a.A/Look", b"", metadata=[("mmcore-forward", value)], timeout_s=10)
        await channel.close()
    known = [
        (Mode.LOAD, 1, ("a", "b"), ""),
        (Mode.HIT, 2, (), ""),
        (Mode.HIT, 2, (), ""),  # what cannot be read goes no further
        (Mode.HIT, 2, (), ""),
    ]
    assert seen == [*known, *known, None, None, None, None]
    assert [arrival.goes_on for arrival in seen[:4] if arrival is not None] == [True, False, False, False]
    await server.close()


async def test_a_peer_port_that_is_taken_is_named() -> None:
    server = Server()
    _, _, port = (await server.listen_tcp("127.0.0.1", 0)).rpartition(":")
    with pytest.raises(Unavailable, match="--peer-port"):
        await listen_for_peers(server, ServeSettings(peer_port=int(port)))
    with pytest.raises(Unavailable, match="cannot listen on /nowhere"):
        await listen_for_peers(server, ServeSettings(peer_uds=Path("/nowhere/peer.sock")))
    await server.close()
