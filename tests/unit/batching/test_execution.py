"""Inferences run where they should, are answered once, and leave no lease behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from mmcore.batching import Execution
from mmcore.batching.execution import Ran, rows_of
from mmcore.cache import Copy, CopyState
from mmcore.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    MmcoreError,
    Overloaded,
    Unavailable,
)
from mmcore.model import ModelSettings
from tests.unit.models_in_memory import FakeModel, made_copy, rows

INLINE, THREAD = ModelSettings(execution="inline"), ModelSettings(execution="thread")


class Answers:
    """Collects what ``done`` is told."""

    def __init__(self) -> None:
        self.outputs: list[Sequence[Any] | None] = []
        self.errors: list[BaseException | None] = []
        self.times: list[tuple[int, int]] = []
        self.thread = ""
        self.changed = asyncio.Event()

    def __call__(self, outputs: Sequence[Any] | None, error: BaseException | None, ran: Ran) -> None:
        self.outputs.append(outputs)
        self.errors.append(error)
        self.times.append((ran.queue_ns, ran.infer_ns))
        self.thread = threading.current_thread().name
        self.changed.set()

    async def count(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.outputs) < count:
                self.changed.clear()
                await self.changed.wait()


class Call:
    def __init__(self, deadline: float | None = None, *, cancelled: bool = False) -> None:
        self.deadline = deadline
        self.cancelled = cancelled


class Gate:
    """Work that waits until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.release()
        assert self.opened.wait(30)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


@pytest.fixture
async def execution() -> AsyncIterator[Execution]:
    made = Execution(threads=2, queue_limit=4)
    yield made
    await made.stop()


@pytest.fixture
def no_more_threads() -> Iterator[Callable[[], int]]:
    """What makes the system refuse each further thread, by stacks larger than all memory; undone with the same."""
    before = threading.stack_size()
    yield partial(threading.stack_size, 2**46)
    threading.stack_size(before)


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


async def test_an_inline_result_is_returned_at_once(execution: Execution) -> None:
    model = FakeModel()
    copy = made_copy(model, INLINE)
    answers = Answers()
    outputs = execution.run(copy, rows(3), ("Y",), answers)
    assert outputs is not None
    assert outputs[0][2].shape == (3,)
    assert model.threads == [threading.current_thread().name]
    assert answers.outputs == []
    assert copy.in_flight == 0


async def test_a_threads_result_comes_on_the_loop_with_its_times(execution: Execution) -> None:
    model = FakeModel(work=lambda: time.sleep(0.01))
    copy = made_copy(model, THREAD)
    answers = Answers()
    assert execution.run(copy, rows(3), (), answers) is None
    assert copy.in_flight == 1
    assert answers.outputs == []
    await answers.count(1)
    assert answers.errors == [None]
    assert model.threads[0].startswith("mmcore-infer")
    assert answers.thread == threading.current_thread().name
    assert answers.times[0][1] >= 10_000_000
    await asyncio.sleep(0)
    assert copy.in_flight == 0


async def test_the_first_call_runs_in_a_thread_and_a_fast_model_then_on_the_loop(execution: Execution) -> None:
    model = FakeModel()
    copy = made_copy(model)
    answers = Answers()
    assert execution.run(copy, rows(1), (), answers) is None
    await answers.count(1)
    for count in range(2, 100):
        if execution.run(copy, rows(1), (), answers) is not None:
            return
        await answers.count(count)
    pytest.fail("never ran inline")


@pytest.mark.parametrize("settings", [INLINE, THREAD], ids=["inline", "thread"])
@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (ValueError("bad value"), InferenceFailed, "ValueError: bad value"),
        (MemoryError(), Overloaded, "model 'm' ran out of memory"),
        (InvalidRequest("wrong input"), InvalidRequest, "wrong input"),
        (InferenceFailed("as it is"), InferenceFailed, "as it is"),
        (SystemExit(3), InferenceFailed, "SystemExit: 3"),
    ],
)
async def test_what_a_model_raises_is_answered(
    execution: Execution, settings: ModelSettings, error: BaseException, expected: type[MmcoreError], text: str
) -> None:
    copy = made_copy(FakeModel(work=failing(error)), settings)
    answers = Answers()
    if settings is INLINE:
        with pytest.raises(expected, match=text):
            execution.run(copy, rows(1), (), answers)
    else:
        execution.run(copy, rows(1), (), answers)
        await answers.count(1)
        assert type(answers.errors[0]) is expected
        assert str(answers.errors[0]) == text
        assert answers.outputs == [None]
        await asyncio.sleep(0)
    assert copy.in_flight == 0


async def test_a_failing_model_is_logged_once_in_a_while(
    execution: Execution, caplog: pytest.LogCaptureFixture
) -> None:
    copy = made_copy(FakeModel(work=failing(ValueError("bad"))), INLINE)
    for _ in range(100):
        with pytest.raises(InferenceFailed):
            execution.run(copy, rows(1), (), Answers())
    assert [record.getMessage() for record in caplog.records] == ["model m version 1 raised"]
    assert "Traceback" in caplog.text


async def test_a_full_queue_refuses_and_other_models_are_unaffected(execution: Execution) -> None:
    gate = Gate()
    slow, other = made_copy(FakeModel(work=gate), THREAD, "slow"), made_copy(FakeModel(), THREAD, "other")
    answers, others = Answers(), Answers()
    execution.run(slow, rows(1), (), answers)
    await gate.wait_entered()
    for _ in range(4):
        execution.run(slow, rows(1), (), answers)
    with pytest.raises(Overloaded, match="model 'slow' has 4 requests waiting, which is its limit; try again later"):
        execution.run(slow, rows(1), (), answers)
    assert slow.in_flight == 5
    for count in range(1, 4):
        execution.run(other, rows(1), (), others)
        await others.count(count)
    assert answers.outputs == []
    gate.opened.set()
    await answers.count(5)
    await asyncio.sleep(0)
    assert slow.in_flight == other.in_flight == 0
    execution.run(slow, rows(1), (), answers)
    await answers.count(6)


async def test_models_take_turns() -> None:
    execution = Execution(threads=1)
    order: list[str] = []
    gate = Gate()
    first = made_copy(FakeModel(work=gate), THREAD, "first")
    copies = {
        name: made_copy(FakeModel(work=lambda name=name: order.append(name)), THREAD, name)  # type: ignore[misc]  # default
        for name in ("many", "few")
    }
    answers = Answers()
    execution.run(first, rows(1), (), answers)
    await gate.wait_entered()
    for name in ["many"] * 5 + ["few"] * 2:
        execution.run(copies[name], rows(1), (), answers)
    gate.opened.set()
    await answers.count(8)
    assert order == ["many", "few", "many", "few", "many", "many", "many"]
    await execution.stop()


async def test_what_is_too_late_is_not_computed(execution: Execution) -> None:
    gate = Gate()
    blocker = made_copy(FakeModel(work=gate), THREAD, "blocker")
    model = FakeModel()
    copy = made_copy(model, THREAD)
    ignored, answers = Answers(), Answers()
    single = Execution(threads=1)
    single.run(blocker, rows(1), (), ignored)
    await gate.wait_entered()
    calls = [Call(time.monotonic() + 3600), Call(time.monotonic() + 3600)]
    for call in calls:
        single.run(copy, rows(1), (), answers, call)
    calls[0].deadline = time.monotonic()
    calls[1].cancelled = True
    gate.opened.set()
    await answers.count(2)
    assert [type(error) for error in answers.errors] == [DeadlineExceeded, Cancelled]
    assert model.threads == []
    await asyncio.sleep(0)
    assert copy.in_flight == 0
    await single.stop()
    inline = made_copy(model, INLINE)
    for late, error in ((Call(time.monotonic()), DeadlineExceeded), (Call(cancelled=True), Cancelled)):
        with pytest.raises(error):
            execution.run(inline, rows(1), (), answers, late)
    assert model.threads == []


async def test_a_copy_being_unloaded_takes_nothing_new_without_a_lease(execution: Execution) -> None:
    copy = made_copy(FakeModel(), INLINE)
    copy.state = CopyState.UNLOADING
    with pytest.raises(Unavailable, match="'m' is being unloaded"):
        execution.run(copy, rows(1), (), Answers())
    copy.acquire()
    assert execution.run(copy, rows(1), (), Answers()) is not None
    copy.release()


async def test_the_lease_outlasts_the_answer(execution: Execution) -> None:
    idle: list[int] = []
    copy = made_copy(FakeModel(), THREAD)
    copy._on_idle = lambda one: idle.append(len(answers.outputs))
    answers = Answers()
    execution.run(copy, rows(1), (), answers)
    await answers.count(1)
    await asyncio.sleep(0)
    assert idle == [1]


async def test_a_fault_in_answering_harms_nobody_else(execution: Execution, caplog: pytest.LogCaptureFixture) -> None:
    copy = made_copy(FakeModel(), THREAD)

    def broken(*result: object) -> None:
        raise RuntimeError("cannot answer")

    execution.run(copy, rows(1), (), broken)
    answers = Answers()
    execution.run(copy, rows(1), (), answers)
    await answers.count(1)
    await asyncio.sleep(0)
    assert copy.in_flight == 0
    assert "cannot answer" in caplog.text


async def test_stopping_answers_what_waits() -> None:
    execution = Execution(threads=2, queue_limit=100)
    gate = Gate()
    copy = made_copy(FakeModel(work=gate), THREAD)
    answers = Answers()
    for _ in range(10):
        execution.run(copy, rows(1), (), answers)
    await gate.wait_entered()
    stopping = asyncio.create_task(execution.stop())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        execution.run(copy, rows(1), (), answers)
    gate.opened.set()
    await stopping
    assert len(answers.outputs) == 10
    kinds = [type(error) for error in answers.errors]
    assert kinds.count(Unavailable) == 9
    assert copy.in_flight == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmcore-infer")]


async def test_every_inference_of_a_crowd_is_answered_once() -> None:
    execution = Execution(threads=4, queue_limit=10_000)
    copies: list[Copy] = [made_copy(FakeModel(), THREAD, f"m{number}") for number in range(5)]
    answers = Answers()
    for number in range(2000):
        execution.run(copies[number % 5], rows(1), (), answers)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await answers.count(2000)
    await asyncio.sleep(0.01)
    assert len(answers.outputs) == 2000
    assert all(error is None for error in answers.errors)
    assert [copy.in_flight for copy in copies] == [0] * 5
    await execution.stop()


async def test_without_a_thread_a_request_is_refused_and_later_ones_are_served(
    execution: Execution, no_more_threads: Callable[[], int]
) -> None:
    copy, answers = made_copy(FakeModel(), THREAD), Answers()
    before = no_more_threads()
    with pytest.raises(Overloaded, match="no thread"):
        execution.run(copy, rows(1), (), answers)
    assert copy.pins == 0
    threading.stack_size(before)
    assert execution.run(copy, rows(1), (), answers) is None
    await answers.count(1)
    assert answers.errors == [None]


async def test_where_no_further_thread_can_be_lent_those_that_there_are_answer(
    execution: Execution, no_more_threads: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    gate, answers = Gate(), Answers()
    # Of two threads its share is one: with the second inference at once it is lent a third.
    copy = made_copy(FakeModel(work=gate), ModelSettings(execution="thread", instances=2))
    execution.run(copy, rows(1), (), answers)
    await gate.wait_entered()
    no_more_threads()
    execution.run(copy, rows(1), (), answers)
    execution.run(made_copy(FakeModel(), THREAD, "other"), rows(1), (), answers)
    # Not in a thread: there is none to wait in.
    async with asyncio.timeout(10):
        while not gate.entered.acquire(blocking=False):
            await asyncio.sleep(0.001)
    assert "go on with 2 threads" in caplog.text
    gate.opened.set()
    await answers.count(3)
    assert answers.errors == [None, None, None]


def test_rows_are_the_first_dimension() -> None:
    assert rows_of({}) == 1
    assert rows_of(rows(7)) == 7
    assert rows_of({"X": rows(7)["X"].reshape(7, 1)[0, 0]}) == 1  # type: ignore[dict-item]  # a scalar has no dimension
