"""Runtimes that hang, are slow, lie or are away, over TCP too, before one instance and before two of one mesh."""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.peers.served import free_ports
from mmcore.adapters import External, open_runtime
from mmcore.errors import RpcError, Status
from mmcore.pb import inference_pb2
from tests.cutting import CuttingProxy
from tests.serving import Serve
from tests.toy_processes import Front, Runtime, refused, request

pytestmark = pytest.mark.slow

MIB = 2**20
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def runtimes(tmp_path: Path) -> Iterator[list[Runtime]]:
    """One on a Unix socket and two on ports."""
    ports = free_ports(2)
    runtimes = [Runtime(f"unix:{tmp_path}/toy.sock"), *(Runtime(f"127.0.0.1:{port}") for port in ports)]
    yield runtimes
    for runtime in runtimes:
        runtime.kill()


@pytest.fixture
def front(serve: Serve, runtimes: list[Runtime], tmp_path: Path) -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def start(runtime: Runtime, *args: object, **settings: Any) -> Front:
        runtime.start(**settings)
        fronts.append(Front(serve(None, "--runtime", runtime.address, *args), tmp_path))
        return fronts[-1]

    yield start
    for one in fronts:
        one.close()


Start = Callable[..., Front]


def test_a_runtime_at_a_port_is_killed_and_refilled_like_one_at_a_socket(front: Start, runtimes: list[Runtime]) -> None:
    runtime = runtimes[1]
    mesh = front(runtime)
    mesh.register("m", load=True)
    assert mesh.infer("m").model_name == "m"
    runtime.kill()
    runtime.start()
    assert mesh.infer("m").model_name == "m"
    assert (runtime.journal[0], "load m" in runtime.journal) == ("status", True)


async def test_what_is_under_way_when_the_connection_to_a_runtime_is_cut_fails_and_what_comes_later_is_answered(
    serve: Serve, runtimes: list[Runtime], tmp_path: Path
) -> None:
    runtime = runtimes[1]
    runtime.start()
    way = await CuttingProxy(runtime.address).start()
    front = Front(await asyncio.to_thread(serve, None, "--runtime", way.endpoint), tmp_path)
    try:
        await asyncio.to_thread(front.register, "m", load=True)
        came, long = way.received_bytes, b"60" + b" " * 50_000
        under_way = asyncio.create_task(asyncio.to_thread(front.call, "toy.Toy/Sleep", long, mm_model_id="m"))
        async with asyncio.timeout(15):
            while way.received_bytes < came + len(long):
                await asyncio.sleep(0.01)
        await way.cut()
        with pytest.raises(grpc.RpcError) as error:
            await asyncio.wait_for(under_way, 15)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        await way.mend()
        assert (await asyncio.to_thread(front.infer, "m")).model_name == "m"
    finally:
        await way.cut()
        front.close()


async def test_a_runtime_that_hangs_is_given_up_and_taken_back(runtimes: list[Runtime]) -> None:
    runtime = runtimes[0]
    runtime.start()
    external = External(open_runtime(runtime.address), silent_s=0.4, hung_s=0.4)
    down, up = asyncio.Event(), asyncio.Event()
    external.on_down, external.on_up = down.set, up.set
    await external.start()
    try:
        runtime.signal(signal.SIGSTOP)
        began = time.monotonic()
        # A request that was sent is answered when it is clear that it never will be.
        with pytest.raises(RpcError) as error:
            await external.channel.unary(INFER, request("m"), timeout_s=60)
        assert error.value.status is Status.UNAVAILABLE
        await asyncio.wait_for(down.wait(), 30)
        assert time.monotonic() - began < 30
        runtime.signal(signal.SIGCONT)
        await asyncio.wait_for(up.wait(), 30)
        assert external.up
    finally:
        await external.close()


async def test_a_runtime_that_is_only_slow_is_left_alone(runtimes: list[Runtime], tmp_path: Path) -> None:
    runtime = runtimes[0]
    runtime.start(load_ms=2000)
    external = External(open_runtime(runtime.address), silent_s=0.1, hung_s=1.0)
    down = asyncio.Event()
    external.on_down = down.set
    await external.start()
    try:
        with pytest.raises(RpcError) as error:
            # It answers no request for that long, and greets new connections all the while.
            await external.channel.unary("/toy.Toy/Sleep", b"2", timeout_s=1.5)
        assert error.value.status is Status.DEADLINE_EXCEEDED
        assert not down.is_set()
    finally:
        await external.close()


def test_slow_loads_run_side_by_side_as_the_runtime_says_and_others_are_answered_meanwhile(
    front: Start, runtimes: list[Runtime]
) -> None:
    runtime = runtimes[0]
    mesh = front(runtime, loads=2)
    mesh.register("hot", load=True)
    for number in range(4):
        mesh.register(f"s{number}", f"s{number}-slow.onnx")
    infer = mesh.channel.unary_unary(INFER)
    calls = [infer.future(request(f"s{number}"), timeout=30) for number in range(4)]
    answered = 0
    while not all(call.done() for call in calls):
        mesh.infer("hot")
        answered += 1
    assert all(call.result() for call in calls)
    assert answered > 4  # of three rounds of loads at most, were it to wait for them
    assert "most loading 2" in runtime.journal


@pytest.mark.parametrize(("predicts", "journal"), [(9, ["unload a", "load b"]), (None, ["load b", "unload a"])])
def test_room_is_made_before_a_load_where_the_runtime_tells_its_size(
    front: Start, runtimes: list[Runtime], predicts: int | None, journal: list[str]
) -> None:
    runtime = runtimes[0]
    mesh = front(runtime, "--min-residency", "0", "--eviction", "lru", capacity=15 * MIB, predicts=predicts)
    for name in ("a", "b"):
        mesh.register(name)
        # Of other content than the one before: what equal files took is known.
        (mesh.files / f"{name}.onnx").write_bytes(name.encode() * 100)
        mesh.infer(name)
    runtime.wait_for("unload a")
    assert [line for line in runtime.journal if line in journal] == journal
    # That it tells none is not asked for again.
    assert sum(line.startswith("predict") for line in runtime.journal) == (2 if predicts else 1)


def test_a_size_that_is_never_told_holds_no_load_up(front: Start, runtimes: list[Runtime]) -> None:
    mesh = front(runtimes[0], predicts="never")
    mesh.register("m")
    began = time.monotonic()
    assert mesh.infer("m").model_name == "m"
    assert time.monotonic() - began < 10


def test_sizes_that_cannot_be_are_refused_and_others_are_guessed_from_the_files(
    front: Start, runtimes: list[Runtime]
) -> None:
    runtime = runtimes[0]
    mesh = front(runtime)
    mesh.register("m", "m-boundless.onnx")
    code, text = refused(lambda: mesh.infer("m"))
    assert (code, str(2**64 - 1) in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    runtime.wait_for("unload m")
    mesh.register("u", "u-unknown.onnx", load=True)
    assert f"loaded model u version 1, {MIB} bytes" in mesh.instance.log_text()
    mesh.register("t", "t-tiny.onnx", load=True)
    assert mesh.infer("t").model_name == "t"


def test_a_model_that_is_unregistered_while_it_is_loaded_does_not_stay(front: Start, runtimes: list[Runtime]) -> None:
    runtime = runtimes[0]
    mesh = front(runtime)
    mesh.register("m", "m-slow.onnx")
    call = mesh.channel.unary_unary(INFER).future(request("m"), timeout=20)
    runtime.wait_for("load m")
    mesh.client.unregister("m")
    error = call.exception()
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    runtime.wait_for("unload m")


def test_an_instance_that_ends_has_the_runtime_give_up_what_it_loads(front: Start, runtimes: list[Runtime]) -> None:
    runtime = runtimes[0]
    mesh = front(runtime, "--grace", "1s", load_ms=60_000)
    mesh.register("m", "m-waits.onnx")
    call = mesh.channel.unary_unary(INFER).future(request("m"), timeout=20)
    runtime.wait_for("load m")
    mesh.instance.signal()
    assert mesh.instance.wait() == 0
    runtime.wait_for("cancelled m")
    runtime.wait_for("unload m")
    assert isinstance(call.exception(), grpc.RpcError)


@pytest.fixture
def two(front: Start, runtimes: list[Runtime], tmp_path: Path) -> tuple[Front, Front]:
    """Two instances of one mesh, each with a runtime of its own."""
    shared = ("--registry", f"sqlite:{tmp_path}/registry.db", "--peer-port", "0")
    return front(runtimes[0], *shared), front(runtimes[1], *shared)


def wait_until_loaded(mesh: Front, name: str) -> None:
    ends_at = time.monotonic() + 15
    while mesh.client.state(name) != "LOADED":
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def test_two_instances_with_a_runtime_each_answer_for_each_others_models(
    two: tuple[Front, Front], runtimes: list[Runtime]
) -> None:
    for number in range(8):
        two[0].register(f"m{number}")
    for number in range(8):
        for mesh in two:
            assert mesh.infer(f"m{number}").model_name == f"m{number}"
            # Both know of it before the other one is asked.
            for other in two:
                wait_until_loaded(other, f"m{number}")
    for number in range(8):
        holders = [f"load m{number}" in runtime.journal for runtime in runtimes[:2]]
        assert holders.count(True) == 1, (number, holders)
    # Any method goes to where the model is, and so do streams.
    for number in range(8):
        for mesh in two:
            assert mesh.call("toy.Toy/Ask", b"what?", mm_model_id=f"m{number}") == f"m{number} what?".encode()
            assert Talk(mesh, f"m{number}").say(b"1") == [b"1", b"1"]
    for number in range(8):
        assert [f"load m{number}" in runtime.journal for runtime in runtimes[:2]].count(True) == 1


def test_a_method_of_one_runtime_alone_is_answered_by_it_at_whatever_instance_it_arrives(
    front: Start, runtimes: list[Runtime], serve: Serve, tmp_path: Path
) -> None:
    shared = ("--registry", f"sqlite:{tmp_path}/registry.db", "--peer-port", "0")
    holder = front(runtimes[0], *shared)
    holder.register("m", load=True)
    strict = front(runtimes[1], *shared, methods={"inference.GRPCInferenceService/ModelInfer": [1]})
    built_in = Front(serve(None, *shared), tmp_path)
    try:
        for mesh in (strict, built_in):
            wait_until_loaded(mesh, "m")
            assert mesh.call("toy.Toy/Ask", b"what?", mm_model_id="m") == b"m what?"
            for method, metadata in (
                ("toy.Toy/Ask", {}),
                ("toy.Toy/Nothing", {"mm_model_id": "m"}),
                ("mmesh.ModelRuntime/unloadModel", {"mm_model_id": "m"}),
            ):
                code, _ = refused(
                    lambda method=method, metadata=metadata, mesh=mesh: mesh.call(method, b"", **metadata)
                )
                assert code is grpc.StatusCode.UNIMPLEMENTED
            assert refused(lambda mesh=mesh: mesh.call("toy.Toy/Ask", b"", mm_model_id="none"))[0] in (
                grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED
            )  # fmt: skip
    finally:
        built_in.close()
    assert "load m" not in runtimes[1].journal


class Talk:
    """A stream that goes on as long as both sides will."""

    def __init__(self, mesh: Front, model: str) -> None:
        self._model = model
        self._requests = queue.SimpleQueue[bytes]()
        stream = mesh.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        self._answers = stream(iter(self._requests.get, b""), timeout=30)

    def say(self, value: bytes) -> list[bytes]:
        """The two answers of the toy to this; RpcError where the stream has ended."""
        self._requests.put(request(self._model, value))
        answers = [inference_pb2.ModelStreamInferResponse.FromString(next(self._answers)) for _ in range(2)]
        assert [answer.error_message for answer in answers] == ["", ""]
        return [answer.infer_response.raw_output_contents[0] for answer in answers]

    def ended(self) -> grpc.StatusCode:
        """How it has ended."""
        with pytest.raises(grpc.RpcError) as error:
            next(self._answers)
        code: grpc.StatusCode = error.value.code()
        return code


@pytest.mark.parametrize("killed", ["runtime", "instance"])
def test_streams_end_at_once_with_the_runtime_or_instance_that_answers_them_and_go_on_elsewhere_when_begun_anew(
    two: tuple[Front, Front], runtimes: list[Runtime], killed: str
) -> None:
    two[0].register("m", load=True)
    for mesh in two:
        wait_until_loaded(mesh, "m")
    at = ["load m" in runtime.journal for runtime in runtimes[:2]].index(True)
    holder, other = two[at], two[1 - at]
    talks = [Talk(mesh, "m") for mesh in two]
    for number in range(20):
        for talk in talks:
            assert talk.say(b"%d" % number) == [b"%d" % number] * 2
    if killed == "runtime":
        runtimes[at].kill()
    else:
        holder.instance.process.kill()
    assert [talk.ended() for talk in talks] == [grpc.StatusCode.UNAVAILABLE] * 2
    for mesh in two if killed == "runtime" else [other]:
        assert Talk(mesh, "m").say(b"again") == [b"again"] * 2
    assert "load m" in runtimes[1 - at].journal


def test_what_a_lost_runtime_held_is_answered_by_the_other_instances_runtime(
    two: tuple[Front, Front], runtimes: list[Runtime]
) -> None:
    for number in range(4):
        two[0].register(f"m{number}")
        two[0].infer(f"m{number}")
    runtimes[0].kill()
    for number in range(4):
        for mesh in two:
            assert mesh.infer(f"m{number}").model_name == f"m{number}"
    assert {f"load m{number}" for number in range(4)} <= set(runtimes[1].journal)


def test_what_a_runtime_has_no_room_for_or_is_not_fit_for_is_answered_by_another_copy(
    two: tuple[Front, Front], runtimes: list[Runtime]
) -> None:
    two[0].register("m", key=json.dumps({"copies": {"everywhere": True}}), load=True)
    for runtime in runtimes[:2]:
        runtime.wait_for("load m")
    runtimes[0].call("Refuse", b"RESOURCE_EXHAUSTED")
    # That the other copy is loaded, the first instance knows some moments later.
    ends_at = time.monotonic() + 15
    while not (answered := _answer_of(two[0], "m")) and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert answered == "m"
    for code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
        runtimes[0].call("Refuse", code.encode())
        asked = [runtime.journal.count("infer m m None") for runtime in runtimes[:2]]
        assert two[0].infer("m").model_name == "m"
        assert two[1].infer("m").model_name == "m"
        assert [runtime.journal.count("infer m m None") for runtime in runtimes[:2]] == [asked[0] + 1, asked[1] + 2]
    # Another status is the model's own answer, and there is no third copy.
    runtimes[0].call("Refuse", b"ABORTED")
    assert refused(lambda: two[0].infer("m")) == (grpc.StatusCode.ABORTED, "not now")
    for runtime in runtimes[:2]:
        runtime.call("Refuse", b"UNAVAILABLE")
    assert refused(lambda: two[0].infer("m")) == (grpc.StatusCode.UNAVAILABLE, "not now")


def _answer_of(mesh: Front, model: str) -> str:
    try:
        return mesh.infer(model).model_name
    except grpc.RpcError:
        return ""
