"""Which copy a request goes to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mmcore.placement import Cluster, Copy, CopyState, Instance, Model, Traffic, choose, serving

LOADING = CopyState.LOADING


def chosen(
    copies: tuple[str, ...], traffic: Traffic, times: int = 1000, now_ms: int = 0, **how: object
) -> Counter[str | None]:
    rng = Random(1)
    return Counter(choose("m", copies, traffic, now_ms, rng, **how) for _ in range(times))  # type: ignore[arg-type]


def test_equal_copies_get_equal_parts() -> None:
    counts = chosen(("a", "b", "c", "d"), Traffic(), times=8000)
    assert max(counts.values()) < 1.1 * 2000


def test_the_one_with_fewer_requests_gets_the_next() -> None:
    traffic = Traffic()
    traffic.began("a")
    assert chosen(("a", "b"), traffic) == {"b": 1000}
    traffic.ended("m", "a", took_ms=1, now_ms=0)
    traffic.began("b")
    assert chosen(("a", "b"), traffic) == {"a": 1000}


def test_requests_of_others_count_too() -> None:
    """ModelMesh saw its own requests only (mesh.md, section 6.2)."""
    traffic = Traffic()
    traffic.began("a")
    traffic.reported("a", 1)  # which is ours
    traffic.reported("b", 5)
    assert traffic.in_flight("a") == 1
    assert chosen(("a", "b"), traffic) == {"a": 1000}


def test_a_slow_copy_is_left_and_tried_again_after_a_while() -> None:
    traffic = Traffic()
    for instance_id, took_ms in (("fast", 10.0), ("slow", 500.0)):
        traffic.began(instance_id)
        traffic.ended("m", instance_id, took_ms, now_ms=0)
    assert chosen(("fast", "slow"), traffic) == {"fast": 1000}
    for now_ms in range(0, 60_000, 100):
        traffic.began("fast")
        traffic.ended("m", "fast", 10.0, now_ms)
    assert chosen(("fast", "slow"), traffic, now_ms=60_000) == {"slow": 1000}


def test_a_latency_that_rises_counts_at_once_and_one_that_falls_little_by_little() -> None:
    traffic = Traffic()
    costs = []
    for now_ms, took_ms in ((0, 10.0), (100, 300.0), (200, 10.0), (20_000, 10.0), (60_000, 10.0)):
        traffic.began("a")
        traffic.ended("m", "a", took_ms, now_ms)
        costs.append(round(traffic.cost("m", "a", now_ms)))
    assert costs[0] == 10
    assert costs[1] == 300
    assert 250 < costs[2] < 300
    assert costs[3] < 100
    assert costs[4] < 12


def test_a_failure_counts_as_slow() -> None:
    traffic = Traffic()
    traffic.began("a")
    traffic.ended("m", "a", took_ms=0.1, now_ms=0, failed=True)
    assert chosen(("a", "b"), traffic) == {"b": 1000}


def test_latencies_are_those_of_the_model() -> None:
    traffic = Traffic()
    traffic.began("a")
    traffic.ended("large", "a", took_ms=5000, now_ms=0)
    assert traffic.cost("m", "a", 0) == traffic.cost("m", "b", 0)
    traffic.forget(model_id="large")
    assert traffic.cost("large", "a", 0) == 1.0


def test_the_local_copy_is_taken_until_it_is_overloaded() -> None:
    traffic = Traffic()
    assert chosen(("here", "a", "b"), traffic, local="here") == {"here": 1000}
    traffic.began("here")
    assert chosen(("here", "a", "b"), traffic, local="here") == {"here": 1000}
    traffic.began("here")
    assert "here" not in chosen(("here", "a", "b"), traffic, local="here")
    assert chosen(("a", "b"), traffic, local="here").keys() == {"a", "b"}


def test_unbalanced_requests_spread_over_the_local_copy_and_the_others() -> None:
    counts = Counter[str | None]()
    traffic = Traffic()
    rng = Random(1)
    for _ in range(300):
        one = choose("m", ("here", "a", "b"), traffic, 0, rng, local="here", local_factor=1.0)
        counts[one] += 1
        assert one is not None
        traffic.began(one)
    assert max(counts.values()) - min(counts.values()) <= 5


def test_what_was_tried_is_not_tried_again() -> None:
    assert chosen(("a", "b", "c"), Traffic(), tried={"a", "b"}) == {"c": 1000}
    assert chosen(("a",), Traffic(), tried={"a"}) == {None: 1000}
    assert chosen((), Traffic()) == {None: 1000}


def test_the_same_draw_makes_the_same_choice() -> None:
    first, second = ([choose("m", ("a", "b", "c"), Traffic(), 0, Random(n)) for n in range(50)] for _ in range(2))
    assert first == second


def test_an_instance_that_is_gone_is_forgotten() -> None:
    traffic = Traffic()
    traffic.began("a")
    traffic.reported("a", 9)
    traffic.forget(instance_id="a")
    assert traffic.in_flight("a") == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_requests_that_ended_are_in_flight_no_more(events: list[tuple[str, bool]]) -> None:
    traffic = Traffic()
    out: Counter[str] = Counter()
    for instance_id, begins in events:
        if begins:
            traffic.began(instance_id)
            out[instance_id] += 1
        elif out[instance_id]:
            traffic.ended("m", instance_id, 1.0, 0)
            out[instance_id] -= 1
    assert {name: traffic.in_flight(name) for name in "abc"} == {name: out[name] for name in "abc"}


def test_even_with_many_senders_no_copy_gets_much_more_than_its_part() -> None:
    """modelmesh-serving#330: forty senders, each with its own view and reports that are a round old."""
    copies = tuple(f"i{n}" for n in range(10))
    senders = [(Traffic(), Random(n)) for n in range(40)]
    total: Counter[str] = Counter()
    for _ in range(20):
        busy: Counter[str] = Counter()
        for traffic, rng in senders:
            for _ in range(5):
                one = choose("m", copies, traffic, 0, rng)
                assert one is not None
                traffic.began(one)
                busy[one] += 1
        for traffic, _rng in senders:
            for instance_id in copies:
                for _ in range(traffic.in_flight(instance_id)):
                    traffic.ended("m", instance_id, 10.0, 0)
                traffic.reported(instance_id, busy[instance_id])
        total += busy
    mean = sum(total.values()) / len(copies)
    assert max(total.values()) < 1.1 * mean


def test_requests_go_to_loaded_copies_and_wait_with_the_oldest_load_where_there_is_none() -> None:
    cluster = Cluster([Instance(name, 1) for name in "abcd"])
    model = Model("m", copies={"a": Copy(LOADING, 5), "b": Copy(LOADING, 3), "gone": Copy(LOADING, 1)})
    assert serving(cluster, model) == ("b",)
    loaded = {**model.copies, "c": Copy(), "d": Copy(), "gone": Copy()}
    assert serving(cluster, replace(model, copies=loaded)) == ("c", "d")
    cluster.put(Instance("c", 1, draining=True))
    assert serving(cluster, replace(model, copies=loaded)) == ("d",)
    cluster.put(Instance("d", 1, draining=True))
    assert serving(cluster, replace(model, copies=loaded)) == ("c", "d")  # they answer until another one does
    assert serving(cluster, Model("m")) == ()
