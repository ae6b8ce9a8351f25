"""What a server's processes are seen to take, and what its container may: real processes, and a made /proc."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmcore.adapters.server_memory import ServerMemory, anonymous_bytes, guessed_size

MIB = 2**20
#: Listens, and on each line it is given takes that many MiB: itself, or with "+" in a new process.
SERVER = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
taken, children = [], []
for line in sys.stdin:
    if line.startswith("+"):
        code = f"import sys; x = b'x' * ({int(line)} << 20); print(len(x), flush=True); sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        children.append(child)
    else:
        taken.append(b"x" * (int(line) << 20))
    print("done", flush=True)
for child in children:
    child.stdin.close()
    child.wait(10)
"""


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def take(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self._line() == "done\n"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.process.stdin is not None
    assert server.process.stdout is not None
    server.process.stdin.close()
    server.process.stdout.close()
    try:
        server.process.wait(10)
    finally:
        server.process.kill()


@pytest.fixture
def memory(server: Server) -> ServerMemory:
    memory = ServerMemory(f"127.0.0.1:{server.port}")
    memory.find()
    return memory


async def grown(memory: ServerMemory, kind: str, work: Callable[[], object]) -> int | None:
    async with memory.load(kind) as growth:
        work()
    return growth.bytes


async def test_a_model_is_what_the_server_has_grown_by_from_the_second_of_its_format_on(
    server: Server, memory: ServerMemory
) -> None:
    # Its framework may have come with the first.
    assert await grown(memory, "onnx", lambda: server.take("40")) == 0
    second = await grown(memory, "onnx", lambda: server.take("40"))
    assert second is not None
    assert 38 * MIB < second < 44 * MIB


async def test_a_process_of_its_own_is_the_models_from_the_first_on(server: Server, memory: ServerMemory) -> None:
    first = await grown(memory, "python", lambda: server.take("+40"))
    assert first is not None
    assert 40 * MIB < first < 70 * MIB


async def test_nothing_is_told_of_loads_side_by_side_or_that_failed(memory: ServerMemory) -> None:
    async with memory.load("a") as first, memory.load("a") as second:
        pass
    assert (first.bytes, second.bytes) == (None, None)
    with pytest.raises(ZeroDivisionError):
        await grown(memory, "a", lambda: 1 // 0)
    assert await grown(memory, "a", lambda: None) is not None


def test_the_capacity_is_a_share_of_what_the_server_may_take(memory: ServerMemory) -> None:
    assert 0 < memory.capacity_bytes < 2**50


async def test_a_server_elsewhere_or_out_of_sight_is_not_measured(tmp_path: Path) -> None:
    for memory in (
        ServerMemory("example.test:8001"),
        ServerMemory("127.0.0.1:1"),
        ServerMemory("127.0.0.1:1", tmp_path),
    ):
        memory.find()
        assert memory.capacity_bytes == 0
        assert await grown(memory, "a", lambda: None) is None


def test_the_limit_of_the_servers_own_container_is_looked_at(tmp_path: Path) -> None:
    process = tmp_path / "7"
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "3").symlink_to("socket:[42]")
    (process / "cgroup").write_text("0::/pod/server\n")
    (process / "root/proc").mkdir(parents=True)
    (process / "root/proc/meminfo").write_text("MemTotal: 1000000 kB\n")
    (process / "root/sys/fs/cgroup/pod/server").mkdir(parents=True)
    (process / "root/sys/fs/cgroup/pod/server/memory.max").write_text("500000000\n")
    (tmp_path / "net").mkdir()
    line = "0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 42 1"
    (tmp_path / "net/tcp").write_text(f"head\n{line}\n")
    memory = ServerMemory("127.0.0.1:8001", tmp_path)
    memory.find()
    assert memory.capacity_bytes == 400_000_000


def test_a_process_that_has_gone_takes_nothing(tmp_path: Path) -> None:
    assert anonymous_bytes(tmp_path / "1") is None


def test_what_nothing_is_known_of_takes_more_than_its_files() -> None:
    assert (guessed_size(0), guessed_size(100_000_000)) == (1_000_000, 125_000_000)
