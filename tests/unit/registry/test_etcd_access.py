"""Etcd that lets in only who shows a certificate, or a user and a password."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mmcore.errors import Unavailable
from mmcore.registry import ModelRecord
from tests.certificates import Authority
from tests.etcds import Etcd, etcdctl, free_port
from tests.registries import EtcdBackend, Registries, until

pytestmark = pytest.mark.slow

USER, PASSWORD = "mm", "pass word"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def connection(folder: Path, **fields: object) -> EtcdBackend:
    """Who connects with this connection file."""
    file = folder / f"connection-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps({name: str(value) for name, value in fields.items()}))
    return EtcdBackend(f"etcd:{file}")


@pytest.fixture
def secured(authority: Authority, tmp_path: Path) -> Iterator[Etcd]:
    """It has a certificate for another name than its address, and wants one from its clients."""
    own = authority.sign("etcd.example")
    etcd = Etcd(
        tmp_path / "data",
        "3.4",
        *("--cert-file", str(own.certificate), "--key-file", str(own.key)),
        *("--client-cert-auth", "--trusted-ca-file", str(authority.certificate)),
        scheme="https",
    ).start()
    yield etcd
    etcd.kill()


async def works(backend: EtcdBackend) -> None:
    registries = Registries(backend)
    a, b = await registries.open("a"), await registries.open("b")
    await a.models.update("m", lambda _: ModelRecord("t"))
    await until(lambda: b.models.get("m") == ModelRecord("t"))
    await until(lambda: a.leader or b.leader)
    await registries.close()


async def test_certificates(secured: Etcd, authority: Authority, tmp_path: Path) -> None:
    own = authority.sign("instance")
    shown = {"client_key_file": own.key, "client_certificate_file": own.certificate}
    trusted = {"endpoints": secured.url, "certificate_file": authority.certificate}
    named = {"override_authority": "etcd.example"}
    await works(connection(tmp_path, **trusted, **shown, **named))
    for lacking in ({**trusted, **shown}, {**trusted, **named}, {"endpoints": secured.url, **shown, **named}):
        registries = Registries(connection(tmp_path, **lacking))
        with pytest.raises(Unavailable, match="cannot connect to etcd"):
            await registries.open("a")


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Etcd]:
    """It knows root, and a user who may do everything below ``guarded/``."""
    etcd = Etcd(tmp_path / "data").start()
    ctl = ("--endpoints", etcd.endpoint)
    etcdctl(*ctl, "user", "add", "root:root")
    etcdctl(*ctl, "user", "grant-role", "root", "root")
    etcdctl(*ctl, "role", "add", "mesh")
    etcdctl(*ctl, "role", "grant-permission", "mesh", "--prefix=true", "readwrite", "guarded/")
    etcdctl(*ctl, "user", "add", f"{USER}:{PASSWORD}")
    etcdctl(*ctl, "user", "grant-role", USER, "mesh")
    etcdctl(*ctl, "auth", "enable")
    yield etcd
    etcd.kill()


async def test_a_user_and_a_password(guarded: Etcd, tmp_path: Path) -> None:
    fields = {"endpoints": guarded.url, "userid": USER, "root_prefix": "guarded"}
    await works(connection(tmp_path, **fields, password=PASSWORD))
    for wrong, said in (
        ({**fields, "password": "wrong"}, "authentication failed, invalid user ID or password"),
        ({"endpoints": guarded.url, "root_prefix": "guarded"}, "user name is empty"),
        ({**fields, "password": PASSWORD, "root_prefix": "elsewhere"}, "permission denied"),
    ):
        registries = Registries(connection(tmp_path, **wrong))
        with pytest.raises(Unavailable, match=said):
            await registries.open("a")


async def test_a_token_that_is_not_taken_any_more_is_asked_for_anew(guarded: Etcd, tmp_path: Path) -> None:
    """Tokens live for minutes; a change of the users ends them at once."""
    registries = Registries(
        connection(tmp_path, endpoints=guarded.url, userid=USER, password=PASSWORD, root_prefix="guarded")
    )
    a, b = await registries.open("a"), await registries.open("b")
    for number in range(3):
        etcdctl("--endpoints", guarded.endpoint, "--user", "root:root", "user", "add", f"other{number}:p")
        await a.models.update("m", lambda _, number=number: ModelRecord("t", references=number))
        await until(lambda number=number: b.models.get("m") == ModelRecord("t", references=number))
    guarded.stop()
    await until(lambda: not a.connected and not b.connected)
    await asyncio.to_thread(guarded.start)
    await until(lambda: a.connected and b.connected)
    await a.models.update("m", lambda _: ModelRecord("t", references=9))
    await until(lambda: b.models.get("m") == ModelRecord("t", references=9))
    await registries.close()


def write(file: Path, **fields: object) -> None:
    """Replace a connection file in one step, as a kubelet does."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps({name: str(value) for name, value in fields.items()}))
    fresh.rename(file)


@pytest.mark.parametrize("file_first", [True, False])
async def test_another_password_is_used_from_then_on(guarded: Etcd, tmp_path: Path, file_first: bool) -> None:
    fields = {"endpoints": guarded.url, "userid": USER, "root_prefix": "guarded"}
    backend = connection(tmp_path, **fields, password=PASSWORD)
    registries = Registries(backend)
    a, b = await registries.open("a", lease_s=1), await registries.open("b", lease_s=1)
    file = Path(backend.url.removeprefix("etcd:"))
    # What cannot be read changes nothing.
    file.with_suffix(".new").write_text("{")
    file.with_suffix(".new").rename(file)
    await a.models.update("m", lambda _: ModelRecord("t"))
    if file_first:
        write(file, **fields, password="other")
        await a.models.update("m", lambda _: ModelRecord("t", references=1))
    change = ["user", "passwd", USER, "--interactive=false"]
    await asyncio.to_thread(etcdctl, "--endpoints", guarded.endpoint, "--user", "root:root", *change, given="other\n")
    if not file_first:
        with pytest.raises(Unavailable, match="authentication failed"):
            await a.models.update("m", lambda _: ModelRecord("t", references=1))
        write(file, **fields, password="other")
    await until(lambda: a.connected and b.connected)
    for number in range(2, 5):
        await a.models.update("m", lambda _, number=number: ModelRecord("t", references=number))
        await until(lambda number=number: b.models.get("m") == ModelRecord("t", references=number))
    await registries.close()


async def test_the_cluster_may_move_while_it_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """First to where nothing listens, then to another etcd, which is given what instances know."""
    old, new = Etcd(tmp_path / "old").start(), Etcd(tmp_path / "new").start()
    try:
        backend = connection(tmp_path, endpoints=old.url)
        file = Path(backend.url.removeprefix("etcd:"))
        registries = Registries(backend)
        a, b = await registries.open("a", lease_s=1), await registries.open("b", lease_s=1)
        await a.models.update("m", lambda _: ModelRecord("t"))
        write(file, endpoints=f"127.0.0.1:{free_port()}")
        await until(lambda: "the old one stays in use" in caplog.text)
        await a.models.update("m", lambda _: ModelRecord("t", references=1))
        write(file, endpoints=new.url)
        get = ("--endpoints", new.endpoint, "get", "--prefix", "mmcore/models/", "--print-value-only")
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(etcdctl, *get):
                await asyncio.sleep(0.05)
        old.kill()
        async with asyncio.timeout(20):
            while True:
                try:
                    await a.models.update("m", lambda _: ModelRecord("t", references=2))
                    break
                except Unavailable:  # it is moving itself
                    await asyncio.sleep(0.05)
        await until(lambda: b.models.get("m") == ModelRecord("t", references=2))
        await registries.close()
    finally:
        old.kill()
        new.kill()


async def test_a_password_for_an_etcd_that_asks_for_none(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "data").start()
    try:
        await works(connection(tmp_path, endpoints=etcd.url, userid=USER, password=PASSWORD))
    finally:
        etcd.kill()
