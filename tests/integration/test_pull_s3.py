"""Pulling from an S3 server: what comes, what is not asked for twice, and what each fault leads to."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmcore.errors import Cancelled, LoadFailed, Unavailable
from mmcore.model import ModelInfo
from mmcore.storage import Cancellation, DiskCache, Pulled, PulledOrigin, Puller, StorageConfig
from mmcore.storage.digests import begin
from mmcore.storage.places import Place
from mmcore.storage.progress import LogProgress
from mmcore.storage.remote import Blob
from mmcore.storage.s3 import S3Remote
from mmcore.storage.transfer import PullLimits
from tests.stores import BUCKET, SECRET, Bucket, Proxy, Stall, cut_after, flip, moto, status, trickle

pytestmark = pytest.mark.slow

#: A store may fall silent for longer than a test may take.
LIMITS = PullLimits(connect_s=2, silence_s=60, tries=3, pause_s=0.01, total_s=60)
MIB = 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as address:
        yield address


@pytest.fixture
def bucket(server: str) -> Iterator[Bucket]:
    made = Bucket(server)
    made.client.create_bucket(Bucket=BUCKET)
    yield made
    for page in made.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for one in page.get("Contents", []):
            made.client.delete_object(Bucket=BUCKET, Key=one["Key"])
    made.client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    made = Proxy(server.removeprefix("http://"), lambda line: line.startswith("GET") and "list-type" not in line)
    yield made
    made.close()


class Counting(LogProgress):
    """Counts what has come for the pull begun last."""

    count = 0

    def received(self, count: int) -> None:
        super().received(count)
        self.count += count


class Pulling:
    """A puller of one entry named ``store``, and its folders."""

    def __init__(
        self, folder: Path, entry: dict[str, Any], limit_bytes: int = 10**9, limits: PullLimits = LIMITS
    ) -> None:
        self.config = folder / "config"
        self.config.mkdir(parents=True, exist_ok=True)
        self.write(entry)
        self.cache = DiskCache(folder / "cache", limit_bytes)
        self.progress = Counting()
        self.puller = Puller(StorageConfig(self.config), self.cache, limits=limits, progress=self.begin)

    def begin(self) -> Counting:
        self.progress = Counting()
        return self.progress

    def write(self, entry: dict[str, Any]) -> None:
        (self.config / "store").write_text(json.dumps(entry))

    def info(self, path: str, type_: str = "", **key: Any) -> ModelInfo:
        return ModelInfo(type_, path, json.dumps({"storage_key": "store", **key}))

    def __call__(self, path: str, **key: Any) -> Pulled:
        return self.puller.pull(self.info(path, **key))

    def left(self) -> list[str]:
        """What is in the cache that is no entry and no lease."""
        return [str(one) for kind in ("making", "gone") for one in (self.cache.folder / kind).glob("*")]


@pytest.fixture
def pulling(tmp_path: Path, bucket: Bucket) -> Iterator[Pulling]:
    made = Pulling(tmp_path, bucket.entry)
    yield made
    made.puller.close()


@pytest.fixture
def spoiled(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> Iterator[Pulling]:
    """As ``pulling``, through the proxy."""
    made = Pulling(tmp_path, {**bucket.entry, "endpoint_url": proxy.address})
    yield made
    made.puller.close()


@pytest.fixture
def impatient(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> Iterator[Pulling]:
    """As ``spoiled``, whose store is given up soon."""
    entry = {**bucket.entry, "endpoint_url": proxy.address}
    made = Pulling(tmp_path, entry, limits=replace(LIMITS, silence_s=0.5))
    yield made
    made.puller.close()


def tree(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


# What comes.


def test_folder_comes_whole_and_siblings_stay(bucket: Bucket, pulling: Pulling) -> None:
    for key, body in {
        "m/1/model.py": b"x", "m/1/__init__.py": b"", "m/config.pbtxt": b"c", "m-2/other": b"o", "m.onnx": b"o",
    }.items():  # fmt: skip
        bucket.put(key, body)
    bucket.put("m/", b"")
    bucket.put("m/1/", b"")
    for path in ("m", "m/", "/m"):
        assert tree(pulling(path).path) == {"1/model.py": b"x", "1/__init__.py": b"", "config.pbtxt": b"c"}
    assert tree(pulling("m.onnx").path) == {"m.onnx": b"o"}
    assert pulling.left() == []


def test_listing_of_more_than_a_page_comes_whole(
    bucket: Bucket, pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    names = [f"{number:04d}" for number in range(35)]
    for name in names:
        bucket.put(f"many/{name}", name.encode())
    first = pulling("many")
    assert tree(first.path) == {name: name.encode() for name in names}
    # From the second on it is we who ask, and not the library.
    monkeypatch.setattr("mmcore.storage.s3._PAGE", 10)
    assert pulling("many").path == first.path


@pytest.mark.parametrize(
    "fault",
    [
        status("301 Moved Permanently", b"<Error><Code>PermanentRedirect</Code></Error>"),
        status("200 OK", b"<html>Please log in"),
        status("200 OK", b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"),
    ],
)
def test_listing_that_is_none_is_left_to_the_library(
    bucket: Bucket, server: str, tmp_path: Path, fault: Callable[[socket.socket, bytes], None]
) -> None:
    bucket.put("m/model.onnx", b"one")
    proxy = Proxy(server.removeprefix("http://"), lambda line: "list-type" in line)
    pulling = Pulling(tmp_path, {**bucket.entry, "endpoint_url": proxy.address})
    first = pulling("m")
    proxy.faults = [fault]
    assert pulling("m").path == first.path
    assert proxy.faults == []
    proxy.faults = [status("503 Slow Down")]
    assert pulling("m").path == first.path
    assert proxy.faults == []
    pulling.puller.close()
    proxy.close()


@pytest.mark.parametrize("upload", ["whole", "parts"])
def test_large_object_comes_in_ranges(bucket: Bucket, proxy: Proxy, spoiled: Pulling, upload: str) -> None:
    parts = [os.urandom(5 * MIB), os.urandom(5 * MIB), os.urandom(5 * MIB), os.urandom(5 * MIB), b"rest"]
    if upload == "whole":
        bucket.put("big/model.onnx", b"".join(parts))
    else:
        bucket.put_in_parts("big/model.onnx", parts)
    assert tree(spoiled("big").path) == {"model.onnx": b"".join(parts)}
    assert len([line for line in proxy.requests if "GET /models/big/model.onnx" in line]) == 2


def test_schema_lies_beside_the_model(bucket: Bucket, pulling: Pulling, tmp_path: Path) -> None:
    bucket.put("m/model.onnx", b"x")
    bucket.put("schemas/s.json", b'{"inputs": []}')
    pulled = pulling("m", schema_path="schemas/s.json")
    assert tree(pulled.path) == {"model.onnx": b"x"}
    assert pulled.schema is not None
    assert pulled.schema.read_bytes() == b'{"inputs": []}'
    # In a folder of its own it is where a served folder has it; the model's own is there without another.
    bucket.put("m/_schema.json", b"own")
    pulling.puller.pull_to(pulling.info("m", schema_path="schemas/s.json"), tmp_path / "theirs")
    pulling.puller.pull_to(pulling.info("m"), tmp_path / "own")
    assert tree(tmp_path / "theirs") == {"model.onnx": b"x", "_schema.json": b'{"inputs": []}'}
    assert tree(tmp_path / "own") == {"model.onnx": b"x", "_schema.json": b"own"}


def test_origin_gives_the_source_of_the_highest_version_under_the_version_asked_for(
    bucket: Bucket, pulling: Pulling
) -> None:
    bucket.put("m/2/model", b"two")
    bucket.put("m/10/model", b"ten")
    bucket.put("schema.json", b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]}')
    infos = {"mine": pulling.info("m", "mt:sklearn:1", schema_path="schema.json")}
    origin = PulledOrigin(pulling.puller, infos.get)
    source = origin.source("mine", "1")
    assert (source.name, source.version, source.format) == ("mine", "1", "sklearn")
    assert source.path.read_bytes() == b"ten"
    assert source.settings.inputs[0].shape == (-1, 4)
    origin.confirm("mine")


# What is not asked for twice.


def test_unchanged_content_is_listed_once_and_not_downloaded_again(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, tmp_path: Path
) -> None:
    bucket.put("m/model.onnx", b"one")
    first = spoiled("m")
    proxy.requests.clear()
    assert spoiled("m").path == first.path
    # Another process, later.
    assert Pulling(tmp_path, json.loads((spoiled.config / "store").read_text()))("m").path == first.path
    assert len(proxy.requests) == 2
    assert all("list-type=2" in line for line in proxy.requests)
    assert (spoiled.puller.pulls, spoiled.puller.hits, spoiled.puller.received_bytes) == (1, 1, 3)


def test_one_listing_finds_a_model_whatever_lies_beside_it(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    for key in ("m", "m0/model.onnx", *(f"m-{number}/model.onnx" for number in range(5))):
        bucket.put(key, key.encode())
    bucket.put("n/1/model.onnx", b"n")
    for number in range(30):
        bucket.put(f"n{number}/model.onnx", b"another")
    assert tree(spoiled("m").path) == {"m": b"m"}
    assert tree(spoiled("n").path) == {"1/model.onnx": b"n"}
    assert len([line for line in proxy.requests if "list-type=2" in line]) == 2
    # What is below a name goes before the object of that name, also where others hide it at the first look.
    for number in range(30):
        bucket.put(f"m-{number}/model.onnx", b"another")
    bucket.put("m/model.onnx", b"below")
    assert tree(spoiled("m").path) == {"model.onnx": b"below"}


def test_changed_object_is_noticed_and_its_old_copy_stays_while_held(bucket: Bucket, pulling: Pulling) -> None:
    bucket.put("m/model.onnx", b"one")
    first = pulling("m")
    bucket.put("m/model.onnx", b"two")
    assert tree(pulling("m").path) == {"model.onnx": b"two"}
    assert tree(first.path) == {"model.onnx": b"one"}


def test_models_with_equal_content_share_one_entry(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("a/model.onnx", b"same")
    bucket.put("b/model.onnx", b"same")
    assert spoiled("a").path == spoiled("b").path
    assert len([line for line in proxy.requests if "list-type" not in line]) == 1


def test_pulls_of_the_same_at_once_download_once(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, tmp_path: Path
) -> None:
    bucket.put("m/model.onnx", os.urandom(MIB))
    others = [spoiled, Pulling(tmp_path, json.loads((spoiled.config / "store").read_text()))]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda one=one: found.append(one("m").path)) for one in others * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len([line for line in proxy.requests if "list-type" not in line]) == 1


def test_limit_evicts_what_was_used_least_recently_and_nothing_in_use(bucket: Bucket, tmp_path: Path) -> None:
    for name in "abcd":
        bucket.put(f"{name}/model.onnx", name.encode() * 1000)
    pulling = Pulling(tmp_path, bucket.entry, limit_bytes=3500)
    held = pulling("a")
    paths = {name: pulling(name).path for name in "bc"}
    pulling("b")
    paths["d"] = pulling("d").path
    assert held.path.exists()
    assert [name for name in "bcd" if paths[name].exists()] == ["b", "d"]
    assert pulling.cache.used_bytes == 3000
    every = [pulling(name) for name in "bd"]
    with pytest.raises(LoadFailed, match="no room for 1000 bytes: its limit is 3500 bytes, of which 3000 are taken"):
        pulling("c")
    del every
    pulling("c")
    with pytest.raises(LoadFailed, match="no room for 9000 bytes"):
        bucket.put("e/model.onnx", b"e" * 9000)
        pulling("e")
    assert pulling.left() == []


# Faults.


def test_broken_connection_is_taken_up_where_it_broke(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    body = os.urandom(MIB)
    bucket.put("m/model.onnx", body)
    proxy.faults = [cut_after(300_000), status("503 Slow Down"), cut_after(300_000), cut_after(0)]
    assert tree(spoiled("m").path) == {"model.onnx": body}
    assert spoiled.puller.received_bytes == MIB


def test_store_that_never_gives_all_fails_in_bounded_time(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("m/model.onnx", b"x" * 1000)
    proxy.always = status("503 Service Unavailable")
    with pytest.raises(LoadFailed, match=r"s3://models/m: the store answers HTTP 503.*tried 3 times"):
        spoiled("m")
    proxy.always = None
    proxy.faults = [cut_after(10), cut_after(10), cut_after(10)]
    with pytest.raises(LoadFailed, match=r"s3://models/m/model.onnx: .*tried 3 times"):
        spoiled("m")
    assert spoiled.left() == []
    assert spoiled.puller.failures == 2


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (status("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>"), "refuses the credentials.*AccessDenied"),
        (status("403 Forbidden", b"<Error><Code>RequestTimeTooSkewed</Code></Error>"), "clock of this machine is not"),
        (status("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"), "does not exist .*NoSuchKey"),
        (flip, "has the checksum .*, the store says"),
    ],
)
def test_what_no_second_try_can_heal_fails_at_once_and_nothing_is_kept(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, answer: Any, text: str
) -> None:
    bucket.put("m/model.onnx", b"x" * 1000)
    proxy.faults = [answer]
    with pytest.raises(LoadFailed, match=text):
        spoiled("m")
    assert spoiled.left() == []
    assert list((spoiled.cache.folder / "entries").iterdir()) == []
    assert spoiled.cache.used_bytes == 0
    spoiled("m")


def test_wrong_part_of_a_large_upload_is_noticed(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put_in_parts("m/model.onnx", [os.urandom(5 * MIB), b"rest"])
    proxy.faults = [flip]
    with pytest.raises(LoadFailed, match=r"has the checksum \w+-2, the store says \w+-2"):
        spoiled("m")


PARTS = [*(os.urandom(5 * MIB) for _ in range(4)), b"rest"]


@pytest.mark.parametrize(
    ("algorithm", "kind", "digits"),
    [("CRC32", "COMPOSITE", 8), ("CRC32", "FULL_OBJECT", 8), ("SHA256", "COMPOSITE", 64), ("SHA1", "COMPOSITE", 40)],
)
def test_uploads_in_parts_are_checked_by_the_checksum_beside_their_tag(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, algorithm: str, kind: str, digits: int
) -> None:
    bucket.put_in_parts("m/model.onnx", PARTS, ChecksumAlgorithm=algorithm, ChecksumType=kind)
    proxy.faults = [flip]
    pieces = "-5" if kind == "COMPOSITE" else ""
    text = f"what came has the checksum [0-9a-f]{{{digits}}}{pieces}, the store says [0-9a-f]{{{digits}}}{pieces}$"
    with pytest.raises(LoadFailed, match=text):
        spoiled("m")
    assert tree(spoiled("m").path) == {"model.onnx": b"".join(PARTS)}


@pytest.mark.parametrize(
    ("algorithm", "digits"), [("CRC32", 8), ("CRC32C", 8), ("CRC64NVME", 16), ("SHA256", 64), ("SHA1", 40)]
)
def test_large_objects_are_checked_by_the_checksum_beside_their_tag(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, algorithm: str, digits: int
) -> None:
    body = b"".join(PARTS)
    whole = begin(algorithm.lower())
    whole.update(body)
    told = {"ChecksumAlgorithm": algorithm, f"Checksum{algorithm}": base64.b64encode(whole.digest()).decode()}
    bucket.client.put_object(Bucket=BUCKET, Key="m/model.onnx", Body=body, **told)
    proxy.faults = [flip]
    with pytest.raises(LoadFailed, match=rf"has the checksum [0-9a-f]{{{digits}}}, the store says \w{{{digits}}}$"):
        spoiled("m")
    assert tree(spoiled("m").path) == {"model.onnx": body}
    assert len([line for line in proxy.requests if line.startswith("HEAD")]) == 2
    # A small one is sooner summed up than asked for.
    bucket.put("small/model.onnx", b"x" * 1000)
    spoiled("small")
    assert len([line for line in proxy.requests if line.startswith("HEAD")]) == 2


def test_parts_of_different_sizes_are_asked_for_one_by_one(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    # As many as there would be if all were as large as the first.
    parts = [os.urandom(5 * MIB), os.urandom(6 * MIB), os.urandom(8 * MIB), b"rest"]
    bucket.put_in_parts("m/model.onnx", parts)
    assert tree(spoiled("m").path) == {"model.onnx": b"".join(parts)}
    bucket.put_in_parts("n/model.onnx", parts[::-1][1:])
    proxy.faults = [flip]
    with pytest.raises(LoadFailed, match=r"has the checksum \w+-3, the store says \w+-3"):
        spoiled("n")


def test_server_that_tells_nothing_of_parts_is_no_reason_to_fail(bucket: Bucket, server: str, tmp_path: Path) -> None:
    parts = [os.urandom(5 * MIB), b"rest"]
    bucket.put_in_parts("m/model.onnx", parts)
    proxy = Proxy(server.removeprefix("http://"), lambda line: line.startswith("HEAD"))
    proxy.faults = [status("501 Not Implemented")]
    pulling = Pulling(tmp_path, {**bucket.entry, "endpoint_url": proxy.address})
    assert tree(pulling("m").path) == {"model.onnx": b"".join(parts)}
    assert proxy.faults == []
    pulling.puller.close()
    proxy.close()


def test_trickle_is_a_timeout(bucket: Bucket, proxy: Proxy, impatient: Pulling) -> None:
    bucket.put("m/model.onnx", b"x" * 1000)
    proxy.faults = [trickle(0.02)] * 3
    with pytest.raises(LoadFailed, match="timeout: the store sends next to nothing; tried 3 times"):
        impatient("m")


def test_silent_store_is_a_timeout(bucket: Bucket, proxy: Proxy, impatient: Pulling) -> None:
    bucket.put("m/model.onnx", b"x" * 1000)
    proxy.faults = [trickle(2)] * 3
    with pytest.raises(LoadFailed, match="timeout: the store is silent; tried 3 times"):
        impatient("m")


def test_object_replaced_while_it_comes_is_pulled_anew(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("m/model.onnx", b"1" * 200_000)

    def renew(client: Any, answer: bytes) -> None:
        bucket.put("m/model.onnx", b"2" * 200_000)
        cut_after(100_000)(client, answer)

    proxy.faults = [renew]
    assert tree(spoiled("m").path) == {"model.onnx": b"2" * 200_000}


def test_credentials_rotated_while_it_runs_are_taken_up(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("m/model.onnx", b"x")

    def rotate(client: Any, answer: bytes) -> None:
        spoiled.write({**bucket.entry, "endpoint_url": proxy.address, "access_key_id": "AKIANEW"})
        status("403 Forbidden", b"<Error><Code>InvalidAccessKeyId</Code></Error>")(client, answer)

    proxy.faults = [rotate]
    assert tree(spoiled("m").path) == {"model.onnx": b"x"}
    assert "Credential=AKIANEW/" in proxy.heads[-1]


def test_cancelled_and_closed_pulls_end_between_chunks(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("m/model.onnx", b"x" * 1000)
    cancelled = Cancellation()

    def cancel(client: Any, answer: bytes) -> None:
        cancelled.set()
        trickle(0.02)(client, answer)

    proxy.faults = [cancel]
    with pytest.raises(Cancelled):
        spoiled.puller.pull(spoiled.info("m"), cancelled=cancelled)
    assert spoiled.left() == []
    spoiled.puller.close()
    with pytest.raises(Unavailable):
        spoiled("m")


def give_up(pulling: Pulling, path: str, stall: Stall, *, of_object: bool = True, leaves: bool = True) -> None:
    """Pull, and cancel that when the store has fallen silent; fails unless both ends notice soon."""
    cancelled = Cancellation()
    errors: list[BaseException] = []

    def pull() -> None:
        try:
            pulling.puller.pull(pulling.info(path), cancelled=cancelled)
        except Cancelled as error:
            errors.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    assert stall.begun.wait(30)
    deadline = time.monotonic() + 30
    while of_object and pulling.progress.count < (stall.count or 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cancelled.set()
    thread.join(30)
    assert len(errors) == 1
    assert not leaves or stall.left.wait(30)


@pytest.mark.parametrize("upload", ["whole", "parts"])
def test_pull_given_up_ends_in_a_silent_store_and_the_next_goes_on_from_there(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, upload: str
) -> None:
    # Little enough to be asked for in one request.
    parts = [os.urandom(5 * MIB), os.urandom(5 * MIB), b"rest"]
    if upload == "whole":
        bucket.put("m/model.onnx", b"".join(parts))
    else:
        bucket.put_in_parts("m/model.onnx", parts)
    for count in (MIB, 6 * MIB):
        proxy.faults = [stall := Stall(count)]
        give_up(spoiled, "m", stall)
    assert list((spoiled.cache.folder / "entries").iterdir()) == []
    assert tree(spoiled("m").path) == {"model.onnx": b"".join(parts)}
    # Hardly a byte was asked for twice.
    assert spoiled.puller.received_bytes == pytest.approx(sum(map(len, parts)), abs=MIB)
    assert spoiled.left() == []


@pytest.mark.parametrize("count", [None, 100])
@pytest.mark.parametrize("listing", ["of the library", "ours"])
def test_pull_given_up_while_the_store_lists_ends(
    bucket: Bucket, server: str, tmp_path: Path, listing: str, count: int | None
) -> None:
    bucket.put("m/model.onnx", b"one")
    proxy = Proxy(server.removeprefix("http://"), lambda line: "list-type" in line)
    entry = {**bucket.entry, "endpoint_url": proxy.address}
    pulling = Pulling(tmp_path, entry)
    if listing == "ours":
        pulling("m")
    proxy.faults = [stall := Stall(count)]
    # The library's request is left to its own time limit.
    give_up(pulling, "m", stall, of_object=False, leaves=listing == "ours")
    assert tree(pulling("m").path) == {"model.onnx": b"one"}
    pulling.puller.close()


def test_pull_given_up_before_the_store_sends_anything_ends(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.put("m/model.onnx", b"one")
    proxy.faults = [stall := Stall(None)]
    give_up(spoiled, "m", stall)
    assert tree(spoiled("m").path) == {"model.onnx": b"one"}


def test_files_that_were_whole_when_a_pull_was_given_up_are_kept(bucket: Bucket, server: str, tmp_path: Path) -> None:
    bodies = {"large": os.urandom(2 * MIB), "small": b"x" * 1000, "empty": b""}
    for name, body in bodies.items():
        bucket.put(f"m/{name}", body)
    proxy = Proxy(server.removeprefix("http://"), lambda line: "/m/large" in line)
    entry = {**bucket.entry, "endpoint_url": proxy.address}
    # One after the other; the large one comes last.
    pulling = Pulling(tmp_path, entry, limits=replace(LIMITS, threads=1))
    bucket.put("m/a", b"first")
    proxy.faults = [stall := Stall(MIB)]
    give_up(pulling, "m", stall)
    assert tree(pulling("m").path) == {**bodies, "a": b"first"}
    assert pulling.puller.received_bytes == pytest.approx(3 * MIB - MIB + 1000, abs=2000)
    pulling.puller.close()
    proxy.close()


def test_what_is_left_of_a_pull_is_checked_with_the_rest(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    body = os.urandom(2 * MIB)
    bucket.put("m/model.onnx", body)
    proxy.faults = [stall := Stall(MIB)]
    give_up(spoiled, "m", stall)
    (half,) = (spoiled.cache.folder / "making").glob("*/files/model/model.onnx")
    with half.open("r+b") as file:
        file.write(bytes([body[0] ^ 1]))
    with pytest.raises(LoadFailed, match="has the checksum"):
        spoiled("m")
    assert spoiled.left() == []
    assert tree(spoiled("m").path) == {"model.onnx": body}


def test_missing_things_are_named(bucket: Bucket, pulling: Pulling) -> None:
    with pytest.raises(LoadFailed, match=r"s3://models: no object is called 'no' and none is below 'no/'"):
        pulling("no")
    with pytest.raises(LoadFailed, match=r"s3://none.*there is no such bucket"):
        pulling("m", storage_params={"bucket": "none"})
    with pytest.raises(LoadFailed, match="the connection failed"):
        pulling("m", storage_params={"endpoint_url": "http://127.0.0.1:1"})


@pytest.mark.parametrize("name", ["m/../../x", "m//x", "m/./x"])
def test_names_that_leave_the_folder_are_refused(bucket: Bucket, pulling: Pulling, name: str) -> None:
    bucket.put(name, b"x")
    with pytest.raises(LoadFailed, match="is no path inside the model's folder"):
        pulling("m")


def test_nothing_shows_credentials(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mmcore")
    bucket.put("m/model.onnx", b"x")
    texts = [repr(spoiled("m"))]
    for fault in (status("403 No"), status("400 Bad"), cut_after(0), flip):
        bucket.put("m/model.onnx", os.urandom(8))
        proxy.faults = [fault] * 3
        with pytest.raises(LoadFailed) as raised:
            spoiled("m")
        error: BaseException | None = raised.value
        while error is not None:
            texts.append(repr(error))
            error = error.__cause__
    # The store's own log is its own affair.
    texts += [record.getMessage() for record in caplog.records if record.name != "werkzeug"]
    for text in texts:
        assert SECRET not in text
        assert "Signature" not in text
        assert "AKIA" not in text


# Credentials and addresses.


def test_web_identity_is_a_part_of_the_default_chain(
    bucket: Bucket, proxy: Proxy, spoiled: Pulling, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("m/model.onnx", b"x")
    (tmp_path / "token").write_text("a token of the cluster")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/puller")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server)
    entry = {name: value for name, value in bucket.entry.items() if "access_key" not in name}
    spoiled.write({**entry, "endpoint_url": proxy.address})
    assert tree(spoiled("m").path) == {"model.onnx": b"x"}
    # The role's own keys signed the request, with their session.
    assert "X-Amz-Security-Token:" in proxy.heads[-1]


def test_public_bucket_is_asked_without_a_signature(bucket: Bucket, proxy: Proxy, spoiled: Pulling) -> None:
    bucket.client.put_object(Bucket=BUCKET, Key="m/model.onnx", Body=b"x", ACL="public-read")
    entry = {name: value for name, value in bucket.entry.items() if "access_key" not in name}
    spoiled.write({**entry, "endpoint_url": proxy.address, "anonymous": True})
    assert tree(spoiled("m").path) == {"model.onnx": b"x"}
    assert "X-Amz" not in proxy.heads[-1]
    assert "Authorization" not in proxy.heads[-1]


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ({"endpoint_url": "https://store.example"}, "https://store.example/models/m/a%20b"),
        (
            {"endpoint_url": "https://store.example", "addressing_style": "virtual"},
            "https://models.store.example/m/a%20b",
        ),
        ({"region": "eu-west-1"}, "https://models.s3.eu-west-1.amazonaws.com/m/a%20b"),
        ({"region": "eu-west-1", "addressing_style": "path"}, "https://s3.eu-west-1.amazonaws.com/models/m/a%20b"),
    ],
)
def test_addressing_styles(told: dict[str, str], url: str) -> None:
    keys = {"bucket": BUCKET, "access_key_id": "AKIA", "secret_access_key": SECRET}
    remote = S3Remote(Place("s3", "m", None, {**keys, **told}), LIMITS)
    assert remote.request(Blob("m/a b", "a b", 1, "tag")).url == url
