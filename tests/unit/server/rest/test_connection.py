"""The HTTP listener with raw bytes: framing, limits, clients that misbehave, and draining."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from mmcore.config import TransportSettings
from mmcore.server.rest import Listener, Request
from mmcore.server.rest.connection import Connection

EVERY_LOOP = True

SETTINGS = TransportSettings(
    max_message_bytes=1000, max_header_bytes=2000, handshake_timeout_s=0.5, send_stall_timeout_s=0.5
)


class Served:
    """A listener that echoes; requests to /wait are kept until they are let go."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.came = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.listener = Listener(self._handle, SETTINGS)

    async def start(self) -> None:
        self.host, port = (await self.listener.listen_tcp("127.0.0.1", 0)).split(":")
        self.port = int(port)

    def _handle(self, request: Request) -> None:
        if request.target == "/wait":
            request.on_cancel = self.cancelled.set
            self.waiting.append(request)
            self.came.set()
        elif request.target == "/raise":
            raise ValueError("seven")
        elif request.target == "/thread":
            before = threading.stack_size(2**46)  # larger than all memory: the system refuses
            try:
                threading.Thread(target=request.send, args=(b"",)).start()
            finally:
                threading.stack_size(before)
        elif request.target == "/much":
            request.send(bytes(50_000_000))
        else:
            request.send(request.method.encode() + b" " + request.target.encode() + b" " + request.body)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        self._writers.append(writer)
        return reader, writer

    async def stop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await self.listener.drain(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    await served.start()
    yield served
    await served.stop()
    assert served.listener.working.count == 0


Answer = tuple[int, dict[str, str], bytes]


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def ask(served: Served, data: bytes) -> Answer:
    """The first answer to these bytes, after which the connection must end."""
    reader, writer = await served.connect()
    writer.write(data)
    return await read_answer(reader)


async def test_a_connection_is_kept_for_further_requests(served: Served) -> None:
    reader, writer = await served.connect()
    for number in range(3):
        writer.write(b"POST /%d HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc" % number)
        status, headers, body = await read_answer(reader)
        assert (status, body) == (200, b"POST /%d abc" % number)
        assert "connection" not in headers


async def test_requests_sent_ahead_are_answered_in_their_order(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /wait HTTP/1.1\r\n\r\n" + b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % n for n in range(100)))
    await served.came.wait()
    served.waiting[0].send(b"first")
    assert (await read_answer(reader))[2] == b"first"
    assert [(await read_answer(reader))[2] for _ in range(100)] == [b"GET /%d " % n for n in range(100)]


async def test_a_request_may_come_byte_by_byte_and_in_chunks(served: Served) -> None:
    reader, writer = await served.connect()
    for byte in b"POST /slow HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n":
        writer.write(bytes([byte]))
        await writer.drain()
    assert (await read_answer(reader))[2] == b"POST /slow abcde"


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"POST /x HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"ok")
    assert (await read_answer(reader))[2] == b"POST /x ok"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"], ids=["HTTP/1.0", "close"]
)
async def test_a_connection_ends_where_the_client_wants_it_to(served: Served, data: bytes) -> None:
    reader, writer = await served.connect()
    writer.write(data)
    assert (await read_answer(reader))[1]["connection"] == "close"
    assert await reader.read() == b""


async def test_an_upgrade_is_answered_as_if_it_were_none(served: Served) -> None:
    status, _, body = await ask(served, b"GET /u HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert (status, body) == (200, b"GET /u ")


async def test_a_body_that_there_is_no_memory_for_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(connection: Connection, body: bytes) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "on_body", no_memory)
        status, _, text = await ask(served, b"POST /x HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc")
    assert (status, b"no memory" in text) == (429, True)
    assert (await ask(served, b"GET /y HTTP/1.1\r\n\r\n"))[0] == 200


async def test_a_request_that_there_is_no_thread_for_is_refused(served: Served) -> None:
    status, _, text = await ask(served, b"GET /thread HTTP/1.1\r\n\r\n")
    assert (status, b"no thread" in text) == (429, True)


async def test_a_head_request_gets_the_length_and_no_body(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"HEAD /h HTTP/1.1\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    assert b"content-length: 8" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"NONSENSE\r\n\r\n", 400, b"malformed HTTP"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, b"malformed HTTP"),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400, b"malformed HTTP"),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400, b"malformed HTTP"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400, b"malformed HTTP"),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413, b"limit of 1000 bytes"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + bytes(1001), 413, b"limit of 1000 bytes"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 2000, 431, b"limit of 2000 bytes"),
        (b"GET /" + b"a" * 3000, 431, b"limit of 2000 bytes"),
    ],
)  # fmt: skip
async def test_what_cannot_be_taken_is_refused_and_the_connection_closed(
    served: Served, data: bytes, status: int, words: bytes
) -> None:
    reader, writer = await served.connect()
    writer.write(data)
    found, headers, body = await read_answer(reader)
    assert (found, headers["connection"]) == (status, "close")
    assert words in body
    assert await reader.read() == b""


async def test_a_refused_client_can_finish_sending_and_read_why(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"POST / HTTP/1.1\r\ncontent-length: 5000000\r\n\r\n" + bytes(5_000_000))
    await writer.drain()
    assert (await read_answer(reader))[0] == 413


async def test_a_malformed_request_does_not_harm_the_one_before(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /wait HTTP/1.1\r\n\r\nNONSENSE\r\n\r\n")
    await served.came.wait()
    served.waiting[0].send(b"fine")
    assert (await read_answer(reader))[2] == b"fine"
    assert (await read_answer(reader))[0] == 400
    assert await reader.read() == b""


async def test_what_a_handler_raises_is_a_500_and_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    status, _, body = await ask(served, b"GET /raise HTTP/1.1\r\n\r\n")
    assert (status, body) == (500, b'{"error": "ValueError: seven"}')
    assert "request failed" in caplog.text


async def test_work_for_a_client_that_leaves_is_cancelled(served: Served) -> None:
    _, writer = await served.connect()
    writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
    await served.came.wait()
    assert served.listener.working.count == 1
    writer.transport.abort()
    await asyncio.wait_for(served.cancelled.wait(), 5)
    assert served.waiting[0].gone
    assert served.listener.working.count == 0
    served.waiting[0].send(b"late")  # nobody is told, nothing breaks


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("data", [b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nabc"])
async def test_half_a_request_does_not_hold_a_connection(served: Served, data: bytes) -> None:
    reader, writer = await served.connect()
    writer.write(data)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)


async def test_a_client_that_does_not_read_does_not_hold_its_answer(served: Served) -> None:
    _, writer = await served.connect()
    writer.write(b"GET /much HTTP/1.1\r\n\r\n")
    await until(lambda: served.listener.connections == 1)
    await until(lambda: served.listener.connections == 0)


async def test_draining_waits_for_answers_and_ends_idle_connections(served: Served) -> None:
    idle, _ = await served.connect()
    busy, busy_writer = await served.connect()
    busy_writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
    await served.came.wait()
    draining = asyncio.ensure_future(served.listener.drain(10))
    assert await idle.read() == b""
    with pytest.raises(OSError):
        await served.connect()
    served.waiting[0].send(b"done")
    _, headers, body = await read_answer(busy)
    assert (headers["connection"], body) == ("close", b"done")
    await asyncio.wait_for(draining, 5)


async def test_draining_ends_with_its_grace(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
    await served.came.wait()
    await asyncio.wait_for(served.listener.drain(0.05), 5)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)


def test_the_limits_are_those_of_the_transport() -> None:
    assert Listener(lambda request: None).settings == replace(TransportSettings())
