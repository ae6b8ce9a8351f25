"""Where the next inference runs, by what was measured."""

from __future__ import annotations

import pytest

from mmcore.batching.lane import FIRST_STAY, INLINE_BELOW_NS, LONGEST_STAY, THREAD_ABOVE_NS, Lane, Pace

FAST, SLOW = INLINE_BELOW_NS // 10, THREAD_ABOVE_NS * 10


def test_the_first_runs_in_a_thread_and_a_fast_model_then_inline() -> None:
    lane = Lane("auto")
    assert not lane.runs_inline(lane.pace(1))
    lane.pace(1).ran_in_thread(FAST)
    assert lane.runs_inline(lane.pace(1))


def test_a_slow_model_stays_in_threads() -> None:
    pace = Pace()
    for _ in range(100):
        assert not pace.runs_inline()
        pace.ran_in_thread(SLOW)


def test_a_slow_first_call_is_forgotten_at_the_second() -> None:
    pace = Pace()
    pace.ran_in_thread(SLOW * 100)
    pace.ran_in_thread(FAST)
    assert pace.runs_inline()


def test_a_fast_model_bears_a_slow_call_now_and_then() -> None:
    pace = Pace(FAST)
    for _ in range(10):
        pace.ran_inline(FAST)
    for _ in range(100):
        # The processor was taken away for a while: that is not the model's fault.
        pace.ran_inline(SLOW * 10)
        pace.ran_inline(FAST)
        assert pace.runs_inline()


def test_a_model_that_is_slow_on_the_loop_stays_away_longer_each_time() -> None:
    pace = Pace()
    stays = []
    for _ in range(8):
        while not pace.runs_inline():
            pace.ran_in_thread(FAST)
        # Fast where it is measured in threads, slow on the loop: it must not go on disturbing the others.
        pace.ran_inline(SLOW)
        pace.ran_inline(SLOW)
        assert not pace.runs_inline()
        count = 0
        while not pace.runs_inline():
            pace.ran_in_thread(FAST)
            count += 1
        stays.append(count)
    assert stays[:3] == [FIRST_STAY, FIRST_STAY * 4, FIRST_STAY * 16]
    assert stays[-1] == LONGEST_STAY
    for _ in range(LONGEST_STAY):
        pace.ran_inline(FAST)
    for _ in range(2):
        pace.ran_inline(SLOW)
    for _ in range(FIRST_STAY):
        assert not pace.runs_inline()
        pace.ran_in_thread(FAST)
    assert pace.runs_inline()


def test_more_rows_are_taken_to_be_slower_until_measured() -> None:
    lane = Lane("auto")
    lane.pace(1).ran_in_thread(FAST)
    assert lane.runs_inline(lane.pace(3))
    assert not lane.runs_inline(lane.pace(1_000_000))
    lane.pace(1_000_000).ran_in_thread(FAST)
    assert lane.runs_inline(lane.pace(1_000_000))
    assert lane.runs_inline(lane.pace(1))


@pytest.mark.parametrize(("execution", "inline"), [("inline", True), ("thread", False)])
def test_settings_decide_over_what_is_measured(execution: str, inline: bool) -> None:
    lane = Lane(execution)
    pace = lane.pace(1)
    assert lane.runs_inline(pace) is inline
    for _ in range(100):
        pace.ran_inline(SLOW if inline else FAST)
        pace.ran_in_thread(SLOW if inline else FAST)
    assert lane.runs_inline(pace) is inline
