"""Requests of one turn of the loop run as one inference, where that is faster, and are answered each with its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcore._ext.responses import ResponseCache
from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.errors import Status
from mmcore.model import ModelSettings, ModelSource
from mmcore.routing import Copy, Router
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Waiting
from mmcore.server.inference import Inference
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tracing import Tracing
from tests.unit.models_in_memory import FakeModel, FakeOrigin, names_of
from tests.unit.server.test_inference import FakeCall

CALL_S = 200e-6
ROW_S = 1e-6


class Rows(FakeModel):
    """Answers its input times ten; a call takes as long as it is told, whatever computer this is."""

    def __init__(self, call_s: float, row_s: float) -> None:
        super().__init__()
        self.call_s, self.row_s = call_s, row_s
        self.asked: list[list[float]] = []
        self.before: Callable[[], object] = lambda: None

    def infer(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        self.before()
        values = inputs["X"].tolist()
        self.asked.append(values)
        until = time.perf_counter() + self.call_s + self.row_s * len(values)
        while time.perf_counter() < until:
            pass
        if -1 in values:
            raise ValueError("negative")
        return [("Y", "FP32", inputs["X"] * 10)]


class Bench:
    """Inference on one model, and requests that come in one turn of the loop."""

    def __init__(self, settings: ModelSettings, call_s: float, row_s: float) -> None:
        self.model = Rows(call_s, row_s)

        def load(source: ModelSource) -> FakeModel:
            return self.model

        self.router = Router(capacity_bytes=2**20, load=load)
        self.router.register("m", ("1",), FakeOrigin(settings))
        self.infer = Inference(
            self.router, names_of(self.router), SharedMemory(), Tracing(self.router), Waiting(), ResponseCache(2**20)
        ).infer

    @property
    def copy(self) -> Copy:
        found = self.router.lookup("m")
        assert found is not None
        return found

    async def turn(self, *members: Sequence[float], **more: Any) -> list[Any]:
        """What requests that come in one turn are answered: rows, or status and text."""
        calls = [FakeCall() for _ in members]
        for call, values in zip(calls, members, strict=True):
            body = encode_infer_request("m", [("X", "FP32", np.array(values, np.float32))], **more)
            message = self.infer(call, bytes(body))  # type: ignore[arg-type]  # as much of a call as is asked of one
            if message is not None:
                call.reply(message)
        answers: list[Any] = []
        for call in calls:
            await asyncio.wait_for(call.ended.wait(), 10)
            if call.error is not None:
                answers.append(call.error)
                continue
            assert call.message is not None
            message = call.message
            whole = b"".join(message) if isinstance(message, list) else bytes(message)
            answers.append(decode_infer_response(whole).outputs[0].array().tolist())
        return answers

    async def warm(self) -> None:
        """Load, and go on until requests of one turn are gathered."""
        await self.router.load("m")
        for _ in range(100):
            await self.turn([5, 6])
            self.model.asked.clear()
            await self.turn([1], [2], [3], [4])
            if [1, 2, 3, 4] in self.model.asked:
                self.model.asked.clear()
                return
        pytest.fail("never gathered")


MERGED = ModelSettings(execution="inline", max_batch_size=100, merges=True)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(MERGED, CALL_S, ROW_S)
    await made.warm()
    yield made
    await made.router.close()


async def test_requests_of_one_turn_run_once(bench: Bench) -> None:
    assert await bench.turn([1], [2, 3], [4]) == [[10], [20, 30], [40]]
    assert bench.model.asked == [[1, 2, 3, 4]]
    await asyncio.sleep(0)
    assert bench.copy.in_flight == 0


async def test_one_bad_request_fails_alone(bench: Bench) -> None:
    first, second, third = await bench.turn([1], [-1], [3])
    assert (first, third) == ([10], [30])
    assert second == (Status.INTERNAL, "ValueError: negative")


async def test_a_request_that_left_is_not_run(bench: Bench) -> None:
    gone = FakeCall()
    gone.cancelled = True
    body = bytes(encode_infer_request("m", [("X", "FP32", np.array([7], np.float32))]))
    assert bench.infer(gone, body) is None  # type: ignore[arg-type]  # as above
    assert await bench.turn([1], [2]) == [[10], [20]]
    assert bench.model.asked == [[1, 2]]
    assert gone.message is None


async def test_no_more_rows_than_allowed_run_as_one(bench: Bench) -> None:
    rows = [float(value) for value in range(1, 61)]
    assert await bench.turn(rows, rows) == [[value * 10 for value in rows]] * 2
    assert bench.model.asked == [rows, rows]


async def test_a_turn_has_no_more_requests_than_run_as_one(bench: Bench) -> None:
    answers = await bench.turn(*[[float(value)] for value in range(1, 71)])
    assert answers == [[value * 10.0] for value in range(1, 71)]
    assert [len(values) for values in bench.model.asked] == [64, 6]


async def test_more_rows_than_the_settings_allow_are_refused(bench: Bench) -> None:
    (refused,) = await bench_refusal(bench)
    assert refused[0] == Status.INVALID_ARGUMENT
    assert "batch-size must be <= 100 for 'm', got 101" in refused[1]


async def bench_refusal(bench: Bench) -> list[Any]:
    call = FakeCall()
    body = bytes(encode_infer_request("m", [("X", "FP32", np.zeros(101, np.float32))]))
    try:
        bench.infer(call, body)  # type: ignore[arg-type]  # as above
    except Exception as error:
        return [(getattr(error, "status", None), str(error))]
    return [call.error]


async def test_statistics_count_rows_executions_and_batches(bench: Bench) -> None:
    before = bench.copy.statistics.snapshot()
    await bench.turn([1], [2, 3], [4])
    after = bench.copy.statistics.snapshot()
    assert after.inference_count - before.inference_count == 4
    assert after.execution_count - before.execution_count == 1
    assert after.success.count - before.success.count == 3
    assert after.queue.ns > before.queue.ns
    counts = {batch.batch_size: batch.compute_infer.count for batch in after.batches}
    earlier = {batch.batch_size: batch.compute_infer.count for batch in before.batches}
    assert counts[4] - earlier.get(4, 0) == 1
    assert sum(counts.values()) == after.execution_count


async def test_lone_requests_stop_waiting_for_others(bench: Bench) -> None:
    at_once = 0
    body = bytes(encode_infer_request("m", [("X", "FP32", np.array([1], np.float32))]))
    for _ in range(200):
        call = FakeCall()
        message = bench.infer(call, body)  # type: ignore[arg-type]  # as above
        at_once += message is not None
        await asyncio.sleep(0)
        assert message is not None or call.message is not None
        # As long as a client takes to ask again.
        until = time.perf_counter() + 50e-6
        while time.perf_counter() < until:
            pass
    assert at_once > 100


async def test_where_rows_cost_as_much_as_calls_nothing_is_merged_for_long() -> None:
    bench = Bench(MERGED, 0.0, 100e-6)
    await bench.router.load("m")
    for _ in range(60):
        await bench.turn([1], [2], [3], [4])
    bench.model.asked.clear()
    await bench.turn([1], [2], [3], [4])
    assert bench.model.asked == [[1], [2], [3], [4]]
    await bench.router.close()


async def test_many_that_gain_outweigh_a_few_that_do_not(bench: Bench) -> None:
    many = [[value] for value in range(64)]
    for _ in range(30):
        bench.model.before = lambda: None
        await bench.turn(*many)
        # As where the processor is taken away: a call for two takes as long as three.
        bench.model.before = lambda: time.sleep(2 * CALL_S)
        for _ in range(6):
            await bench.turn([1], [2])
    bench.model.asked.clear()
    await bench.turn(*many)
    assert [len(values) for values in bench.model.asked] == [64]


async def test_a_model_that_is_not_to_be_merged_is_asked_one_by_one() -> None:
    bench = Bench(ModelSettings(execution="inline", merges=False), CALL_S, ROW_S)
    await bench.router.load("m")
    for _ in range(50):
        assert await bench.turn([1], [2], [3]) == [[10], [20], [30]]
    assert all(len(values) == 1 for values in bench.model.asked)
    await bench.router.close()


async def test_gathered_requests_wait_for_the_only_instance() -> None:
    bench = Bench(replace(MERGED, instances=1), CALL_S, ROW_S)
    await bench.warm()
    entered, opened = threading.Event(), threading.Event()
    bench.model.before = lambda: (entered.set(), opened.wait(10))
    gathered, threaded = [FakeCall(), FakeCall()], FakeCall()
    for call, value in zip(gathered, (1, -1), strict=True):
        body = bytes(encode_infer_request("m", [("X", "FP32", np.array([value], np.float32))]))
        assert bench.infer(call, body) is None  # type: ignore[arg-type]  # as above
    # What has parameters goes another way, here into a thread, while they wait for the turn's end.
    bench.copy.lane.execution = "thread"
    body = bytes(encode_infer_request("m", [("X", "FP32", np.array([5], np.float32))], parameters={"mine": 1}))
    assert bench.infer(threaded, body) is None  # type: ignore[arg-type]  # as above
    assert await asyncio.to_thread(entered.wait, 10)
    bench.copy.lane.execution = "inline"
    await asyncio.sleep(0)
    assert not any(call.ended.is_set() for call in gathered)
    opened.set()
    for call in (*gathered, threaded):
        await asyncio.wait_for(call.ended.wait(), 10)
    assert (threaded.error, gathered[0].error) == (None, None)
    assert gathered[1].error == (Status.INTERNAL, "ValueError: negative")
    await bench.router.close()


async def test_unloading_waits_for_what_is_gathered(bench: Bench) -> None:
    call = FakeCall()
    body = bytes(encode_infer_request("m", [("X", "FP32", np.array([5], np.float32))]))
    copy = bench.copy
    assert bench.infer(call, body) is None  # type: ignore[arg-type]  # as above
    assert copy.in_flight == 1
    await bench.router.unload("m")
    await asyncio.wait_for(call.ended.wait(), 10)
    assert call.error is None
    assert await asyncio.to_thread(bench.model.closed.wait, 10)
