"""What becomes of a request when the instances that were to answer it cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mmcore.registry import CopyRecord, InstanceRecord, MemoryStore, ModelRecord
from mmcore.transport import Server, ServerCall
from tests.etcds import free_port
from tests.unit.routing.instances_in_memory import until
from tests.unit.routing.mesh_in_memory import MeshMember

PATH = "/inference.GRPCInferenceService/ModelInfer"


class Call:
    """A client's call as the mesh sees it: what became of it is in ``outcome``."""

    metadata: tuple[tuple[str, str], ...] = ()
    cancelled = False
    on_cancel: Any = None

    def __init__(self) -> None:
        self.outcome: list[str] = []
        self.deadline = time.monotonic() + 30

    def reply(self, message: bytes) -> None:
        self.outcome.append("answered elsewhere")

    def fail(self, status: int, text: str) -> None:
        self.outcome.append(text)

    def here(self) -> None:
        self.outcome.append("here")


@pytest.fixture
async def member(request: pytest.FixtureRequest) -> AsyncIterator[MeshMember]:
    """An instance beside one that is dead and still in the registry, as the only holder of model ``m``."""
    store = MemoryStore()
    one = await MeshMember("alive", store, capacity_bytes=getattr(request, "param", 2**30)).start()
    await one.add("m")
    other = one.registry.instances

    def dead_holds(record: ModelRecord | None) -> ModelRecord:
        assert record is not None
        return ModelRecord(record.type, record.path, copies={"dead": CopyRecord("LOADED", 1)})

    await other.update("dead", lambda _: InstanceRecord(f"127.0.0.1:{free_port()}", capacity_bytes=2**30))
    await one.registry.models.update("m", dead_holds)
    await until(lambda: one.mesh.members.cluster.get("dead") is not None)
    yield one
    await one.close()


async def test_a_request_is_answered_here_when_all_others_are_gone(member: MeshMember) -> None:
    call = Call()
    assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
    await until(lambda: call.outcome)
    assert call.outcome == ["here"]


async def test_requests_wait_for_the_load_that_is_under_way_here_when_all_others_are_gone(member: MeshMember) -> None:
    """The record says that this instance has it on its way, so placement would not name it."""
    gate = member.loader.gate("m")
    load = asyncio.ensure_future(member.router.load("m"))
    await until(lambda: "alive" in (member.registry.models.get("m") or ModelRecord("t")).copies)
    call = Call()
    assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
    await until(lambda: call.outcome)
    assert call.outcome == ["here"]
    gate.set()
    await load


async def test_what_cannot_be_answered_here_nor_elsewhere_fails_and_does_not_hang(member: MeshMember) -> None:
    await member.registry.instances.update(
        "gone", lambda _: InstanceRecord(f"127.0.0.1:{free_port()}", capacity_bytes=2**40)
    )
    for elsewhere in (member.mesh.load_elsewhere, member.mesh.answer_elsewhere):
        call = Call()
        assert elsewhere(call, b"", "m", path=PATH)
        await until(lambda call=call: call.outcome)
        assert "cannot connect" in call.outcome[0]


@pytest.mark.parametrize("member", [2**20], indirect=True, ids=["no room here"])
async def test_a_request_that_ends_whoever_runs_it_ends_two_instances_and_no_more(member: MeshMember) -> None:
    """As one that crashes its framework does; each place would have been the next one's turn."""
    servers = [Server() for _ in range(4)]
    asked: list[int] = []
    closing: list[asyncio.Future[None]] = []
    try:
        for number, server in enumerate(servers):

            def end(call: ServerCall, body: bytes, number: int = number) -> None:
                asked.append(number)
                closing.append(asyncio.ensure_future(servers[number].close()))

            server.add_unary(PATH, end)
            address = await server.listen_tcp("127.0.0.1", 0, internal=True)
            record = InstanceRecord(address, capacity_bytes=2**40)
            await member.registry.instances.update(f"poor{number}", lambda _, record=record: record)
        call = Call()
        assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
        await until(lambda: call.outcome)
    finally:
        for server in servers:
            await server.close()
    assert (len(asked), call.outcome) == (2, call.outcome[:1])
    assert "here" not in call.outcome


async def test_a_clock_that_is_set_back_stops_no_upkeep_and_keeps_nothing_from_being_handed_over(
    member: MeshMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    await member.router.load("m")
    await until(lambda: "alive" in (member.registry.models.get("m") or ModelRecord("t")).copies)
    now_ns = time.time_ns()
    for ago_s in (0, 7200):
        monkeypatch.setattr(time, "time_ns", lambda ago_s=ago_s: now_ns - ago_s * 10**9)
        for _ in range(100):
            member.router.lookup_model("m")
        await member.mesh.upkeep.look()
        (model,) = member.mesh.upkeep.held()
        assert model.demand.minutes & 1
        # Seen from one look to the next, of which the clock says that no time has passed between them.
        assert model.demand.requests_per_minute < 1e6
