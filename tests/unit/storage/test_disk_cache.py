"""The cache of pulled files among processes: crashes, leases, limits."""

from __future__ import annotations

import gc
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcore.errors import Cancelled, LoadFailed
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.disk_cache import DiskCache, Lease, Room
from mmcore.storage.progress import LogProgress
from mmcore.storage.transfer import PullLimits, Watch
from tests.serving import ROOT

OTHER = """
import sys, time
from pathlib import Path
from mmcore.storage.disk_cache import DiskCache
from mmcore.storage.progress import LogProgress
from mmcore.storage.transfer import PullLimits, Watch

cache = DiskCache(Path(sys.argv[1]), 1000)
if sys.argv[2] == "lease":
    lease = cache.lease(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.read()
else:
    with cache.making(sys.argv[3], 600, Watch(PullLimits(), LogProgress(), clock=time.monotonic)) as room:
        (room.folder / "half").write_bytes(b"half")
        print("ready", flush=True)
        sys.stdin.read()
"""


def watch(*cancelled: Cancellation) -> Watch:
    return Watch(PullLimits(), LogProgress(), *cancelled, clock=time.monotonic)


def make(cache: DiskCache, digest: str, size: int) -> None:
    with cache.making(digest, size, watch()) as room:
        assert isinstance(room, Room)
        (room.folder / "model").write_bytes(b"x" * size)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1000)


class Other:
    """Another process that uses the cache."""

    def __init__(self, cache: DiskCache, what: str, digest: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, cache.folder, what, digest],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def others() -> Iterator[list[Other]]:
    made: list[Other] = []
    yield made
    for one in made:
        one.kill()


def test_nothing_is_made_before_it_is_needed(cache: DiskCache) -> None:
    assert not cache.folder.exists()
    assert cache.lease("a") is None
    assert cache.used_bytes == 0


def test_lease_ends_with_its_last_holder(cache: DiskCache) -> None:
    make(cache, "a", 600)
    first, second = cache.lease("a"), cache.lease("a")
    for held in (first, second):
        assert held is not None
    del first, held
    with pytest.raises(LoadFailed, match="no room"):
        make(cache, "b", 600)
    del second
    gc.collect()
    make(cache, "b", 600)
    assert cache.lease("a") is None


def test_lease_is_nothing_in_another_process(cache: DiskCache) -> None:
    make(cache, "a", 1)
    lease = cache.lease("a")
    assert not isinstance(pickle.loads(pickle.dumps(lease)), Lease)


def test_what_another_living_process_uses_stays(cache: DiskCache, others: list[Other]) -> None:
    make(cache, "a", 600)
    others.append(Other(cache, "lease", "a"))
    with pytest.raises(LoadFailed, match="no room for 600 bytes: its limit is 1000 bytes, of which 600 are taken"):
        make(cache, "b", 600)
    others[0].kill()
    # Who starts next cleans up after it.
    after = DiskCache(cache.folder, 1000)
    make(after, "b", 600)
    assert after.used_bytes == 600


def test_half_made_entry_of_a_process_that_died_is_removed(cache: DiskCache, others: list[Other]) -> None:
    others.append(Other(cache, "make", "a"))
    # While it lives nobody else makes the same.
    cancelled = Cancellation()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(Cancelled), cache.making("a", 600, watch(cancelled)):
        raise AssertionError("two are making it")
    assert cache.used_bytes == 600
    others[0].kill()
    assert list((cache.folder / "making").iterdir()) != []
    after = DiskCache(cache.folder, 1000)
    assert after.lease("a") is None
    assert list((cache.folder / "making").iterdir()) == []
    make(after, "a", 400)
    assert (after.files("a") / "model").read_bytes() == b"x" * 400
    assert not (after.files("a") / "half").exists()


def test_failed_making_gives_its_room_back(cache: DiskCache) -> None:
    with pytest.raises(ValueError, match="broken"), cache.making("a", 600, watch()) as room:
        assert isinstance(room, Room)
        (room.folder / "half").write_bytes(b"x")
        raise ValueError("broken")
    assert cache.used_bytes == 0
    assert list((cache.folder / "making").iterdir()) == []
    make(cache, "a", 600)


def give_up(cache: DiskCache, digest: str) -> None:
    with pytest.raises(Cancelled), cache.making(digest, 600, watch()) as room:
        assert isinstance(room, Room)
        (room.folder / "half").write_bytes(b"half")
        room.kept = {"half": [[0, 4]]}
        raise Cancelled("nobody wants it")


def test_what_was_given_up_is_there_for_the_next_who_makes_it(cache: DiskCache) -> None:
    give_up(cache, "a")
    assert cache.used_bytes == 600
    assert cache.lease("a") is None
    with cache.making("a", 600, watch()) as room:
        assert isinstance(room, Room)
        assert room.left == {"half": [[0, 4]]}
        assert (room.folder / "half").read_bytes() == b"half"
        (room.folder / "half").write_bytes(b"whole")
    assert cache.used_bytes == 5
    give_up(cache, "b")
    with pytest.raises(ValueError, match="broken"), cache.making("b", 600, watch()):
        raise ValueError("broken")
    assert cache.used_bytes == 5
    assert list((cache.folder / "making").iterdir()) == []


def test_what_was_given_up_goes_before_any_entry_and_with_the_last_process(cache: DiskCache) -> None:
    make(cache, "a", 100)
    give_up(cache, "b")
    make(cache, "c", 500)
    assert cache.lease("a") is not None
    assert cache.used_bytes == 600
    assert [*(cache.folder / "making").iterdir(), *(cache.folder / "gone").iterdir()] == []
    cache.close()
    again = DiskCache(cache.folder, 2000)
    give_up(again, "b")
    again.close()
    # Nobody knows what the disk has really kept of it.
    assert DiskCache(cache.folder, 2000).used_bytes == 600
    assert list((cache.folder / "making").iterdir()) == []


def test_bytes_beyond_those_expected_are_asked_for(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 3 * 2**20)
    with cache.making("a", 0, watch()) as room:
        assert isinstance(room, Room)
        for _ in range(3):
            room.take(2**20)
        with pytest.raises(LoadFailed, match="no room"):
            room.take(1)
        (room.folder / "model").write_bytes(b"x" * 10)
    assert cache.used_bytes == 10


def test_restart_counts_what_is_there(cache: DiskCache) -> None:
    make(cache, "a", 300)
    make(cache, "b", 200)
    cache.close()
    assert list((cache.folder / "leases").iterdir()) == []
    (cache.folder / "lock").write_text("")
    again = DiskCache(cache.folder)
    assert again.used_bytes == 500
    assert again.limit_bytes > 500
    assert again.lease("a") is not None


@pytest.mark.parametrize("told", [b"", b"\0" * 14])
def test_an_entry_whose_book_was_lost_with_the_machine_is_made_anew(cache: DiskCache, told: bytes) -> None:
    make(cache, "a", 300)
    make(cache, "b", 200)
    cache.close()
    (cache.folder / "entries" / "a" / "entry.json").write_bytes(told)
    again = DiskCache(cache.folder, 1000)
    assert again.lease("a") is None
    assert again.used_bytes == 200
    make(again, "a", 300)
    assert again.used_bytes == 500


def test_cache_removed_while_in_use_is_made_again(cache: DiskCache) -> None:
    make(cache, "a", 300)
    shutil.rmtree(cache.folder)
    assert cache.lease("a") is None
    make(cache, "a", 300)
    assert cache.used_bytes == 300


def test_entries_of_many_threads_keep_the_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                make(cache, f"{number}-{turn}", 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    entries = list((cache.folder / "entries").iterdir())
    assert cache.used_bytes == 100 * len(entries) <= 1000
