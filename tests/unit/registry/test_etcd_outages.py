"""Etcd stopped, frozen, killed, wiped, compacted, cut off: what is known stays, and everything converges after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mmcore.errors import MmcoreError, Overloaded, Unavailable
from mmcore.registry import InstanceRecord, ModelRecord, Registry, VModelRecord
from tests.cutting import CuttingProxy
from tests.etcds import Etcd, etcdctl, free_port
from tests.registries import EtcdBackend, Registries, until

pytestmark = pytest.mark.slow

#: A write is refused within this time when etcd is away.
PROMPTLY_S = 3.0


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path / "data").start()
    yield etcd
    etcd.kill()


@pytest.fixture
async def registries(etcd: Etcd) -> AsyncIterator[Registries]:
    opened = Registries(EtcdBackend(f"etcd://{etcd.endpoint}/outages"))
    yield opened
    await opened.close()


async def two(registries: Registries, *, lease_s: float = 10.0) -> tuple[Registry, Registry]:
    """Two instances that know each other, three models and a vmodel."""
    a, b = await registries.open("a", lease_s=lease_s), await registries.open("b", lease_s=lease_s)
    await a.publish(InstanceRecord("10.0.0.1:1"))
    await b.publish(InstanceRecord("10.0.0.2:1"))
    for name in ("m1", "m2", "m3"):
        await a.models.update(name, lambda _, name=name: ModelRecord("t", name))
    await a.vmodels.update("v", lambda _: VModelRecord("o", "m1", "m1"))
    await until(lambda: all("v" in one.vmodels and len(one.instances) == 2 for one in (a, b)))
    await until(lambda: a.leader or b.leader)
    return a, b


def used(record: ModelRecord | None) -> ModelRecord:
    assert record is not None
    return replace(record, references=record.references + 1)


async def assert_refused_promptly(registry: Registry) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await registry.models.update("m1", used)
    assert time.monotonic() - started < PROMPTLY_S
    assert registry.models.get("m1") == ModelRecord("t", "m1")
    assert registry.instances.get("b") == InstanceRecord("10.0.0.2:1")


@pytest.mark.parametrize("away", [Etcd.stop, Etcd.kill])
async def test_while_etcd_is_gone_tables_stay_and_writes_are_refused(
    registries: Registries, etcd: Etcd, away: Callable[[Etcd], None]
) -> None:
    a, b = await two(registries)
    away(etcd)
    await until(lambda: not a.connected and not b.connected)
    await assert_refused_promptly(a)
    await asyncio.gather(*(assert_refused_promptly(one) for one in (a, b) for _ in range(10)))
    with pytest.raises(Unavailable):
        await a.models.read("m1")
    with pytest.raises(Unavailable):
        await a.publish(InstanceRecord("10.0.0.1:2"))
    await asyncio.to_thread(etcd.start)
    await until(lambda: a.connected and b.connected)
    await b.models.update("m1", used)
    await until(lambda: a.models.get("m1") == ModelRecord("t", "m1", references=1))
    await until(lambda: b.instances.get("a") == InstanceRecord("10.0.0.1:2"))
    await until(lambda: a.leader != b.leader)


async def test_an_etcd_that_freezes_is_noticed(registries: Registries, etcd: Etcd) -> None:
    a, b = await two(registries, lease_s=3)
    etcd.pause()
    await assert_refused_promptly(a)
    await until(lambda: not a.connected and not b.connected, timeout_s=20)
    await assert_refused_promptly(a)
    await until(lambda: not a.leader and not b.leader)
    etcd.resume()
    await until(lambda: a.connected and b.connected)
    await a.models.update("m2", used)
    await until(lambda: b.models.get("m2") == ModelRecord("t", "m2", references=1))
    await until(lambda: a.leader != b.leader and len(a.instances) == len(b.instances) == 2)


async def test_an_etcd_whose_disk_is_full_refuses_changes_and_tables_stay(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "data", "3.5")
    etcd.grow(2**20)
    etcd.start()
    registries = Registries(EtcdBackend(f"etcd://{etcd.endpoint}/outages"))
    try:
        a, b = await two(registries, lease_s=2)
        with pytest.raises(MmcoreError) as refused:
            async with asyncio.timeout(20):
                for number in range(1000):
                    await a.models.update(f"full-{number}", lambda _: ModelRecord("t", "x" * 100_000))
        assert isinstance(refused.value, Unavailable | Overloaded), refused.value
        assert "space" in str(refused.value)
        # What is there stays, for longer than a lease.
        await asyncio.sleep(3)
        assert all({"m1", "m2", "m3"} <= set(one.models) and set(one.instances) == {"a", "b"} for one in (a, b))
        etcd.stop()
        etcd.grow(2**30)
        etcd.start(wait=False)  # it does not say that it is well
        limits = ("--dial-timeout=20s", "--command-timeout=20s")
        await asyncio.to_thread(etcdctl, "--endpoints", etcd.endpoint, *limits, "alarm", "disarm")
        await until(lambda: a.connected and b.connected)
        await a.models.update("m1", used)
        await until(lambda: b.models.get("m1") == ModelRecord("t", "m1", references=1))
    finally:
        await registries.close()
        etcd.kill()


async def test_a_slow_etcd_takes_its_time_and_nothing_else(etcd: Etcd) -> None:
    way = await CuttingProxy(etcd.endpoint).start()
    registries = Registries(EtcdBackend(f"etcd://{way.endpoint}/outages"))
    try:
        a, b = await two(registries)
        way.delay_s = 0.3
        began = time.monotonic()
        await a.models.update("m1", used)
        assert time.monotonic() - began > way.delay_s
        await until(lambda: b.models.get("m1") == ModelRecord("t", "m1", references=1))
        assert a.connected and b.connected
    finally:
        await registries.close()
        await way.cut()


async def test_an_etcd_that_came_back_empty_gets_back_what_the_instances_know(
    registries: Registries, etcd: Etcd
) -> None:
    a, b = await two(registries)
    heard: list[str] = []
    for one in (a, b):
        one.models.listen(heard.append)
        one.vmodels.listen(heard.append)
    gone: list[str] = []
    b.instances.listen(lambda name: gone.append(name) if name not in b.instances and name == "a" else None)
    etcd.wipe()
    await asyncio.to_thread(etcd.start)
    await until(lambda: a.connected and b.connected)
    # Through the new store, not only in the tables.
    assert await a.models.read("m3") == ModelRecord("t", "m3")
    assert await b.vmodels.read("v") == VModelRecord("o", "m1", "m1")
    await until(lambda: a.leader != b.leader)
    assert await b.instances.read("a") == InstanceRecord("10.0.0.1:1")
    assert await a.instances.read("b") == InstanceRecord("10.0.0.2:1")
    assert not heard
    assert not gone
    c = await registries.open("c")
    assert set(c.models) == {"m1", "m2", "m3"}
    assert set(c.instances) == {"a", "b"}
    await c.models.update("m1", used)
    await until(lambda: a.models.get("m1") == b.models.get("m1") == ModelRecord("t", "m1", references=1))


async def test_an_instance_that_died_with_the_store_is_not_kept_for_long(registries: Registries, etcd: Etcd) -> None:
    a, b = await two(registries, lease_s=1)
    for task in a._tasks:
        task.cancel()
    etcd.wipe()
    await asyncio.to_thread(etcd.start)
    await until(lambda: b.connected)
    await until(lambda: "a" not in b.instances)
    assert b.instances.get("b") == InstanceRecord("10.0.0.2:1")


async def test_a_write_made_from_a_lost_store_is_not_taken_for_one_of_the_new(
    registries: Registries, etcd: Etcd
) -> None:
    """The new store has come as far as the old one by its numbers, with another content; A still holds the old."""
    a, b = await two(registries)
    entry = a.models.entry("m1")
    assert entry is not None
    for task in a._tasks:
        task.cancel()
    etcd.wipe()
    await asyncio.to_thread(etcd.start)
    await until(lambda: b.connected)
    while (record := await b._store.read("models/m1")) is not None and record.version < entry.version:
        await b.models.update("m1", used)
    assert record is not None
    before = await b.models.read("m1")
    assert before is not None
    await a.models.update("m1", used)
    assert await b.models.read("m1") == replace(before, references=before.references + 1)


async def test_a_partitioned_instance_catches_up_with_exactly_what_changed(etcd: Etcd) -> None:
    """Also when the changes in between are not to be had any more, because etcd has compacted them."""
    proxy = await CuttingProxy(etcd.endpoint).start()
    behind = Registries(EtcdBackend(f"etcd://{proxy.endpoint}/outages"))
    others = Registries(EtcdBackend(f"etcd://{etcd.endpoint}/outages"))
    try:
        a, b = await behind.open("a"), await others.open("b")
        for number in range(20):
            await b.models.update(f"m{number}", lambda _: ModelRecord("t"))
        await until(lambda: len(a.models) == 20)
        heard: list[tuple[str, ModelRecord | None]] = []
        a.models.listen(lambda name: heard.append((name, a.models.get(name))))
        for compacts in (False, True):
            await proxy.cut()
            await until(lambda: not a.connected)
            await b.models.update("m1", used)
            await b.models.update("m2", lambda _: None)
            await b.models.update("new", lambda _: ModelRecord("n"))
            await b.models.update("brief", lambda _: ModelRecord("n"))
            await b.models.update("brief", lambda _: None)
            if compacts:
                etcdctl("--endpoints", etcd.endpoint, "compact", str(b._version))
            await proxy.mend()
            await until(lambda: a.connected and a._version >= b._version)
            final = {name: record for name, record in heard if name != "brief"}
            assert final == {"m1": b.models.get("m1"), "m2": None, "new": ModelRecord("n")}
            assert [name for name, _ in heard].count("m1") == 1
            assert set(a.models) == set(b.models)
            heard.clear()
            await b.models.update("m2", lambda _: ModelRecord("t"))
            await b.models.update("new", lambda _: None)
            await until(lambda: "m2" in a.models and "new" not in a.models)
            heard.clear()
    finally:
        await proxy.cut()
        await behind.close()
        await others.close()


async def test_who_was_away_when_records_were_put_back_does_not_undo_what_was_deleted_since(
    registries: Registries, etcd: Etcd
) -> None:
    a, b = await two(registries)
    proxy = await CuttingProxy(etcd.endpoint).start()
    away = Registries(EtcdBackend(f"etcd://{proxy.endpoint}/outages"))
    try:
        x = await away.open("x")
        assert set(x.models) == {"m1", "m2", "m3"}
        await proxy.cut()
        await until(lambda: not x.connected)
        etcd.wipe()
        await until(lambda: not a.connected and not b.connected)
        await asyncio.to_thread(etcd.start)
        await until(lambda: a.connected and b.connected)
        await a.models.update("m3", lambda _: None)
        await proxy.mend()
        await until(lambda: x.connected)
        assert set(x.models) == {"m1", "m2"}
        assert await b.models.read("m3") is None
    finally:
        await proxy.cut()
        await away.close()


async def test_when_a_member_fails_the_next_one_is_used(tmp_path: Path) -> None:
    peers = {f"m{number}": free_port() for number in range(3)}
    members = [Etcd(tmp_path / name, name=name, cluster=peers).start(wait=False) for name in peers]
    try:
        for member in members:
            await asyncio.to_thread(member.wait)
        registries = Registries(EtcdBackend(f"etcd://{','.join(member.endpoint for member in members)}/cluster"))
        a, b = await two(registries)
        for member, away in ((members[0], Etcd.kill), (members[1], Etcd.pause)):
            heard: list[str] = []
            a.models.listen(heard.append)
            away(member)
            if away is Etcd.pause:
                # Two of three are gone: nothing can be written until the first is back.
                await assert_refused_promptly(a)
                await asyncio.to_thread(members[0].start)
            async with asyncio.timeout(20):
                while not heard:
                    try:
                        await b.models.update("m1", used)
                    except Unavailable:
                        await asyncio.sleep(0.05)
            await b.models.update("m1", lambda _: ModelRecord("t", "m1"))
            await until(lambda: a.connected and b.connected and a.models.get("m1") == ModelRecord("t", "m1"))
        await until(lambda: a.leader != b.leader)
        members[1].resume()
        await registries.close()
    finally:
        for member in members:
            member.kill()


async def test_without_etcd_an_instance_does_not_start_and_says_why() -> None:
    started = time.monotonic()
    registries = Registries(EtcdBackend(f"etcd://127.0.0.1:{free_port()}/nothing"))
    with pytest.raises(Unavailable, match=r"cannot connect to etcd: .*refused"):
        await registries.open("a")
    assert time.monotonic() - started < PROMPTLY_S
