"""What becomes of a request when the instances that were to answer it cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from mmcore.errors import LoadFailed, Status
from mmcore.registry import CopyRecord, FailureRecord, InstanceRecord, MemoryStore, ModelRecord, Registry
from mmcore.routing import losses, reports
from mmcore.routing.actions import Haste
from mmcore.routing.hops import Mode, not_here
from mmcore.routing.losses import FEW_LOADS
from mmcore.routing.status import ModelState
from mmcore.transport import Server, ServerCall
from tests.etcds import free_port
from tests.unit.routing.instances_in_memory import until
from tests.unit.routing.mesh_in_memory import MeshMember

FAILED = LoadFailed("the weights are missing")
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


async def test_a_copy_that_has_gone_from_here_keeps_nobody_from_loading_it_anew(
    member: MeshMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record tells of it for some moments more; meanwhile the only other holder closes its connections at once."""
    monkeypatch.setattr(reports, "GATHER_S", 0.5)
    closes = asyncio.Event()

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closes.wait()
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as listener:
        address = "{}:{}".format(*listener.sockets[0].getsockname())
        await member.registry.instances.update("dead", lambda _: InstanceRecord(address, capacity_bytes=2**30))
        await until(lambda: member.mesh.forwarding.peers["dead"].address == address)
        call = Call()
        assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
        await member.router.load("m")
        await until(lambda: "alive" in (member.registry.models.get("m") or ModelRecord("t")).copies)
        member.router.unload_copies("m")
        closes.set()
        await until(lambda: call.outcome)
    assert "alive" in (member.registry.models.get("m") or ModelRecord("t")).copies
    assert call.outcome == ["here"]


async def test_the_last_instance_answers_though_it_is_about_to_leave(member: MeshMember) -> None:
    member.draining = True
    for held in (True, False):
        call = Call()
        assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH) == held
        await until(lambda call=call, held=held: call.outcome or not held)
        assert call.outcome == ["here"] * held
        await member.registry.models.update("m", lambda record: replace(record or ModelRecord(), copies={}))
        await member.registry.instances.update("dead", lambda _: None)
        await until(lambda: member.mesh.members.cluster.get("dead") is None)


async def test_what_cannot_be_answered_here_nor_elsewhere_fails_and_does_not_hang(member: MeshMember) -> None:
    await member.registry.instances.update(
        "gone", lambda _: InstanceRecord(f"127.0.0.1:{free_port()}", capacity_bytes=2**40)
    )
    for elsewhere in (partial(member.mesh.load_elsewhere, failure=FAILED), member.mesh.answer_elsewhere):
        call = Call()
        assert elsewhere(call, b"", "m", path=PATH)
        await until(lambda call=call: call.outcome)
        assert "connect" in call.outcome[0] or "reached" in call.outcome[0]


@dataclass
class Others:
    """Other instances with much room, which do with a request what ``answer`` does; ``asked`` tells which were."""

    registry: Registry
    servers: list[Server] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    closing: list[asyncio.Future[None]] = field(default_factory=list)

    async def add(self, name: str, answer: Callable[[ServerCall, Server], bytes | None]) -> None:
        server = Server()

        def handle(call: ServerCall, body: bytes) -> bytes | None:
            self.asked.append(name)
            return answer(call, server)

        for path in (PATH, *(haste.value for haste in Haste)):
            server.add_unary(path, handle)
        record = InstanceRecord(await server.listen_tcp("127.0.0.1", 0, internal=True), capacity_bytes=2**40)
        self.servers.append(server)
        await self.registry.instances.update(name, lambda _: record)

    def die(self, call: ServerCall, server: Server) -> None:
        """As the framework under a model may."""
        self.closing.append(asyncio.ensure_future(server.close()))

    def full(self, call: ServerCall, server: Server) -> None:
        call.fail(Status.RESOURCE_EXHAUSTED, "no room")

    def waited_for_nothing(self, call: ServerCall, server: Server) -> None:
        """It was loading the model, and could not."""
        not_here(call, "other", FAILED)


@pytest.fixture
async def others(member: MeshMember) -> AsyncIterator[Others]:
    made = Others(member.registry)
    yield made
    for server in made.servers:
        await server.close()


no_room_here = pytest.mark.parametrize("member", [2**20], indirect=True, ids=["no room here"])


@no_room_here
async def test_a_request_that_ends_whoever_runs_it_ends_two_instances_and_no_more(
    member: MeshMember, others: Others
) -> None:
    """As one that crashes its framework does; each place would have been the next one's turn."""
    for number in range(4):
        await others.add(f"other{number}", others.die)
    call = Call()
    assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
    await until(lambda: call.outcome)
    assert len(others.asked) == 2
    assert "here" not in call.outcome


@no_room_here
@pytest.mark.parametrize("sent", ["for a request", "ahead"])
async def test_a_model_that_ends_whoever_loads_it_ends_two_and_later_one_at_a_time(
    member: MeshMember, others: Others, sent: str
) -> None:
    for number in range(5):
        await others.add(f"other{number}", others.die)
    await member.registry.instances.update("dead", lambda _: None)
    await until(lambda: len(member.mesh.forwarding.peers) == 5)

    async def load() -> str:
        """What becomes of it, and how many were asked."""
        before = len(others.asked)
        call = Call()
        try:
            if sent == "ahead":
                await member.mesh.ensure("m", anew=True)
            elif member.mesh.pass_on(call, b"", "m", call.here, path=PATH):
                await until(lambda: call.outcome)
        except LoadFailed as failed:
            call.outcome.append(str(failed))
        assert "here" not in call.outcome
        asked = others.asked[before:]
        for name in asked:
            await member.registry.instances.update(name, lambda _: None)
            await until(lambda name=name: name not in member.mesh.forwarding.peers)
        return f"{len(asked)}; {call.outcome[0]}"

    now_ms = member.now_ms()
    member.now_ms = lambda: now_ms
    assert (await load()).startswith("2; ")
    assert (await load()).startswith("0; 2 instances ended while they loaded the model")
    # All are told, by the record, and those who ask for its state.
    await until(lambda: len((member.registry.models.get("m") or ModelRecord()).losses) == 2)
    status = member.registered.status("m")
    assert status.state is ModelState.LOADING_FAILED
    assert "it is not loaded again for 60 s" in status.errors[0]
    member.now_ms = lambda: now_ms + 60_001
    assert (await load()).startswith("1; ")
    assert "3 instances ended" in (message := await load())
    assert "it is not loaded again for 120 s" in message
    # One that is registered anew may be another.
    await member.registered.unregister("m")
    await member.add("m")
    assert (await load()).startswith("2; ")


@no_room_here
@pytest.mark.parametrize("models", [FEW_LOADS, FEW_LOADS + 1])
@pytest.mark.parametrize("seen", ["by who asked", "in the records"])
async def test_instances_that_are_lost_while_they_load_many_models_bar_none_of_them(
    member: MeshMember, others: Others, models: int, seen: str
) -> None:
    """As when two machines are lost one after the other, the second with what it had to take over from the first."""
    names = [f"model-{number}" for number in range(models)]
    for name in names:
        await member.add(name)
    for lost in ("one", "two"):
        assert all(not member.registered.status(name).errors for name in names)
        if seen == "by who asked":
            await others.add(lost, lambda call, server: None)
            await until(lambda lost=lost: lost in member.mesh.forwarding.peers)
            before = len(others.asked)
            for name in names:
                member.mesh.forwarding.unary(
                    Call(), b"", name, member.mesh.forwarding.holders([lost]), mode=Mode.LOAD, path=PATH
                )
            await until(lambda before=before: len(others.asked) == before + models)
            await others.servers[-1].close()
            await until(lambda lost=lost: not member.mesh.forwarding.peers[lost].usable)
        else:
            await member.registry.instances.update(lost, lambda _: InstanceRecord())
            for name in names:

                def loads(record: ModelRecord | None, lost: str = lost) -> ModelRecord:
                    assert record is not None
                    return replace(record, copies={**record.copies, lost: CopyRecord("LOADING", member.now_ms())})

                await member.registry.models.update(name, loads)
            await until(lambda lost=lost: member.mesh.losses.loads.count(lost) == models)
            await member.registry.instances.update(lost, lambda _: None)
    await until(lambda: seen != "by who asked" or _losses(member, names[-1]) == 2)
    # They are pruned one after the other: what has been pruned still counts.
    if seen != "by who asked":
        await until(lambda: "two" not in member.registry.instances)
        for name in names[:-1]:
            await member.registry.models.update(name, lambda record: replace(record or ModelRecord(), copies={}))
    assert ("2 instances ended" in str(member.registered.status(names[-1]).errors)) == (models <= FEW_LOADS)


def _losses(member: MeshMember, model: str) -> int:
    return len((member.registry.models.get(model) or ModelRecord()).losses)


@no_room_here
async def test_a_model_whose_requests_end_two_instances_one_by_one_is_not_loaded_at_the_next(
    member: MeshMember, others: Others
) -> None:
    for number in range(2):
        name = f"other{number}"
        await others.add(name, others.die)
        await member.registry.instances.update("dead", lambda _: None)
        await until(lambda name=name: set(member.mesh.forwarding.peers) == {name})
        call = Call()
        member.mesh.forwarding.unary(call, b"", "m", member.mesh.forwarding.holders([name]), path=PATH)
        await until(lambda call=call, number=number: call.outcome and _losses(member, "m") == number + 1)
        await member.registry.instances.update(name, lambda _: None)
        await until(lambda: not member.mesh.forwarding.peers)
    with pytest.raises(LoadFailed, match="2 instances ended while they loaded the model or answered it"):
        await member.mesh.load_at("alive", "m")


@no_room_here
@pytest.mark.parametrize("why", ["requests for others were there too", "only the connection was lost"])
async def test_requests_that_need_not_have_ended_an_instance_count_for_nothing(
    member: MeshMember, others: Others, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why.startswith("only"):
        # On a busy machine, too, it is reached again by then.
        monkeypatch.setattr(losses, "GONE_AFTER_S", 1.0)
    await others.add("other", lambda call, server: None)
    await member.add("n")
    await until(lambda: "other" in member.mesh.forwarding.peers)
    peer = member.mesh.forwarding.peers["other"]
    models = ["m", "n"] if why.startswith("requests") else ["m"]
    calls = [Call() for _ in models]
    for model, call in zip(models, calls, strict=True):
        member.mesh.forwarding.unary(call, b"", model, (peer,), path=PATH)
    await until(lambda: len(others.asked) == len(models))
    if why.startswith("requests"):
        await others.servers[0].close()
    else:
        connection = peer.connection()
        assert connection is not None
        connection.abort()
    await until(lambda: all(call.outcome for call in calls))
    await until(lambda: not any(task.get_name().startswith("note what") for task in asyncio.all_tasks()))
    assert "ended while" not in caplog.text
    assert _losses(member, "m") == 0


async def test_loads_of_instances_that_are_gone_count(member: MeshMember) -> None:
    for gone in ("one", "two"):
        assert member.registered.status("m").errors == ()

        def loads(record: ModelRecord | None, gone: str = gone) -> ModelRecord:
            assert record is not None
            return replace(record, copies={**record.copies, gone: CopyRecord("LOADING", member.now_ms())})

        await member.registry.models.update("m", loads)
    assert "2 instances ended" in member.registered.status("m").errors[0]
    with pytest.raises(LoadFailed, match="2 instances ended"):
        await member.mesh.load_at("alive", "m")


async def test_a_load_that_an_instance_gives_up_as_it_leaves_does_not_count() -> None:
    store = MemoryStore()
    leaving, staying = await MeshMember("leaving", store).start(), await MeshMember("staying", store).start()
    await leaving.add("m")
    leaving.loader.gate("m")
    load = leaving.router.load("m")

    def copies() -> set[str]:
        return set((staying.registry.models.get("m") or ModelRecord()).copies)

    await until(lambda: copies() == {"leaving"})
    await leaving.registered.close()
    await until(lambda: copies() == set())
    load.cancel()
    for one in (leaving, staying):
        await one.close()


@pytest.mark.parametrize(("member", "end"), [(2**30, "here"), (2**20, str(FAILED))], indirect=["member"])
async def test_who_waited_for_a_load_that_failed_is_answered_elsewhere_or_hears_why(
    member: MeshMember, others: Others, end: str
) -> None:
    await others.add("other", others.waited_for_nothing)
    await member.registry.instances.update("dead", lambda _: None)

    def loads(record: ModelRecord | None) -> ModelRecord:
        assert record is not None
        return replace(record, copies={"other": CopyRecord("LOADING", 1)})

    await member.registry.models.update("m", loads)
    call = Call()
    assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
    await until(lambda: call.outcome)
    assert (others.asked, call.outcome) == (["other"], [end])


@no_room_here
async def test_each_instance_is_tried_once_although_its_failure_is_in_no_record(
    member: MeshMember, others: Others
) -> None:
    for number in range(3):
        await others.add(f"other{number}", others.full)
    call = Call()
    assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
    await until(lambda: call.outcome)
    assert sorted(others.asked) == ["other0", "other1", "other2"]
    assert call.outcome == ["no room"]


@no_room_here
async def test_a_failure_by_a_clock_that_is_ahead_stands_no_longer_than_others(
    member: MeshMember, others: Others
) -> None:
    await others.add("other", lambda call, server: b"")
    await until(lambda: "other" in member.mesh.forwarding.peers)
    for ahead_ms, outcome in ((0, str(FAILED)), (20 * 60_000, "answered elsewhere")):
        failure = FailureRecord(member.now_ms() + ahead_ms, str(FAILED))
        await member.registry.models.update(
            "m",
            lambda record, failure=failure: replace(record or ModelRecord(), copies={}, failures={"other": failure}),
        )
        await member.registry.instances.update("dead", lambda _: None)
        await until(lambda: member.mesh.members.cluster.get("dead") is None)
        call = Call()
        try:
            assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
            await until(lambda call=call: call.outcome)
        except LoadFailed as failed:
            call.outcome.append(str(failed))
        assert call.outcome == [outcome]


@no_room_here
async def test_one_that_is_silent_is_asked_where_there_is_no_other(member: MeshMember, others: Others) -> None:
    for name in ("silent", "other"):
        await others.add(name, lambda call, server: b"")
    peers = member.mesh.forwarding.peers
    await until(lambda: {"silent", "other"} <= set(peers))
    await member.registry.instances.update("dead", lambda _: None)
    peers["silent"].silent = True
    for gone, asked in ((None, "other"), ("other", "silent")):
        if gone is not None:
            await member.registry.instances.update(gone, lambda _: None)
            await until(lambda gone=gone: gone not in peers)
        call = Call()
        assert member.mesh.pass_on(call, b"", "m", call.here, path=PATH)
        await until(lambda call=call: call.outcome)
        assert (others.asked[-1], call.outcome) == (asked, ["answered elsewhere"])


async def test_who_has_loaded_it_since_answers(member: MeshMember, others: Others) -> None:
    """Where a copy is there is no place for another one, so the request failed."""
    await others.add("other", lambda call, server: b"")

    def holds(record: ModelRecord | None) -> ModelRecord:
        assert record is not None
        return replace(record, copies={"other": CopyRecord("LOADED", 1)})

    await member.registry.models.update("m", holds)
    call = Call()
    assert member.mesh.load_elsewhere(call, b"", "m", FAILED, path=PATH)
    await until(lambda: call.outcome)
    assert call.outcome == ["answered elsewhere"]


@pytest.mark.parametrize("known", [True, False], ids=["known to be dead", "not known yet"])
async def test_an_instance_that_leaves_hands_over_to_those_that_live(
    member: MeshMember, others: Others, known: bool
) -> None:
    """What a dead one holds by the record is handed over as well, and where it is chosen the next one is asked."""
    await others.add("other", lambda call, server: b"")
    await until(lambda: len(member.mesh.forwarding.peers) == 2)
    await member.add("n")
    for name in ("m", "n"):
        await member.router.load(name)
        await until(lambda name=name: "alive" in (member.registry.models.get(name) or ModelRecord()).copies)
        member.router.lookup_model(name)
    if known:
        call = Call()
        member.mesh.forwarding.unary(
            call, b"", "m", member.mesh.forwarding.holders(["dead"]), path=PATH, instead=lambda *_: call.here()
        )
        await until(lambda: call.outcome)
    else:
        # It has been promised room there.
        member.mesh.members.cluster.reserve("dead", "n", 10, member.now_ms())
    member.draining = True
    await member.mesh.leave(10.0)
    assert others.asked == ["other"] * (2 if known else 1)
    assert len(member.router.copies()) == (0 if known else 1)


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
