"""How many copies a model has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmcore.placement import (
    DEFAULT_POLICY,
    Cluster,
    Copy,
    CopyState,
    Demand,
    Drop,
    Instance,
    Load,
    Model,
    Policy,
    TypeConstraints,
    decider,
    scale,
)

GIB = 1 << 30
NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
#: Used in each of the last 60 minutes.
ALWAYS = (1 << 60) - 1


def cluster(count: int = 10, **facts: object) -> Cluster:
    return Cluster(
        replace(Instance(f"i{n}", GIB, zone=f"z{n % 2}", requests_per_minute=20_000), **facts)  # type: ignore[arg-type]
        for n in range(count)
    )


def model(copies: int = 1, age_ms: int = HOUR_MS, **facts: object) -> Model:
    held = {f"i{n}": Copy(CopyState.LOADED, NOW_MS - age_ms) for n in range(copies)}
    return replace(Model("m", size_bytes=1 << 20, copies=held, last_used_ms=NOW_MS), **facts)  # type: ignore[arg-type]


def change(actions: list[Load | Drop]) -> int:
    return sum(1 if isinstance(action, Load) else -1 for action in actions)


@pytest.mark.parametrize(
    ("copies", "demand", "expected"),
    [
        (1, Demand(requests_per_minute=1999), 0),
        (1, Demand(requests_per_minute=2001), 1),
        (2, Demand(requests_per_minute=7000), 2),
        (2, Demand(requests_per_minute=40_000), 2),  # twice as many at a time
        (9, Demand(requests_per_minute=40_000), 1),  # no more than instances
        (1, Demand(in_flight=17), 1),
        (4, Demand(in_flight=70), 1),
        (1, Demand(queue_ms=51), 1),
        (3, Demand(requests_per_minute=10, in_flight=1, queue_ms=51), 1),
    ],
)
def test_copies_follow_rate_concurrency_and_queueing(copies: int, demand: Demand, expected: int) -> None:
    assert change(scale(cluster(), model(copies, demand=demand), NOW_MS)) == expected


def test_no_copy_carries_more_than_a_part_of_what_an_average_instance_serves() -> None:
    calm = cluster(requests_per_minute=2000)
    assert change(scale(calm, model(demand=Demand(requests_per_minute=301)), NOW_MS)) == 1
    assert change(scale(calm, model(demand=Demand(requests_per_minute=299)), NOW_MS)) == 0
    quiet = cluster(requests_per_minute=20)
    assert change(scale(quiet, model(demand=Demand(requests_per_minute=100)), NOW_MS)) == 0


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (0b1, 0),  # once
        (0b111, 0),  # a burst
        (0b1 | 1 << 5, 0),
        (0b1 | 1 << 7, 1),
        (0b10 | 1 << 40, 1),
        (0b1 | 1 << 41, 0),  # too long ago
        (1 << 9, 0),  # not now
        (ALWAYS, 1),  # modelmesh#151: without a pause
    ],
)
def test_steady_use_makes_a_second_copy(minutes: int, expected: int) -> None:
    assert change(scale(cluster(), model(demand=Demand(minutes=minutes)), NOW_MS)) == expected
    assert change(scale(cluster(), model(2, demand=Demand(minutes=minutes)), NOW_MS)) == 0


def test_a_second_copy_for_steady_use_displaces_nothing_of_the_last_hour() -> None:
    steady = model(demand=Demand(minutes=ALWAYS))
    assert scale(cluster(used_bytes=GIB, oldest_used_ms=NOW_MS - HOUR_MS + 1), steady, NOW_MS) == []
    assert change(scale(cluster(used_bytes=GIB, oldest_used_ms=NOW_MS - HOUR_MS - 1), steady, NOW_MS)) == 1


def test_copies_asked_for_are_there_at_once_and_in_other_zones() -> None:
    actions = scale(cluster(), model(0, min_copies=4), NOW_MS)
    assert sorted(int(action.instance[1:]) % 2 for action in actions) == [0, 0, 1, 1]
    assert change(scale(cluster(), model(0, min_copies=1), NOW_MS)) == 1
    assert change(scale(cluster(), model(3, everywhere=True), NOW_MS)) == 7
    assert scale(cluster(3), model(3, min_copies=5), NOW_MS) == []


def test_idle_copies_go_but_never_below_the_least() -> None:
    idle = {"last_used_ms": NOW_MS - 2 * HOUR_MS}
    assert change(scale(cluster(), model(2, **idle), NOW_MS)) == -1
    assert scale(cluster(), model(2, min_copies=2, **idle), NOW_MS) == []
    assert scale(cluster(), model(2, last_used_ms=NOW_MS - HOUR_MS + 1), NOW_MS) == []
    assert change(scale(cluster(), model(8, demand=Demand(requests_per_minute=600)), NOW_MS)) == -2
    assert change(scale(cluster(), model(8, min_copies=7), NOW_MS)) == -1
    assert scale(cluster(), model(10, everywhere=True, **idle), NOW_MS) == []


def test_the_last_copy_goes_by_time_only_where_that_is_configured() -> None:
    """modelmesh-serving#312."""
    idle = {"last_used_ms": NOW_MS - 2 * HOUR_MS}
    unloading = Policy(unload_idle_ms=HOUR_MS)
    assert scale(cluster(), model(1, **idle), NOW_MS) == []
    assert change(scale(cluster(), model(1, **idle), NOW_MS, unloading)) == -1
    assert scale(cluster(), model(1, min_copies=1, **idle), NOW_MS, unloading) == []


def test_a_limit_is_kept_from_both_sides() -> None:
    hot = Demand(requests_per_minute=100_000)
    assert change(scale(cluster(), model(2, max_copies=3, demand=hot), NOW_MS)) == 1
    assert scale(cluster(), model(3, max_copies=3, demand=hot), NOW_MS) == []
    assert change(scale(cluster(), model(5, max_copies=3, demand=hot), NOW_MS)) == -2


def test_nothing_happens_while_a_copy_is_on_its_way() -> None:
    loading = model(2, demand=Demand(requests_per_minute=100_000))
    loading = replace(loading, copies={**loading.copies, "i5": Copy(CopyState.LOADING, NOW_MS)})
    assert scale(cluster(), loading, NOW_MS) == []
    idle = replace(loading, demand=Demand(), last_used_ms=0)
    assert scale(cluster(), idle, NOW_MS) == []
    gone = replace(loading, copies={"i0": Copy(), "gone": Copy(CopyState.LOADING, 1)})
    assert change(scale(cluster(), gone, NOW_MS)) == 1


def test_asked_twice_before_the_record_shows_the_load_it_loads_once() -> None:
    view = cluster()
    hot = model(demand=Demand(requests_per_minute=4000))
    assert change(scale(view, hot, NOW_MS)) == 1
    assert scale(view, hot, NOW_MS) == []
    wanted = model(0, min_copies=3)
    assert change(scale(cluster(), wanted, NOW_MS)) == 3


def test_copies_of_lost_and_leaving_instances_do_not_count() -> None:
    view = cluster()
    view.put(replace(Instance("i1", GIB), draining=True))
    actions = scale(view, model(2, min_copies=2), NOW_MS)
    assert change(actions) == 1
    assert actions[0].instance not in ("i0", "i1")
    view.remove("i0")
    assert change(scale(view, replace(model(2, min_copies=2), id="n"), NOW_MS)) == 2


def test_a_copy_where_labels_do_not_allow_it_any_more_is_replaced_first_and_then_dropped() -> None:
    view = Cluster([Instance("a", GIB), Instance("b", GIB, labels=frozenset({"gpu"}))])
    view.constraints = TypeConstraints.of({"t": {"required": ["gpu"]}})
    placed = replace(model(), type="t", copies={"a": Copy()})
    assert scale(view, placed, NOW_MS) == [Load("m", "b", "least number of copies")]
    view.release("b", "m")
    both = replace(placed, copies={"a": Copy(), "b": Copy()})
    assert scale(view, both, NOW_MS) == [Drop("m", "a", "lacks a required label")]


def test_a_burst_that_finds_no_room_makes_the_copies_that_fit() -> None:
    view = cluster(used_bytes=GIB, fixed_bytes=GIB)
    view.put(Instance("i9", GIB))
    assert change(scale(view, model(3, demand=Demand(requests_per_minute=20_000)), NOW_MS)) == 1


def test_dropped_copies_leave_the_others_spread_over_zones() -> None:
    copies = {"i0": Copy(), "i2": Copy(), "i4": Copy(), "i1": Copy()}
    actions = scale(cluster(), replace(model(), copies=copies, max_copies=2), NOW_MS)
    left = copies.keys() - {action.instance for action in actions}
    assert {int(name[1:]) % 2 for name in left} == {0, 1}


def test_one_instance_decides_and_all_agree_which() -> None:
    held = model(3)
    deciding = {decider(cluster(count), held) for count in (3, 5, 10)}
    assert len(deciding) == 1
    assert deciding <= held.copies.keys()
    assert decider(cluster(), model(0)) is None
    view = cluster()
    view.remove(next(iter(deciding)) or "")
    assert decider(view, held) in held.copies.keys() - deciding


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0, 60_000),
    service_ms=st.floats(0.1, 400),
    minutes=st.sampled_from((0, 1, ALWAYS)),
    copies=st.integers(1, 10),
    floor=st.integers(0, 3),
)
@example(rate=62.0, service_ms=197.0, minutes=0, copies=1, floor=0)
def test_constant_use_never_makes_copies_come_and_go(
    rate: float, service_ms: float, minutes: int, copies: int, floor: int
) -> None:
    """Copies answer one request at a time, arrivals are random (M/M/1 each): what they then measure decides."""
    now_ms = NOW_MS
    went_up = went_down = 0
    held = [f"i{n}" for n in range(copies)]
    for _ in range(60):
        now_ms += 700_000
        busy = min(0.99, rate / 60_000 * service_ms / len(held))
        queue_ms = service_ms * busy / (1 - busy)
        demand = Demand(rate, rate / 60_000 * (queue_ms + service_ms), queue_ms, minutes)
        found = Model(
            "m",
            size_bytes=1,
            copies=dict.fromkeys(held, Copy(CopyState.LOADED, 0)),
            last_used_ms=now_ms if minutes else 0,
            demand=demand,
            min_copies=floor,
        )
        actions = scale(cluster(), found, now_ms)
        ups = [action.instance for action in actions if isinstance(action, Load)]
        downs = [action.instance for action in actions if isinstance(action, Drop)]
        went_up += bool(ups)
        went_down += bool(downs)
        held = [name for name in held if name not in downs] + ups
        assert len(held) >= min(floor, 10)
        if not actions:
            break
    else:
        raise AssertionError("it never comes to rest")
    assert not (went_up and went_down), (went_up, went_down)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 100_000), st.floats(0, 100_000), st.integers(1, 8))
def test_more_use_never_means_fewer_copies(one: float, other: float, copies: int) -> None:
    low, high = sorted((one, other))
    few, many = (
        change(scale(cluster(), model(copies, demand=Demand(requests_per_minute=rate)), NOW_MS)) for rate in (low, high)
    )
    assert few <= many


def test_the_newest_copy_is_given_time() -> None:
    fresh = model(8, age_ms=DEFAULT_POLICY.hold_ms - 1)
    assert scale(cluster(), fresh, NOW_MS) == []
