"""grpcio's clients, blocking and aio, against our server."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as v1alpha_pb2
from grpc_reflection.v1alpha import reflection_pb2_grpc as v1alpha_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mmcore import pb
from mmcore.config import TransportSettings
from mmcore.transport import Server, add_health, add_reflection
from tests.echoing import WITHIN_S, Echoing
from tests.sessions import SETTINGS

Start = Callable[..., Echoing]
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@pytest.fixture(params=["uvloop", "asyncio"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts an echo server with these settings on each kind of loop."""
    running: list[Echoing] = []

    def begin(settings: TransportSettings = SETTINGS) -> Echoing:
        running.append(Echoing(request.param, settings))
        return running[-1]

    yield begin
    for one in running:
        one.end()


@pytest.fixture
def echo(start: Start) -> Echoing:
    return start()


@pytest.fixture
def channel(echo: Echoing) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(echo.target, UNLIMITED) as channel:
        yield channel


def unary(channel: grpc.Channel, method: str) -> Any:
    return channel.unary_unary(f"/echo.Echo/{method}")


# -- unary


def test_metadata_goes_both_ways_with_binary_and_repeated_names(echo: Echoing, channel: grpc.Channel) -> None:
    sent = [("echo-a", "1"), ("echo-bin", bytes(range(256))), ("echo-a", "2"), ("echo-empty", ""), ("x", "kept")]
    answer, call = unary(channel, "Unary").with_call(b"body", metadata=sent)
    assert answer == b"body"
    # Of names that repeat, only the order among themselves says anything.
    assert sorted(call.initial_metadata()) == sorted([("initial", "yes"), *sent[:4]])
    assert sorted(call.trailing_metadata()) == sorted(sent[:4])
    assert set(sent) <= set(echo.service.seen[0])
    assert [value for name, value in echo.service.seen[0] if name == "echo-a"] == ["1", "2"]


@pytest.mark.parametrize("text", ["plain", "sn\u2603w \U0001f600", "50% \r\n\ttabs", "x" * 3000, ""])
@pytest.mark.parametrize("code", ["raise", "5", "16"])
def test_errors_keep_status_text_and_trailers(channel: grpc.Channel, code: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "Fail")(f"{code} {text}".encode(), timeout=WITHIN_S)
    assert caught.value.code().value[0] == (3 if code == "raise" else int(code))
    assert caught.value.details() == text
    assert set(caught.value.trailing_metadata()) >= {("why", "because"), ("why-bin", b"\x00\x01")}


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    for path in ("/echo.Echo/Nothing", "/Nothing/At/All", "/x"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("size", [0, 1, 602_112, 16 * 2**20])
def test_messages_of_any_size_come_back(channel: grpc.Channel, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    assert unary(channel, "Unary")(body[:size], timeout=WITHIN_S) == body[:size]


def test_64_mib_go_both_ways_when_the_limit_allows(start: Start) -> None:
    echo = start(replace(SETTINGS, max_message_bytes=64 * 2**20))
    body = bytes(range(256)) * (2**26 // 256)
    with grpc.insecure_channel(echo.target, UNLIMITED) as channel:
        assert unary(channel, "Unary")(body, timeout=WITHIN_S) == body


def test_a_request_above_the_limit_is_refused_and_the_connection_lives(start: Start) -> None:
    echo = start(replace(SETTINGS, max_message_bytes=1000))
    with grpc.insecure_channel(echo.target, UNLIMITED) as channel:
        for body in (bytes(1001), bytes(50_000_000)):
            with pytest.raises(grpc.RpcError) as caught:
                unary(channel, "Unary")(body, timeout=WITHIN_S)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1000" in caught.value.details()
        assert unary(channel, "Unary")(bytes(1000), timeout=WITHIN_S) == bytes(1000)


def test_an_answer_above_the_clients_limit_harms_no_other_call(echo: Echoing) -> None:
    with grpc.insecure_channel(echo.target, [("grpc.max_receive_message_length", 1000)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, "Size")(b"5000000", timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert unary(channel, "Size")(b"1000", timeout=WITHIN_S) == bytes(1000)


def test_a_deadline_ends_the_call_and_the_work(echo: Echoing, channel: grpc.Channel) -> None:
    unary(channel, "Unary")(b"", timeout=WITHIN_S)  # of the time, none goes for the connection
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "Hold")(b"", timeout=0.4)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    echo.service.wait_for("cancelled")
    deadline = echo.service.held[0].deadline
    assert deadline is not None


def test_a_cancelled_call_stops_the_work(echo: Echoing, channel: grpc.Channel) -> None:
    future = unary(channel, "Hold").future(b"")
    echo.service.wait_for("held")
    future.cancel()
    echo.service.wait_for("cancelled")
    assert echo.service.held[0].cancelled


def test_a_closed_connection_stops_the_work(echo: Echoing) -> None:
    with grpc.insecure_channel(echo.target) as channel:
        kept = [unary(channel, "Hold").future(b""), channel.stream_stream("/echo.Echo/HoldStream")(iter(()))]
        echo.service.wait_for("held", len(kept))
    echo.service.wait_for("cancelled", 2)


def test_calls_in_flight_end_with_unavailable_when_the_server_closes(echo: Echoing, channel: grpc.Channel) -> None:
    future = unary(channel, "Hold").future(b"")
    echo.service.wait_for("held")
    echo.thread.run(echo.server.close())
    assert future.exception(WITHIN_S).code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate, grpc.Compression.NoCompression])
@pytest.mark.parametrize("answer", ["gzip", "deflate", "identity", "snappy"])
def test_compression_either_way(channel: grpc.Channel, algorithm: grpc.Compression, answer: str) -> None:
    body = b"compressible " * 5000
    got, call = unary(channel, "Compressed").with_call(
        answer.encode() + b" " + body, compression=algorithm, timeout=WITHIN_S
    )
    assert got == body
    assert ("used", str(answer != "snappy")) in tuple(call.trailing_metadata())


def test_many_concurrent_calls_get_their_own_answers(channel: grpc.Channel) -> None:
    calls = [unary(channel, "Unary").future(b"%d" % n, timeout=WITHIN_S) for n in range(500)]
    assert [call.result() for call in calls] == [b"%d" % n for n in range(500)]


def test_many_threads_call_at_once(channel: grpc.Channel) -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for n in range(20):
            body = bytes([number]) * (n * 1000)
            if unary(channel, "Unary")(body, timeout=WITHIN_S) != body:
                wrong.append((number, n))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- streams


def test_a_bidirectional_stream_is_answered_message_by_message(channel: grpc.Channel) -> None:
    asked: list[bytes] = []
    given = threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        for size in (0, 5, 100_000, 1):
            given.acquire()
            asked.append(b"m" * size)
            yield asked[-1]

    call = channel.stream_stream("/echo.Echo/Bidi")(requests(), timeout=WITHIN_S)
    for answer in call:
        assert answer == asked[-1]
        given.release()
    assert len(asked) == 4
    assert ("initial", "yes") in tuple(call.initial_metadata())
    assert tuple(call.trailing_metadata()) == (("last", "word"),)
    assert call.code() == grpc.StatusCode.OK


def test_server_streams_and_their_errors(channel: grpc.Channel) -> None:
    count = channel.unary_stream("/echo.Echo/Count")
    assert list(count(b"1000", timeout=WITHIN_S)) == [b"%d" % n for n in range(1000)]
    got = []
    with pytest.raises(grpc.RpcError) as caught:
        got.extend(count(b"13", timeout=WITHIN_S))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "unlucky")
    with pytest.raises(grpc.RpcError) as caught:
        list(count(b"not a number", timeout=WITHIN_S))
    assert caught.value.code() == grpc.StatusCode.INTERNAL


def test_client_streams(channel: grpc.Channel) -> None:
    total = channel.stream_unary("/echo.Echo/Sum")
    assert total(iter([b"12345"] * 2000), timeout=WITHIN_S) == b"10000"
    assert total(iter([bytes(3_000_000)] * 10), timeout=WITHIN_S) == b"30000000"


def test_a_cancelled_stream_cancels_its_handler(echo: Echoing, channel: grpc.Channel) -> None:
    call = channel.stream_stream("/echo.Echo/HoldStream")(iter(()))
    assert next(call) == b"started"
    call.cancel()
    echo.service.wait_for("cancelled")


def test_a_streams_deadline_cancels_its_handler(echo: Echoing, channel: grpc.Channel) -> None:
    unary(channel, "Unary")(b"", timeout=WITHIN_S)
    call = channel.stream_stream("/echo.Echo/HoldStream")(iter(()), timeout=0.4)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    echo.service.wait_for("cancelled")


# -- aio


async def test_the_aio_client_calls_every_kind_of_method(echo: Echoing) -> None:
    async with grpc.aio.insecure_channel(echo.target, UNLIMITED) as channel:
        answers = await asyncio.gather(*(channel.unary_unary("/echo.Echo/Unary")(b"%d" % n) for n in range(200)))
        assert answers == [b"%d" % n for n in range(200)]
        assert [one async for one in channel.unary_stream("/echo.Echo/Count")(b"50")] == [b"%d" % n for n in range(50)]
        bidi = channel.stream_stream("/echo.Echo/Bidi")()
        for body in (b"", b"one", bytes(700_000)):
            await bidi.write(body)
            assert await bidi.read() == body
        await bidi.done_writing()
        assert await bidi.read() is grpc.aio.EOF
        held = channel.unary_unary("/echo.Echo/Hold")(b"")
        await asyncio.to_thread(echo.service.wait_for, "held")
        held.cancel()
        await asyncio.to_thread(echo.service.wait_for, "cancelled")


# -- the connection


def test_a_drained_server_finishes_calls_in_flight_and_takes_no_new_connection(echo: Echoing) -> None:
    with grpc.insecure_channel(echo.target) as channel:
        future = unary(channel, "Hold").future(b"")
        echo.service.wait_for("held")
        drained = echo.thread.start(echo.server.drain(WITHIN_S))
        echo.thread.call(lambda: None)  # by now it has begun
        own = [("grpc.use_local_subchannel_pool", 1)]  # else it would share the first one's connection
        with grpc.insecure_channel(echo.target, own) as other, pytest.raises(grpc.RpcError) as caught:
            unary(other, "Unary")(b"", timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not drained.done()
        echo.thread.call(echo.service.release)
        assert future.result(WITHIN_S) == b"released"
        drained.result(WITHIN_S)
    assert echo.thread.call(lambda: echo.server.connections) == 0


def test_old_connections_are_replaced_without_failing_a_call(start: Start) -> None:
    echo = start(replace(SETTINGS, max_connection_age_s=0.2, max_connection_age_grace_s=5.0))
    with grpc.insecure_channel(echo.target) as channel:
        seen = set()
        call = unary(channel, "Unary")
        ended = threading.Event()
        while len(seen) < 2 and not ended.wait(0.02):
            assert call(b"x", timeout=WITHIN_S) == b"x"
            peers = echo.thread.call(lambda: {one.peer for one in echo.server._connections})
            seen |= peers


def test_keepalive_pings_of_the_client_are_answered(echo: Echoing) -> None:
    options = [
        ("grpc.keepalive_time_ms", 100), ("grpc.keepalive_timeout_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0),
    ]  # fmt: skip
    with grpc.insecure_channel(echo.target, options) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, "Hold")(b"", timeout=1.0)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert unary(channel, "Unary")(b"lives") == b"lives"
    assert echo.service.events.count("held") == 1


def test_the_client_answers_our_keepalive(start: Start) -> None:
    echo = start(replace(SETTINGS, keepalive_s=0.01, keepalive_timeout_s=0.9))
    with grpc.insecure_channel(echo.target) as channel:
        # Ticks come once a second: one pings, the next would find the answer missing.
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, "Hold")(b"", timeout=2.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unix_sockets(tmp_path: Path) -> None:
    server = Server()
    server.add_unary("/echo.Echo/Unary", lambda call, body: body + call.peer.encode())
    target = await server.listen_unix(str(tmp_path / "socket"))
    async with grpc.aio.insecure_channel(target) as channel:
        assert (await channel.unary_unary("/echo.Echo/Unary")(b"x")).startswith(b"xunix")
    await server.close()
    assert not (tmp_path / "socket").exists()


def test_several_listeners_and_a_port_shared_by_two_servers(echo: Echoing, start: Start) -> None:
    second = echo.thread.run(echo.server.listen_tcp("127.0.0.1", 0, reuse_port=True))
    port = int(second.rpartition(":")[2])
    other = start()
    assert other.thread.run(other.server.listen_tcp("127.0.0.1", port, reuse_port=True)) == second
    for target in (echo.target, second, other.target):
        with grpc.insecure_channel(target) as channel:
            assert unary(channel, "Unary")(b"x", timeout=WITHIN_S) == b"x"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls(echo: Echoing, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    target = echo.thread.run(echo.server.listen_tcp("127.0.0.1", 0, ssl=context))
    credentials = grpc.ssl_channel_credentials(certificate[0].read_bytes())
    options = [*UNLIMITED, ("grpc.ssl_target_name_override", "localhost")]
    with grpc.secure_channel(target, credentials, options) as channel:
        for size in (0, 10, 602_112, 10_000_000):
            assert unary(channel, "Unary")(bytes(size), timeout=WITHIN_S) == bytes(size)
        answers = channel.stream_stream("/echo.Echo/Bidi")(iter([bytes(500_000)] * 30), timeout=WITHIN_S)
        assert sum(map(len, answers)) == 15_000_000


# -- the standard services


@pytest.fixture
def standard(echo: Echoing) -> Any:
    health = echo.thread.call(lambda: add_health(echo.server))
    echo.thread.call(
        lambda: add_reflection(echo.server, pb.descriptor_protos(), ["inference.GRPCInferenceService", "echo.Echo"])
    )
    return health


def test_health_is_checked_and_watched(echo: Echoing, standard: Any, channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    kinds = health_pb2.HealthCheckResponse
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="echo.Echo"), timeout=WITHIN_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="echo.Echo"), timeout=WITHIN_S)
    assert next(watch).status == kinds.SERVICE_UNKNOWN
    for serving, status in ((True, kinds.SERVING), (False, kinds.NOT_SERVING)):
        echo.thread.call(lambda serving=serving: standard.set("echo.Echo", serving))
        assert next(watch).status == status
        assert stub.Check(health_pb2.HealthCheckRequest(service="echo.Echo"), timeout=WITHIN_S).status == status
    watch.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff", timeout=WITHIN_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("standard")
def test_reflection_lists_services_and_finds_types(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)  # speaks v1alpha
    services = database.get_services()
    assert {"inference.GRPCInferenceService", "echo.Echo", "grpc.reflection.v1.ServerReflection"} <= set(services)
    file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    assert "ModelInferRequest" in [message.name for message in file.message_type]
    assert database.FindFileByName(file.name).name == file.name
    assert database.FindFileContainingSymbol("inference.ModelInferRequest.InferInputTensor").name == file.name
    with pytest.raises(KeyError):
        database.FindFileContainingSymbol("no.such.Thing")


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_both_versions_of_reflection_answer_alike(channel: grpc.Channel, version: str) -> None:
    # Their messages have the same numbers, so one version's classes read both.
    request = v1alpha_pb2.ServerReflectionRequest
    call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    bodies = call(
        iter([
            request(list_services="").SerializeToString(),
            request(file_containing_symbol="inference.ModelInferRequest").SerializeToString(),
            request(file_by_filename="nothing.proto").SerializeToString(),
            request().SerializeToString(),
        ]),
        timeout=WITHIN_S,
    )  # fmt: skip
    answers = [v1alpha_pb2.ServerReflectionResponse.FromString(body) for body in bodies]
    assert [answer.WhichOneof("message_response") for answer in answers] == [
        "list_services_response", "file_descriptor_response", "error_response", "error_response",
    ]  # fmt: skip
    assert [answer.error_response.error_code for answer in answers[2:]] == [5, 3]
    assert v1alpha_pb2_grpc is not None


# -- h2load


@pytest.mark.slow
@pytest.mark.skipif(which("h2load") is None, reason="h2load is not installed")
def test_h2load_gets_its_answers(echo: Echoing, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"\0\0\0\0\x05hello")
    report = subprocess.run(
        ["h2load", "-n", "20000", "-c", "10", "-m", "20", "-d", body, "-H", "content-type: application/grpc",
         "-H", "te: trailers", f"http://{echo.target}/echo.Echo/Unary"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "20000 total, 20000 started, 20000 done, 20000 succeeded, 0 failed, 0 errored, 0 timeout" in report
