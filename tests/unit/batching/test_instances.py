"""No more inferences of a model at once than its settings say, wherever they run, and as many where they ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mmcore.batching import Execution
from mmcore.model import ModelSettings
from tests.unit.batching.test_execution import Answers, Gate
from tests.unit.models_in_memory import FakeModel, made_copy, rows

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def execution() -> AsyncIterator[Execution]:
    made = Execution(threads=2)
    yield made
    await made.stop()


def settings(instances: int, execution: str = "thread") -> ModelSettings:
    return ModelSettings(execution=execution, instances=instances)


async def test_more_instances_than_threads_run_at_once_and_leave_a_thread_to_others(execution: Execution) -> None:
    gate, answers = Gate(), Answers()
    copy = made_copy(FakeModel(work=gate), settings(5))
    for _ in range(7):
        execution.run(copy, rows(1), (), answers)
    for _ in range(5):
        await gate.wait_entered()
    other = Answers()
    execution.run(made_copy(FakeModel(), settings(1), "other"), rows(1), (), other)
    await other.count(1)
    assert not gate.entered.acquire(blocking=False)
    assert copy.lane.running == 5
    gate.opened.set()
    await answers.count(7)
    assert answers.errors == [None] * 7


async def test_one_instance_never_runs_twice_at_once(execution: Execution) -> None:
    gate, answers = Gate(), Answers()
    copy = made_copy(FakeModel(work=gate), settings(1))
    for _ in range(3):
        execution.run(copy, rows(1), (), answers)
    await gate.wait_entered()
    await asyncio.sleep(0)
    assert (copy.lane.running, len(copy.lane.jobs)) == (1, 2)
    gate.opened.set()
    await answers.count(3)


async def test_the_loop_does_not_run_beside_the_only_instance(execution: Execution) -> None:
    gate, answers = Gate(), Answers()
    model = FakeModel(work=gate)
    copy = made_copy(model, settings(1, "inline"))
    lane = execution.lane(copy)
    lane.execution = "thread"
    execution.run(copy, rows(1), (), answers)
    await gate.wait_entered()
    lane.execution = "inline"
    assert not lane.free()
    assert execution.run(copy, rows(1), (), answers) is None
    gate.opened.set()
    await answers.count(2)
    assert lane.free()
    assert execution.run(copy, rows(1), (), answers) is not None


async def test_without_a_number_the_loop_runs_beside_threads(execution: Execution) -> None:
    gate, answers = Gate(), Answers()
    model = FakeModel(work=gate)
    copy = made_copy(model, settings(0, "inline"))
    lane = execution.lane(copy)
    lane.execution = "thread"
    execution.run(copy, rows(1), (), answers)
    await gate.wait_entered()
    model.work = lambda: None
    lane.execution = "inline"
    assert execution.run(copy, rows(1), (), answers) is not None
    gate.opened.set()
    await answers.count(1)
