from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcore.errors import AlreadyExists, InvalidRequest, NotFound
from mmcore.server.shared_memory import SharedMemory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shm = tmp_path / "shm"
    shm.mkdir()
    (shm / "object").write_bytes(bytes(range(64)))
    (tmp_path / "secret").write_bytes(b"not yours" * 10)
    return shm


@pytest.fixture
def memory(folder: Path) -> Iterator[SharedMemory]:
    memory = SharedMemory(folder)
    yield memory
    memory.unregister("")


def test_bytes_are_read_and_written_through_a_window(memory: SharedMemory, folder: Path) -> None:
    memory.register("window", "/object", 8, 16)
    region = memory.region("window")
    assert region.read(2, 3) == bytes([10, 11, 12])
    region.write(0, b"ab")
    region.write(2, memoryview(b"cd"))
    assert (folder / "object").read_bytes()[6:14] == b"\x06\x07abcd\x0c\x0d"


@pytest.mark.parametrize("key", ["object", "/object"])
def test_the_leading_slash_of_a_key_may_be_missing(memory: SharedMemory, key: str) -> None:
    memory.register("window", key, 0, 64)
    assert memory.region("window").read(0, 1) == b"\0"


@pytest.mark.parametrize(
    "key", ["", "/", "..", "/..", ".", "../secret", "/../secret", "//object", "sub/object", "a\0b", "x" * 256]
)
def test_a_key_that_is_no_name_of_an_object_is_refused(memory: SharedMemory, key: str) -> None:
    with pytest.raises(InvalidRequest, match="not the name of a shared memory object"):
        memory.register("window", key, 0, 1)


def test_a_link_out_of_the_folder_is_refused(memory: SharedMemory, folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    with pytest.raises(InvalidRequest, match="Unable to open shared memory region"):
        memory.register("window", "/link", 0, 1)


def test_what_is_no_object_is_refused(memory: SharedMemory, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidRequest, match="is not a shared memory object"):
        memory.register("window", "/pipe", 0, 1)
    with pytest.raises(InvalidRequest, match="No such file"):
        memory.register("window", "/absent", 0, 1)


def test_a_region_beyond_its_object_is_refused(memory: SharedMemory) -> None:
    with pytest.raises(InvalidRequest, match="object '/object' of 64 bytes"):
        memory.register("window", "/object", 60, 5)
    with pytest.raises(InvalidRequest, match="no range"):
        memory.register("window", "/object", 2**63, 5)
    with pytest.raises(InvalidRequest, match="no range"):
        memory.register("window", "/object", 0, 0)


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (-1, 2), (2**62, 2**62)])
def test_a_range_beyond_the_region_is_refused(memory: SharedMemory, offset: int, size: int) -> None:
    memory.register("window", "/object", 8, 16)
    with pytest.raises(InvalidRequest, match="leave shared memory region 'window' of 16 bytes"):
        memory.region("window").read(offset, size)


def test_an_object_truncated_by_its_owner_is_an_error_and_no_crash(memory: SharedMemory, folder: Path) -> None:
    memory.register("window", "/object", 0, 64)
    os.truncate(folder / "object", 10)
    with pytest.raises(InvalidRequest, match="was truncated"):
        memory.region("window").read(0, 64)
    with pytest.raises(InvalidRequest, match="was truncated"):
        memory.region("window").write(0, bytes(64))
    assert (folder / "object").stat().st_size == 10


def test_names_are_unique_and_can_be_given_back(memory: SharedMemory) -> None:
    memory.register("one", "/object", 0, 8)
    with pytest.raises(AlreadyExists, match="'one' already"):
        memory.register("one", "/object", 0, 8)
    memory.register("two", "/object", 8, 8)
    assert [region.name for region in memory.status("")] == ["one", "two"]
    memory.unregister("one")
    memory.unregister("one")
    with pytest.raises(NotFound, match="'one'"):
        memory.status("one")
    with pytest.raises(InvalidRequest, match="Unable to find shared memory region: 'one'"):
        memory.region("one")
    memory.unregister("")
    assert memory.status("") == []


def test_regions_given_back_leave_no_descriptor_open(memory: SharedMemory) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        memory.register("one", "/object", 0, 8)
        memory.unregister("one")
        with pytest.raises(InvalidRequest):
            memory.register("one", "/object", 0, 65)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
