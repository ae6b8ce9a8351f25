"""From a request's bytes to its answer's, with models that are made up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from mmcore._ext.responses import ResponseCache
from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed, Status
from mmcore.model import ModelSettings
from mmcore.routing import Copy, Router
from mmcore.server.calls import Body, Waiting
from mmcore.server.inference import Inference
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tracing import Tracing
from tests.unit.models_in_memory import FakeModel, FakeOrigin, Loader, names_of

INLINE, THREAD = ModelSettings(execution="inline"), ModelSettings(execution="thread")


class FakeCall:
    """As much of a call as inference asks of it."""

    def __init__(self, *, deadline: float | None = None, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.metadata = metadata
        self.deadline = deadline
        self.cancelled = False
        self.on_cancel: Any = None
        self.ended = asyncio.Event()
        self.message: Body | None = None
        self.error: tuple[int, str] | None = None

    def reply(self, message: Body) -> None:
        self.message = message
        self.ended.set()

    def fail(self, status: int, details: str) -> None:
        self.error = status, details
        self.ended.set()


class Bench:
    """Inference on one model ``m``, and what a test looks at."""

    def __init__(self, settings: ModelSettings) -> None:
        self.loader = Loader()
        self.router = Router(capacity_bytes=2**20, load=self.loader)
        self.router.register("m", ("1",), FakeOrigin(settings))
        self.tracing = Tracing(self.router)
        self.infer = Inference(
            self.router, names_of(self.router), SharedMemory(), self.tracing, Waiting(), ResponseCache(2**20)
        ).infer

    async def load(self) -> FakeModel:
        await self.router.load("m")
        return self.loader.models[-1]

    @property
    def copy(self) -> Copy:
        found = self.router.lookup("m")
        assert found is not None
        return found

    async def ask(self, body: bytes, call: FakeCall | None = None) -> Any:
        call = call or FakeCall()
        message = self.infer(call, body)
        if message is None:
            await asyncio.wait_for(call.ended.wait(), 10)
            message = call.message
        assert message is not None, call.error
        return decode_infer_response(b"".join(message) if isinstance(message, list) else bytes(message))

    async def refused(self, body: bytes, call: FakeCall | None = None) -> tuple[int, str]:
        call = call or FakeCall()
        assert self.infer(call, body) is None
        await asyncio.wait_for(call.ended.wait(), 10)
        assert call.error is not None
        return call.error


@pytest.fixture(params=[INLINE, THREAD], ids=["inline", "thread"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = Bench(request.param)
    yield made
    await made.router.close()


@pytest.fixture
async def inline() -> AsyncIterator[Bench]:
    made = Bench(INLINE)
    yield made
    await made.router.close()


@pytest.fixture
async def threaded() -> AsyncIterator[Bench]:
    made = Bench(THREAD)
    yield made
    await made.router.close()


def body(rows: int = 1, **more: Any) -> bytes:
    return encode_infer_request(more.pop("model", "m"), [("X", "FP32", np.arange(rows, dtype=np.float32))], **more)


async def test_the_first_request_loads_and_the_next_are_answered(bench: Bench) -> None:
    for number in range(100):
        response = await bench.ask(body(3, request_id=str(number)))
        assert (response.model_name, response.model_version, response.id) == ("m", "1", str(number))
        assert response.outputs[0].array().tolist() == [0, 1, 2]
    assert bench.loader.loads == ["m"]


async def test_inline_requests_are_answered_at_once_on_the_loops_thread(inline: Bench) -> None:
    model = await inline.load()
    for _ in range(100):
        assert inline.infer(FakeCall(), body()) is not None
    assert set(model.threads) == {threading.current_thread().name}


async def test_requests_for_threads_run_there(threaded: Bench) -> None:
    model = await threaded.load()
    await asyncio.gather(*(threaded.ask(body()) for _ in range(20)))
    assert all(name.startswith("mmcore-infer") for name in model.threads)


async def test_typed_is_answered_typed_and_raw_raw(bench: Bench) -> None:
    assert (await bench.ask(body(raw=True))).raw
    assert not (await bench.ask(body(raw=False))).raw


async def test_parameters_come_back_without_the_instructions(bench: Bench) -> None:
    sent = {"mine": 5, "sequence_id": 7, "timeout": 1000, "triton_enable_empty_final_response": True}
    response = await bench.ask(body(parameters=sent))
    assert response.parameters == {"mine": 5}
    assert response.outputs[0].array().tolist() == [0]


async def test_every_request_is_counted_with_its_rows(bench: Bench) -> None:
    await bench.load()
    for rows in (1, 3, 3):
        await bench.ask(body(rows))
    await bench.ask(body(2, parameters={"mine": 1}))
    counted = bench.copy.statistics.snapshot()
    assert (counted.success.count, counted.fail.count) == (4, 0)
    assert (counted.inference_count, counted.execution_count) == (9, 4)
    assert [(batch.batch_size, batch.compute_infer.count) for batch in counted.batches] == [(1, 1), (2, 1), (3, 2)]
    for part in (counted.compute_input, counted.compute_infer, counted.compute_output):
        assert 0 < part.ns < 10e9
    assert counted.success.ns == sum(
        part.ns for part in (counted.queue, counted.compute_input, counted.compute_infer, counted.compute_output)
    )


async def test_waiting_for_the_load_is_time_in_the_queue(inline: Bench) -> None:
    gate = inline.loader.gate("m")
    call = FakeCall()
    assert inline.infer(call, body()) is None
    begun = time.monotonic_ns()
    await asyncio.to_thread(inline.loader.entered["m"].wait, 10)
    await asyncio.sleep(0.02)
    released = time.monotonic_ns()
    gate.set()
    await asyncio.wait_for(call.ended.wait(), 10)
    counted = inline.copy.statistics.snapshot()
    assert counted.queue.ns >= released - begun
    assert counted.compute_input.ns <= time.monotonic_ns() - released


async def test_a_wrong_request_is_refused_and_counted(bench: Bench) -> None:
    await bench.load()
    await bench.ask(body())
    wrong = encode_infer_request("m", [("Z", "FP32", np.zeros(1, np.float32))])
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="Z"):
            bench.infer(FakeCall(), wrong)
    with pytest.raises(InvalidRequest, match="malformed"):
        bench.infer(FakeCall(), b"\xff\xff")
    assert bench.copy.statistics.snapshot().fail.count == 2


async def test_what_a_model_raises_inline_reaches_the_caller(inline: Bench) -> None:
    model = await inline.load()

    def fail() -> None:
        raise InferenceFailed("I will not")

    model.work = fail
    for _ in range(50):
        with pytest.raises(InferenceFailed, match="I will not"):
            inline.infer(FakeCall(), body())
    model.work = lambda: None
    await inline.ask(body())
    counted = inline.copy.statistics.snapshot()
    assert (counted.success.count, counted.fail.count) == (1, 50)


async def test_what_a_model_raises_in_a_thread_reaches_the_caller(threaded: Bench) -> None:
    model = await threaded.load()

    def fail() -> None:
        raise InvalidRequest("such an input")

    model.work = fail
    assert await threaded.refused(body()) == (Status.INVALID_ARGUMENT, "such an input")
    assert threaded.copy.statistics.snapshot().fail.count == 1


async def test_a_failed_load_is_told_to_all_who_wait(bench: Bench) -> None:
    bench.loader.errors["m"] = LoadFailed("the file is empty")
    told = await asyncio.gather(*(bench.refused(body()) for _ in range(5)))
    assert told == [(Status.FAILED_PRECONDITION, "the file is empty")] * 5
    assert bench.loader.loads == ["m"]


async def test_a_caller_who_leaves_during_the_load_is_not_answered(inline: Bench) -> None:
    gate = inline.loader.gate("m")
    leaving, staying = FakeCall(), FakeCall()
    for call in (leaving, staying):
        assert inline.infer(call, body()) is None
    await asyncio.to_thread(inline.loader.entered["m"].wait, 10)
    leaving.on_cancel()
    gate.set()
    await asyncio.wait_for(staying.ended.wait(), 10)
    assert staying.message is not None
    assert not leaving.ended.is_set()
    assert len(inline.loader.models[0].threads) == 1


async def test_a_request_that_came_too_late_is_not_run(inline: Bench) -> None:
    model = await inline.load()
    for _ in range(40):
        await inline.ask(body())
    ran = len(model.threads)
    with pytest.raises(Exception, match="deadline"):
        await inline.ask(body(), FakeCall(deadline=time.monotonic() - 1))
    assert len(model.threads) == ran
    await inline.ask(body(), FakeCall(deadline=time.monotonic() + 60))


async def test_metadata_may_name_the_model(bench: Bench) -> None:
    response = await bench.ask(body(model=""), FakeCall(metadata=(("mm-model-id", "m"),)))
    assert response.model_name == "m"
    with pytest.raises(InvalidRequest, match="must include mm-model-id header"):
        await bench.ask(body(model=""))


async def test_a_model_that_turns_slow_moves_to_a_thread() -> None:
    bench = Bench(ModelSettings())
    try:
        model = await bench.load()
        for _ in range(100):
            await bench.ask(body())
        assert threading.current_thread().name in model.threads
        model.work = lambda: time.sleep(0.002)
        for _ in range(10):
            await bench.ask(body())
        assert model.threads[-1].startswith("mmcore-infer")
    finally:
        await bench.router.close()


async def test_a_model_found_fast_takes_the_compiled_path_at_once_and_is_measured_ever_more_rarely() -> None:
    bench = Bench(ModelSettings())
    measured: list[Copy] = []
    infer = bench.router.infer

    def counting(copy: Copy, *args: Any, **more: Any) -> Any:
        measured.append(copy)
        return infer(copy, *args, **more)

    bench.router.infer = counting  # type: ignore[method-assign]
    try:
        await bench.load()
        await bench.ask(body())
        for _ in range(10):
            assert bench.infer(FakeCall(), body()) is not None
        assert len(measured) == 1
        for _ in range(4000):
            await bench.ask(body())
        assert len(measured) <= 10
    finally:
        await bench.router.close()
