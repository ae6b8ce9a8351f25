"""What every registry does, whatever holds it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from mmcore.errors import NotFound
from mmcore.registry import CorruptRecord, InstanceRecord, ModelRecord, NotLeader, Registry, VModelRecord
from mmcore.registry.store import Write
from tests.registries import Registries, until


def counted(record: ModelRecord | None) -> ModelRecord:
    """The record with one reference more."""
    before = record or ModelRecord("t")
    return replace(before, references=before.references + 1)


async def test_a_record_is_created_changed_and_deleted(registries: Registries) -> None:
    registry = await registries.open("a")
    models = registry.models
    assert models.get("m") is None
    assert "m" not in models
    assert await models.update("m", lambda before: ModelRecord("t", "p") if before is None else before) == ModelRecord(
        "t", "p"
    )
    assert models.get("m") == ModelRecord("t", "p") == await models.read("m")
    assert list(models) == ["m"]
    assert len(models) == 1
    await models.update("m", lambda before: replace(before, references=2) if before else None)
    assert models.get("m") == ModelRecord("t", "p", references=2)
    assert await models.update("m", lambda _: None) is None
    assert models.get("m") is None
    assert await models.read("m") is None
    assert await models.update("m", lambda _: None) is None


async def test_ids_are_any_text_and_tables_are_apart(registries: Registries) -> None:
    registry = await registries.open("a")
    other = await registries.open("b")
    ids = ["a/b//c", "ünï cødé", "models/x", " ", "..", "%00"]
    for name in ids:
        await registry.models.update(name, lambda _, name=name: ModelRecord(name))
    await registry.vmodels.update("models/x", lambda _: VModelRecord("o"))
    await until(lambda: "models/x" in other.vmodels and len(other.models) == len(ids))
    assert {name: record.type for name in other.models if (record := other.models.get(name))} == {
        one: one for one in ids
    }
    assert other.vmodels.get("models/x") == VModelRecord("o")


async def test_changes_reach_the_other_instances_and_their_listeners(registries: Registries) -> None:
    a, b = await registries.open("a"), await registries.open("b")
    heard: list[tuple[str, ModelRecord | None]] = []
    stop = b.models.listen(lambda name: heard.append((name, b.models.get(name))))
    await a.models.update("m", lambda _: ModelRecord("one"))
    await until(lambda: heard)
    await a.models.update("m", lambda _: ModelRecord("two"))
    await until(lambda: len(heard) == 2)
    await a.models.update("m", lambda _: None)
    await until(lambda: len(heard) == 3)
    assert heard == [("m", ModelRecord("one")), ("m", ModelRecord("two")), ("m", None)]
    stop()
    await a.models.update("m", lambda _: ModelRecord("three"))
    await until(lambda: "m" in b.models)
    assert len(heard) == 3


async def test_a_listener_may_go_while_they_are_told(registries: Registries) -> None:
    registry = await registries.open("a")
    heard: list[str] = []

    def once(name: str) -> None:
        heard.append(f"once {name}")
        stop()

    stop = registry.models.listen(once)
    registry.models.listen(heard.append)
    await registry.models.update("m", counted)
    await registry.models.update("n", counted)
    assert heard == ["once m", "m", "n"]


async def test_a_text_is_found_in_a_record_that_is_not_read(registries: Registries) -> None:
    registry = await registries.open("a")
    await registry.models.update("m", lambda _: ModelRecord("t", "some/path"))
    assert registry.models.mentions("m", b"some/path")
    assert not registry.models.mentions("m", b"another/path")
    assert not registry.models.mentions("n", b"")


async def test_a_listener_that_fails_does_not_keep_changes_from_others(registries: Registries) -> None:
    registry = await registries.open("a")
    heard: list[str] = []

    def fail(name: str) -> None:
        raise RuntimeError(name)

    registry.models.listen(fail)
    registry.models.listen(heard.append)
    await registry.models.update("m", counted)
    await registry.models.update("n", counted)
    assert heard == ["m", "n"]


async def test_concurrent_updates_of_one_record_lose_nothing(registries: Registries) -> None:
    opened = [await registries.open(name) for name in ("a", "b", "c")]
    await asyncio.gather(*(registry.models.update("m", counted) for registry in opened for _ in range(20)))
    record = await opened[0].models.read("m")
    assert record is not None
    assert record.references == 60
    await until(lambda: all(registry.models.get("m") == record for registry in opened))


async def test_a_change_decides_on_the_latest_record_even_where_the_table_is_behind(registries: Registries) -> None:
    """B has not seen A's registration when it is asked to delete the model, or to refuse what is registered."""
    a, b = await registries.open("a"), await registries.open("b")
    b._tasks[0].cancel()
    await a.models.update("m", lambda _: ModelRecord("t"))
    assert b.models.get("m") is None

    def deleted(record: ModelRecord | None) -> None:
        if record is None:
            raise NotFound("model not found")

    await b.models.update("m", deleted)
    assert await a.models.read("m") is None
    with pytest.raises(NotFound, match="model not found"):
        await b.models.update("m", deleted)


async def test_a_change_that_raises_changes_nothing(registries: Registries) -> None:
    registry = await registries.open("a")
    await registry.models.update("m", counted)

    def refuse(records: list[ModelRecord | None]) -> list[ModelRecord | None]:
        raise NotFound(f"{len(records)} records refused")

    with pytest.raises(NotFound, match="2 records refused"):
        await registry.commit([(registry.models, "m"), (registry.models, "n")], refuse)
    assert registry.models.get("m") == ModelRecord("t", references=1)


async def test_several_records_change_together_or_not_at_all(registries: Registries) -> None:
    """Two models exchange a reference; whoever looks sees both records before or both after."""
    a, b = await registries.open("a"), await registries.open("b")
    await a.models.update("x", lambda _: ModelRecord("t", references=50))
    await a.models.update("y", lambda _: ModelRecord("t", references=50))
    await until(lambda: "x" in b.models and "y" in b.models)
    sums: set[int] = set()

    def look(_: str) -> None:
        x, y = b.models.get("x"), b.models.get("y")
        assert x and y
        sums.add(x.references + y.references)

    def move(records: list[ModelRecord]) -> list[ModelRecord]:
        x, y = records
        return [replace(x, references=x.references - 1), replace(y, references=y.references + 1)]

    keys = [(a.models, "x"), (a.models, "y")]
    theirs = [(b.models, "x"), (b.models, "y")]
    await asyncio.gather(*(a.commit(keys, move) for _ in range(10)), *(b.commit(theirs, move) for _ in range(10)))
    b.models.listen(look)
    await asyncio.gather(*(a.commit(keys, move) for _ in range(10)))
    await until(lambda: b.models.get("y") == ModelRecord("t", references=80))
    record = await b.models.read("x")
    assert record == ModelRecord("t", references=20)


async def test_a_transaction_spans_tables_and_checks_records_that_it_leaves_alone(registries: Registries) -> None:
    a, b = await registries.open("a"), await registries.open("b")
    await a.models.update("m", lambda _: ModelRecord("t"))
    seen: list[ModelRecord | None] = []

    def point(records: list[object]) -> list[object]:
        _, model = records
        assert model is None or isinstance(model, ModelRecord)
        seen.append(model)
        if model is None:
            raise NotFound("model not found")
        return [VModelRecord("o", "m", "m"), model]

    await until(lambda: "m" in b.models)
    b._tasks[0].cancel()
    await a.models.update("m", lambda _: None)
    with pytest.raises(NotFound, match="model not found"):
        await b.commit([(b.vmodels, "v"), (b.models, "m")], point)
    assert seen == [ModelRecord("t"), None]
    assert await a.vmodels.read("v") is None


async def test_unknown_fields_survive_an_update_by_an_older_version(registries: Registries) -> None:
    registry = await registries.open("a")
    await registry._store.transact({}, [Write("models/m", b'{"type":"t","tier":7,"copies":{"i":{"device":"gpu0"}}}')])
    await until(lambda: "m" in registry.models)
    await registry.models.update("m", counted)
    entry = await registry._store.read("models/m")
    assert entry is not None
    assert json.loads(entry.value) == {"type": "t", "tier": 7, "copies": {"i": {"device": "gpu0"}}, "references": 1}


async def test_a_record_that_cannot_be_read_harms_no_other_and_is_left_alone(registries: Registries) -> None:
    registry = await registries.open("a")
    await registry._store.transact({}, [Write("models/bad", b'{"type":7}'), Write("models/good", b'{"type":"t"}')])
    await until(lambda: len(registry.models) == 2)
    assert registry.models.get("bad") is None
    assert registry.models.get("good") == ModelRecord("t")
    with pytest.raises(CorruptRecord, match="'bad': type is a int"):
        await registry.models.read("bad")
    with pytest.raises(CorruptRecord, match="'bad'"):
        await registry.models.update("bad", counted)
    entry = await registry._store.read("models/bad")
    assert entry is not None
    assert entry.value == b'{"type":7}'


async def test_a_joining_instance_has_a_big_table_and_misses_none_of_the_changes_meanwhile(
    registries: Registries,
) -> None:
    a = await registries.open("a")
    entries = [(f"models/m{number}", b'{"type":"t"}') for number in range(12_000)]
    for start in range(0, len(entries), 100):
        await a._store.create_missing(entries[start : start + 100])
    done = asyncio.Event()

    async def write() -> int:
        count = 0
        while not done.is_set():
            await a.models.update(f"m{count % 12_000}", counted)
            await a.models.update(f"new{count}", counted)
            if count % 3 == 0:
                await a.models.update(f"new{count}", lambda _: None)
            count += 1
        return count

    writing = asyncio.create_task(write())
    b = await registries.open("b")
    done.set()
    assert await writing > 0
    await until(lambda: b._version >= a._version and len(b.models) == len(a.models))
    assert {name: b.models.get(name) for name in b.models} == {name: a.models.get(name) for name in a.models}


async def test_an_instance_is_known_while_it_lives(registries: Registries) -> None:
    a = await registries.open("a")
    b = await registries.open("b")
    await a.publish(InstanceRecord("10.0.0.1:1"))
    await until(lambda: b.instances.get("a") == InstanceRecord("10.0.0.1:1"))
    await a.publish(InstanceRecord("10.0.0.1:1", draining=True))
    await until(lambda: b.instances.get("a") == InstanceRecord("10.0.0.1:1", draining=True))
    await a.close()
    await until(lambda: "a" not in b.instances, timeout_s=5)


def stop_renewing(registry: Registry) -> None:
    """As if the process were frozen: it neither renews its lease nor sees what changes."""
    for task in registry._tasks:
        task.cancel()


async def test_an_instance_that_stops_renewing_its_lease_is_gone(registries: Registries) -> None:
    a = await registries.open("a", lease_s=1)
    b = await registries.open("b")
    await a.publish(InstanceRecord("10.0.0.1:1"))
    await until(lambda: "a" in b.instances)
    stop_renewing(a)
    await until(lambda: "a" not in b.instances)


async def test_an_instance_whose_lease_expired_publishes_itself_again(registries: Registries) -> None:
    a = await registries.open("a", lease_s=1)
    b = await registries.open("b")
    await a.publish(InstanceRecord("10.0.0.1:1"))
    await until(lambda: "a" in b.instances)
    lease = a._presence._lease
    await b._store.revoke(lease)
    await until(lambda: a._presence._lease != lease and a._presence._written)
    await until(lambda: b.leader and not a.leader)
    assert await b.instances.read("a") == InstanceRecord("10.0.0.1:1")


async def test_one_instance_leads_and_another_takes_over_when_it_leaves(registries: Registries) -> None:
    a = await registries.open("a")
    await until(lambda: a.leader)
    b, c = await registries.open("b"), await registries.open("c")
    await until(lambda: len(b._presence._candidates) == len(c._presence._candidates) == 3)
    heard: list[bool] = []
    b.listen_leader(heard.append)
    assert [one.leader for one in (a, b, c)] == [True, False, False]
    await a.close()
    await until(lambda: b.leader or c.leader)
    assert (a.leader, b.leader, c.leader) == (False, True, False)
    assert heard == [True]


async def test_a_deposed_leader_writes_nothing(registries: Registries) -> None:
    """A freezes as the leader and wakes when B leads; it cannot tell, but its write is refused."""
    a = await registries.open("a", lease_s=1)
    await until(lambda: a.leader)
    await a.models.update("m", counted, fenced=True)
    b = await registries.open("b")
    with pytest.raises(NotLeader, match="instance b is not the leader"):
        await b.models.update("m", counted, fenced=True)
    stop_renewing(a)
    await until(lambda: b.leader)
    assert not a.leader
    a._presence._expires_at += 3600
    assert a.leader
    with pytest.raises(NotLeader):
        await a.models.update("m", counted, fenced=True)
    with pytest.raises(NotLeader):
        await a.models.update("m", lambda before: before, fenced=True)
    await b.models.update("m", counted, fenced=True)
    assert await b.models.read("m") == ModelRecord("t", references=2)
