"""Requests that wait for a thread: which run together, in which order, and which are not run at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcore.batching import Execution
from mmcore.batching.execution import Ran
from mmcore.cache import Copy
from mmcore.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from mmcore.model import Batching, ModelSettings, QueuePolicy
from mmcore.runtimes import OutputTensor
from tests.unit.batching.test_execution import Answers, Call, Gate
from tests.unit.models_in_memory import FakeModel, made_copy


class Recorder(FakeModel):
    """Answers its input times ten, keeps what it was asked, and waits at the gate when it is asked for 0."""

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.asked: list[list[float]] = []

    def infer(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        values = inputs["X"].tolist()
        if self.gate is not None and values == [0]:
            self.gate()
        else:
            self.asked.append(values)
        if -1 in values:
            raise InvalidRequest("negative")
        return [("Y", "FP32", inputs["X"] * 10)]


def settings(most_rows: int = 100, *, merges: bool = True, **batching: Any) -> ModelSettings:
    return ModelSettings(execution="thread", max_batch_size=most_rows, merges=merges, batching=Batching(**batching))


class Scene:
    """One copy whose only thread is held by a first request until :meth:`open`."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.model = Recorder(self.gate)
        self.execution = Execution(threads=1)
        self.first, self.answers = Answers(), Answers()
        self.order: list[float] = []
        self.ran: dict[float, Ran] = {}
        self.copy: Copy

    async def hold(self, stated: ModelSettings) -> None:
        self.copy = made_copy(self.model, stated)
        self.execution.run(self.copy, {"X": np.zeros(1, np.float32)}, (), self.first)
        await self.gate.wait_entered()

    def ask(self, *values: float, names: Sequence[str] = (), caller: Call | None = None, **more: Any) -> None:
        def done(outputs: Sequence[Any] | None, error: BaseException | None, ran: Ran) -> None:
            self.order.append(values[0])
            self.ran[values[0]] = ran
            self.answers(outputs, error, ran)

        inputs = {"X": np.array(values, more.pop("dtype", np.float32))}
        assert self.execution.run(self.copy, inputs, names, done, caller, **more) is None

    async def open(self, count: int) -> None:
        self.gate.opened.set()
        await self.answers.count(count)
        await asyncio.sleep(0)

    def outputs(self) -> list[list[float] | None]:
        return [outputs[0][2].tolist() if outputs is not None else None for outputs in self.answers.outputs]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    yield made
    made.gate.opened.set()
    await made.execution.stop()


async def test_what_waits_while_the_model_is_busy_runs_as_one(scene: Scene) -> None:
    await scene.hold(settings())
    for values in ([1], [2, 3], [4]):
        scene.ask(*values)
    await scene.open(3)
    assert scene.model.asked == [[1, 2, 3, 4]]
    assert scene.outputs() == [[10], [20, 30], [40]]
    assert [scene.ran[value].rows for value in (1, 2, 4)] == [4, 4, 4]
    assert [scene.ran[value].leads for value in (1, 2, 4)] == [True, False, False]
    assert scene.copy.in_flight == 0


async def test_a_batch_has_no_more_rows_than_are_allowed(scene: Scene) -> None:
    await scene.hold(settings(3))
    for values in ([1], [2, 3], [4], [5, 6, 7], [8]):
        scene.ask(*values)
    await scene.open(5)
    assert scene.model.asked == [[1, 2, 3], [4, 8], [5, 6, 7]]
    assert sorted(scene.order) == [1, 2, 4, 5, 8]


async def test_a_request_of_too_many_rows_is_refused(scene: Scene) -> None:
    await scene.hold(settings(3))
    with pytest.raises(InvalidRequest, match="batch-size must be <= 3 for 'm', got 4"):
        scene.ask(1, 2, 3, 4)


async def test_requests_that_differ_run_apart(scene: Scene) -> None:
    await scene.hold(settings())
    scene.ask(1)
    scene.ask(2, dtype=np.float64)
    scene.ask(3, names=("Y",))
    scene.ask(4)
    await scene.open(4)
    assert scene.model.asked == [[1, 4], [2], [3]]


async def test_in_order_means_that_none_is_passed_over(scene: Scene) -> None:
    await scene.hold(settings(ordered=True))
    for at, dtype in enumerate((np.float32, np.float64, np.float32, np.float32), 1):
        scene.ask(at, dtype=dtype)
    await scene.open(4)
    assert scene.model.asked == [[1], [2], [3, 4]]
    assert scene.order == [1, 2, 3, 4]


async def test_a_bad_request_fails_alone(scene: Scene) -> None:
    await scene.hold(settings())
    for value in (1, -1, 3):
        scene.ask(value)
    await scene.open(3)
    assert scene.outputs() == [[10], None, [30]]
    assert [type(error) for error in scene.answers.errors] == [type(None), InvalidRequest, type(None)]


async def test_models_whose_requests_are_not_merged_run_one_by_one(scene: Scene) -> None:
    await scene.hold(settings(merges=False))
    for value in (1, 2):
        scene.ask(value)
    await scene.open(2)
    assert scene.model.asked == [[1], [2]]


async def test_urgent_requests_go_first(scene: Scene) -> None:
    await scene.hold(settings(2, levels=3, default_level=2))
    for value, priority in ((1, 3), (2, 0), (3, 1), (4, 9), (5, 1), (6, 2)):
        scene.ask(value, priority=priority)
    await scene.open(6)
    assert scene.model.asked == [[3, 5], [2, 4], [6, 1]]


async def test_a_full_queue_refuses_at_the_models_own_limit(scene: Scene) -> None:
    await scene.hold(settings(policy=QueuePolicy(limit=2)))
    scene.ask(1)
    scene.ask(2)
    with pytest.raises(Overloaded, match="has 2 requests waiting"):
        scene.ask(3)
    await scene.open(2)
    scene.ask(4)
    await scene.answers.count(3)


async def test_a_full_queue_makes_room_of_those_that_left(scene: Scene) -> None:
    await scene.hold(settings(policy=QueuePolicy(limit=2)))
    gone = Call()
    scene.ask(1, caller=gone)
    scene.ask(2)
    gone.cancelled = True
    scene.ask(3)
    await scene.open(3)
    assert scene.model.asked == [[2, 3]]
    assert scene.order == [1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "own"),
    [(QueuePolicy(timeout_us=2000, takes_timeouts=False), 0), (QueuePolicy(), 2000)],
    ids=["the model's", "its own"],
)
async def test_a_request_is_refused_when_its_time_to_wait_is_over(scene: Scene, policy: QueuePolicy, own: int) -> None:
    await scene.hold(settings(policy=policy))
    scene.ask(1, timeout_us=own)
    await scene.answers.count(1)  # while the thread is still held
    assert isinstance(scene.answers.errors[0], DeadlineExceeded)
    assert "timeout expired" in str(scene.answers.errors[0])
    assert scene.copy.in_flight == 1
    scene.gate.opened.set()
    await scene.first.count(1)
    assert scene.model.asked == []


async def test_a_request_may_be_put_behind_the_others_instead(scene: Scene) -> None:
    await scene.hold(settings(1, policy=QueuePolicy(timeout_us=10_000_000, delays=True)))
    scene.ask(1, timeout_us=1000)
    scene.ask(2)
    async with asyncio.timeout(10):
        while next(iter(scene.copy.lane.jobs)).inputs["X"][0] == 1:
            await asyncio.sleep(0.001)
    await scene.open(2)
    assert scene.model.asked == [[2], [1]]


async def test_a_deadline_that_cannot_be_met_is_not_tried_but_now_and_then(scene: Scene) -> None:
    await scene.hold(settings(merges=False))
    scene.copy.lane.pace(1).ran_in_thread(3_600_000_000_000)
    for value in range(1, 10):
        scene.ask(value, caller=Call(time.monotonic() + 60))
    await scene.open(9)
    assert [type(error) for error in scene.answers.errors] == [DeadlineExceeded] * 8 + [type(None)]
    # The ninth has shown that the model is faster than that.
    scene.ask(10, caller=Call(time.monotonic() + 60))
    await scene.answers.count(10)
    assert scene.model.asked == [[9], [10]]


async def test_no_deadline_is_given_up_for_a_time_that_was_never_measured(scene: Scene) -> None:
    """A request of a new size; a smaller one says little of it."""
    await scene.hold(settings(merges=False))
    scene.copy.lane.pace(1).ran_in_thread(1_000_000_000)
    scene.ask(*range(1, 513), caller=Call(time.monotonic() + 60))
    await scene.open(1)
    assert scene.answers.errors == [None]
    assert scene.copy.lane.pace(512).cost_ns < 60e9


async def test_a_delay_lets_a_batch_grow_until_it_is_over(scene: Scene) -> None:
    scene.copy = made_copy(scene.model, settings(delay_us=20_000))
    scene.ask(1)
    await asyncio.sleep(0)
    scene.ask(2)
    await scene.answers.count(2)
    assert scene.model.asked == [[1, 2]]


async def test_a_batch_of_a_preferred_size_does_not_wait(scene: Scene) -> None:
    scene.copy = made_copy(scene.model, settings(delay_us=3_600_000_000, preferred=(2, 4)))
    for value in (1, 2):
        scene.ask(value)
    await scene.answers.count(2)
    assert sorted(value for values in scene.model.asked for value in values) == [1, 2]
    scene.ask(3)
    assert scene.copy.lane.held is not None
    await scene.execution.stop()
    assert isinstance(scene.answers.errors[2], Unavailable)
    assert scene.copy.in_flight == 0


async def test_many_requests_are_each_answered_with_their_own_rows() -> None:
    execution = Execution(threads=4, queue_limit=10_000)
    copy = made_copy(Recorder(), settings(50))
    random = np.random.default_rng(1)
    wrong: list[int] = []
    answers = Answers()

    def asked(number: int, array: NDArray[Any]) -> None:
        def done(outputs: Sequence[Any] | None, error: BaseException | None, ran: Ran) -> None:
            if outputs is None or not np.array_equal(outputs[0][2], array * 10):
                wrong.append(number)
            answers(outputs, error, ran)

        execution.run(copy, {"X": array}, (), done)

    for number in range(3000):
        asked(number, random.integers(0, 1000, random.integers(1, 6)).astype(np.float32))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await answers.count(3000)
    assert wrong == []
    await asyncio.sleep(0)
    assert copy.in_flight == 0
    await execution.stop()
