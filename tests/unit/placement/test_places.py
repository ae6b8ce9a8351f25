"""Where copies are placed: room, age, labels, zones, versions, and agreement among deciders."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.placement import Cluster, Copy, CopyState, Demand, Instance, Model, NoPlace, TypeConstraints, place

GIB = 1 << 30
MIB = 1 << 20
NOW_MS = 1_800_000_000_000


def instances(count: int, **facts: object) -> list[Instance]:
    return [replace(Instance(f"i{n}", GIB), **facts) for n in range(count)]  # type: ignore[arg-type]


def model(name: str = "m", size: int = 100 * MIB, on: str = "", **facts: object) -> Model:
    return replace(  # type: ignore[arg-type]
        Model(name, size_bytes=size, copies={holder: Copy() for holder in on.split()}, last_used_ms=NOW_MS), **facts
    )


def test_a_copy_goes_where_most_room_is() -> None:
    cluster = Cluster([*instances(5, used_bytes=700 * MIB), Instance("empty", GIB)])
    assert place(cluster, model(), NOW_MS) == "empty"


def test_where_all_are_full_what_has_been_idle_longest_goes() -> None:
    old = Instance("old", GIB, used_bytes=GIB, oldest_used_ms=NOW_MS - 3_600_000)
    cluster = Cluster([*instances(5, used_bytes=GIB, oldest_used_ms=NOW_MS - 600_000), old])
    assert place(cluster, model(), NOW_MS) == "old"
    cluster.put(replace(old, oldest_used_ms=NOW_MS - 1000))
    assert place(cluster, model(), NOW_MS) != "old"


def test_room_is_preferred_to_evicting_however_old() -> None:
    old = Instance("old", GIB, used_bytes=GIB, oldest_used_ms=1)
    cluster = Cluster([old, Instance("roomy", GIB, used_bytes=700 * MIB)])
    assert place(cluster, model(), NOW_MS) == "roomy"


def test_loads_in_progress_count() -> None:
    cluster = Cluster([Instance("busy", GIB, loading=8), Instance("calm", GIB, used_bytes=500 * MIB)])
    assert place(cluster, model(), NOW_MS) == "calm"


def test_traffic_counts() -> None:
    hot = Instance("hot", GIB, requests_per_minute=6000)
    cluster = Cluster([hot, Instance("calm", GIB, used_bytes=100 * MIB, requests_per_minute=100)])
    assert place(cluster, model(), NOW_MS) == "calm"


def test_draining_holding_failed_and_tried_instances_are_left_out() -> None:
    cluster = Cluster([*instances(4), Instance("leaving", GIB, draining=True)])
    held = model(on="i0", failures={"i1": NOW_MS})
    assert place(cluster, held, NOW_MS, exclude={"i2"}) == "i3"
    with pytest.raises(NoPlace, match="all 4 instances that may host model 'm' have been tried"):
        place(cluster, held, NOW_MS, exclude={"i2", "i3"})


def test_a_model_that_failed_at_three_instances_is_not_tried_at_a_fourth() -> None:
    cluster = Cluster(instances(5))
    with pytest.raises(NoPlace, match="failed at 3 instances"):
        place(cluster, model(failures=dict.fromkeys(("i0", "i1", "i2"), NOW_MS)), NOW_MS)


def test_required_labels_are_required_and_preferred_ones_preferred() -> None:
    constraints = TypeConstraints.of({"big": {"required": ["gpu"]}, "fast": {"preferred": ["gpu"]}})
    gpu = Instance("gpu", GIB, used_bytes=600 * MIB, labels=frozenset({"gpu", "ssd"}))
    cluster = Cluster([*instances(4), gpu], constraints)
    assert place(cluster, model(type="big"), NOW_MS) == "gpu"
    assert place(cluster, model(type="fast"), NOW_MS) == "gpu"
    cluster.put(replace(gpu, used_bytes=GIB, oldest_used_ms=NOW_MS - 60_000))
    assert place(cluster, model(type="big"), NOW_MS) == "gpu"
    assert place(cluster, model(type="fast"), NOW_MS) != "gpu"  # a preference yields to room


def test_a_type_without_preference_leaves_rare_instances_to_those_that_need_them() -> None:
    constraints = TypeConstraints.of({"big": {"required": ["gpu"]}})
    cluster = Cluster(
        [*instances(2, used_bytes=700 * MIB), Instance("gpu", GIB, labels=frozenset({"gpu"}))], constraints
    )
    assert place(cluster, model(type="small"), NOW_MS) != "gpu"
    assert place(cluster, model(type="small", on="i0 i1"), NOW_MS) == "gpu"


def test_types_without_an_entry_go_by_the_default_one() -> None:
    constraints = TypeConstraints.of({"_default": {"required": ["cpu"]}, "big": {}})
    cluster = Cluster(
        [Instance("a", GIB), Instance("b", GIB, used_bytes=GIB // 2, labels=frozenset({"cpu"}))], constraints
    )
    assert place(cluster, model(type="other"), NOW_MS) == "b"
    assert place(cluster, model(type="big"), NOW_MS) == "a"


@pytest.mark.parametrize("document", [[], {"t": []}, {"t": {"required": "gpu"}}, {"t": {"preferred": [1]}}])
def test_malformed_constraints_are_refused(document: object) -> None:
    with pytest.raises(ValueError, match="type constraint"):
        TypeConstraints.of(document)


def test_changed_constraints_hold_for_the_next_decision() -> None:
    cluster = Cluster([Instance("a", GIB, labels=frozenset({"x"})), Instance("b", GIB, labels=frozenset({"y"}))])
    for label, instance_id in (("x", "a"), ("y", "b"), ("x", "a")):
        cluster.constraints = TypeConstraints.of({"t": {"required": [label]}})
        assert place(cluster, model(type="t"), NOW_MS) == instance_id


def test_errors_name_what_is_in_the_way() -> None:
    with pytest.raises(NoPlace, match="no instance is running"):
        place(Cluster(), model(), NOW_MS)
    with pytest.raises(NoPlace, match="every instance is draining"):
        place(Cluster(instances(2, draining=True)), model(), NOW_MS)
    with pytest.raises(
        NoPlace, match=f"{2 * GIB} bytes is larger than the capacity of any instance for it: {GIB} bytes"
    ):
        place(Cluster(instances(2)), model(size=2 * GIB), NOW_MS)
    labelled = Cluster(instances(2), TypeConstraints.of({"t": {"required": ["gpu", "ssd"]}}))
    with pytest.raises(NoPlace, match="labels that models of type 't' require: gpu, ssd"):
        place(labelled, model(type="t"), NOW_MS)
    with pytest.raises(NoPlace, match="held by, or failed to load at, all 2 instances"):
        place(Cluster(instances(2)), model(on="i0 i1"), NOW_MS)
    with pytest.raises(NoPlace, match=f"leave {24 * MIB} at most at the 2 instances"):
        place(Cluster(instances(2, used_bytes=GIB, fixed_bytes=1000 * MIB)), model(), NOW_MS)
    full = Cluster(instances(2, used_bytes=GIB, oldest_used_ms=NOW_MS))
    with pytest.raises(NoPlace, match="that nothing used lately takes"):
        place(full, model(), NOW_MS, evicts_before_ms=NOW_MS - 1000)


def test_a_large_model_finds_the_few_that_are_large_enough() -> None:
    cluster = Cluster([*instances(500), *(Instance(f"large{n}", 8 * GIB) for n in range(3))])
    placed = {place(cluster, model(f"m{n}", size=2 * GIB), NOW_MS) for n in range(50)}
    assert placed == {"large0", "large1", "large2"}


def test_the_newer_version_comes_first_and_does_not_starve_the_older() -> None:
    old = instances(3, version="1", started_ms=1000, used_bytes=300 * MIB)
    new = Instance("new", GIB, version="2", started_ms=2000, used_bytes=500 * MIB)
    cluster = Cluster([*old, new])
    assert cluster.newest_version == "2"
    assert place(cluster, model(), NOW_MS) == "new"
    cluster.put(replace(new, used_bytes=900 * MIB))
    assert place(cluster, model(), NOW_MS) != "new"
    cluster.put(replace(new, loading=4))
    assert place(cluster, model(), NOW_MS) != "new"


def test_a_roll_back_is_what_appeared_last_too() -> None:
    cluster = Cluster([Instance("a", GIB, version="2", started_ms=1000)])
    cluster.put(Instance("b", GIB, version="1", started_ms=2000))
    assert cluster.newest_version == "1"
    cluster.remove("b")
    assert cluster.newest_version == "2"


def test_copies_spread_over_zones_even_into_fuller_ones() -> None:
    cluster = Cluster(
        [replace(instance, zone=f"z{n % 3}", used_bytes=n % 3 * 300 * MIB) for n, instance in enumerate(instances(30))]
    )
    copies: dict[str, Copy] = {}
    for _ in range(9):
        copies[place(cluster, model(copies=dict(copies)), NOW_MS)] = Copy()
    zones = Counter(cluster.get(holder).instance.zone for holder in copies)  # type: ignore[union-attr]
    assert set(zones.values()) == {3}


def test_a_reservation_takes_room_until_the_record_counts_it_or_it_expires() -> None:
    cluster = Cluster(instances(1))
    cluster.reserve("i0", "first", 900 * MIB, NOW_MS, lasting_ms=1000)
    with pytest.raises(NoPlace):
        place(cluster, model(size=200 * MIB), NOW_MS)
    cluster.put(Instance("i0", GIB))  # says nothing of it yet
    assert cluster.reserved("first") == ["i0"]
    cluster.started("i0", "first", 900 * MIB, since_ms=5000, now_ms=NOW_MS)
    cluster.put(Instance("i0", GIB, published_ms=4000))
    assert cluster.reserved("first") == ["i0"]
    cluster.put(Instance("i0", GIB, used_bytes=900 * MIB, published_ms=6000))
    assert cluster.reserved("first") == []
    cluster.reserve("i0", "second", 10, NOW_MS, lasting_ms=1000)
    cluster.expire(NOW_MS + 999)
    assert cluster.reserved("second") == ["i0"]
    cluster.expire(NOW_MS + 1000)
    assert cluster.reserved("second") == []
    cluster.reserve("i0", "third", 10, NOW_MS)
    cluster.release("i0", "third")
    assert cluster.get("i0").free_bytes == GIB - 900 * MIB  # type: ignore[union-attr]


def test_a_load_that_the_models_record_shows_no_more_is_not_on_its_way() -> None:
    """A copy that went soon after it was loaded kept further ones from being made for half a minute."""
    cluster = Cluster(instances(2))
    cluster.started("i0", "m", 10, since_ms=5000, now_ms=NOW_MS)
    cluster.reserve("i1", "m", 10, NOW_MS)
    cluster.shown("m", {"i0": 5000})
    assert sorted(cluster.reserved("m")) == ["i0", "i1"]
    cluster.shown("m", {})
    # What no record has shown yet may still come.
    assert cluster.reserved("m") == ["i1"]
    cluster.shown("m", {"i1": 6000})
    assert cluster.reserved("m") == ["i1"]
    cluster.shown("m", {})
    assert cluster.reserved("m") == []


def test_asked_again_before_any_record_shows_the_load_the_place_is_the_same() -> None:
    cluster = Cluster(instances(20))
    first = place(cluster, model(), NOW_MS)
    cluster.reserve(first, "m", 100 * MIB, NOW_MS)
    assert place(cluster, model(), NOW_MS) == first
    assert place(cluster, model(), NOW_MS, exclude={first}) != first


def test_a_load_that_another_instance_decided_takes_room_before_its_own_record_does() -> None:
    cluster = Cluster(instances(1))
    cluster.started("i0", "m", 900 * MIB, since_ms=NOW_MS, now_ms=NOW_MS)
    with pytest.raises(NoPlace):
        place(cluster, model("other", size=200 * MIB), NOW_MS)


def stale_views(count: int, rng: random.Random) -> list[Cluster]:
    """What each of some deciders knows of a hundred instances: of a fifth of them the record before the last one."""
    views = [Cluster() for _ in range(count)]
    for n in range(100):
        used = rng.uniform(0.4, 0.8)
        records = [
            Instance(
                f"i{n}", GIB, used_bytes=int(share * GIB), loading=rng.randrange(2), loader_threads=8, zone=f"z{n % 3}"
            )
            for share in (used, used + rng.uniform(-0.1, 0.1))
        ]
        for view in views:
            view.put(records[rng.random() < 0.2])
    return views


def test_fifty_instances_that_decide_at_once_about_one_model_agree() -> None:
    """modelmesh-serving#469. The few that choose otherwise find the first one's load in the model's record."""
    views = stale_views(50, random.Random(1))
    places = [Counter(place(view, model(f"m{n}"), NOW_MS) for view in views) for n in range(100)]
    assert sum(chosen.most_common(1)[0][1] for chosen in places) >= 0.9 * 50 * 100
    assert sum(len(chosen) <= 2 for chosen in places) >= 85


def test_fifty_instances_that_decide_at_once_about_many_models_do_not_pile_onto_the_emptiest() -> None:
    views = [Cluster([*instances(100, used_bytes=500 * MIB), Instance("empty", GIB)]) for _ in range(50)]
    places = Counter(place(view, model(f"m{n}"), NOW_MS) for n, view in enumerate(views))
    assert max(places.values()) <= 15


def test_views_that_learn_of_each_load_spread_them_at_once() -> None:
    """One empty instance, its record seconds away: the models' records alone keep it from being flooded."""
    cluster = Cluster([*instances(9, used_bytes=300 * MIB), Instance("empty", GIB)])
    places: Counter[str] = Counter()
    for n in range(50):
        chosen = place(cluster, model(f"m{n}", size=20 * MIB), NOW_MS)
        cluster.started(chosen, f"m{n}", 20 * MIB, since_ms=NOW_MS, now_ms=NOW_MS)
        places[chosen] += 1
    assert max(places.values()) <= 8


def test_one_instance_more_moves_few_models() -> None:
    cluster = Cluster(instances(100))
    before = {n: place(cluster, model(f"m{n}"), NOW_MS) for n in range(1000)}
    cluster.put(Instance("new", GIB))
    moved = sum(place(cluster, model(f"m{n}"), NOW_MS) != instance_id for n, instance_id in before.items())
    assert moved < 50


LABELS = ("gpu", "ssd")
some_instances = st.lists(
    st.builds(
        Instance,
        id=st.uuids().map(str),
        capacity_bytes=st.integers(1, 1000),
        used_bytes=st.integers(0, 1000),
        fixed_bytes=st.integers(0, 200),
        unloading_bytes=st.integers(0, 200),
        oldest_used_ms=st.none() | st.integers(0, NOW_MS),
        loading=st.integers(0, 5),
        loader_threads=st.integers(0, 4),
        zone=st.sampled_from(("", "a", "b", "c")),
        labels=st.frozensets(st.sampled_from(LABELS)),
        version=st.sampled_from(("1", "2")),
        started_ms=st.integers(0, 3),
        draining=st.booleans(),
        requests_per_minute=st.floats(0, 1e6),
    ),
    max_size=20,
    unique_by=lambda instance: instance.id,
)
CONSTRAINTS = TypeConstraints.of(
    {"gpu": {"required": ["gpu"]}, "both": {"required": list(LABELS)}, "fast": {"preferred": ["ssd"]}}
)
some_type = st.sampled_from(("", "gpu", "both", "fast"))


@settings(max_examples=60, deadline=None)
@given(some_instances, some_type, st.integers(0, 500), st.data())
def test_a_place_is_always_one_that_may_host_it(
    found: list[Instance], kind: str, size: int, data: st.DataObject
) -> None:
    by_id = {instance.id: instance for instance in found}
    left_out = {}
    for part in ("copies", "failures", "exclude"):
        left_out[part] = data.draw(st.lists(st.sampled_from(sorted(by_id)), max_size=2)) if by_id else []
    cluster = Cluster(found, CONSTRAINTS)
    wanted = model(
        type=kind,
        size=size,
        copies=dict.fromkeys(left_out["copies"], Copy()),
        failures=dict.fromkeys(left_out["failures"], 1),
    )
    hosts = {
        instance.id
        for instance in found
        if not instance.draining
        and CONSTRAINTS.get(kind).required <= instance.labels
        and instance.fixed_bytes + instance.unloading_bytes + size <= instance.capacity_bytes
        and not any(instance.id in ids for ids in left_out.values())
    }
    try:
        chosen = place(cluster, wanted, NOW_MS, exclude=left_out["exclude"])
    except NoPlace as reason:
        assert not hosts
        assert str(reason)
        return
    assert chosen in hosts
    assert place(Cluster(reversed(found), CONSTRAINTS), wanted, NOW_MS, exclude=left_out["exclude"]) == chosen
    holding = Counter(by_id[holder].zone for holder in wanted.copies if not by_id[holder].draining)
    if kind in ("gpu", "both"):  # without preferences, which come before zones
        roomy = {
            instance_id
            for instance_id in hosts
            if CONSTRAINTS.prefers(kind, by_id[instance_id].labels) == CONSTRAINTS.prefers(kind, by_id[chosen].labels)
            and cluster.get(instance_id).free_bytes >= size  # type: ignore[union-attr]
            and cluster.get(instance_id).queue <= 1  # type: ignore[union-attr]
            and by_id[instance_id].requests_per_minute == 0
        }
        if roomy:
            assert holding[by_id[chosen].zone] <= min(holding[by_id[instance_id].zone] for instance_id in roomy)


@settings(max_examples=60, deadline=None)
@given(some_instances, st.lists(st.integers(1, 300), max_size=40))
def test_reservations_never_exceed_a_capacity(found: list[Instance], sizes: list[int]) -> None:
    cluster = Cluster(found)
    for n, size in enumerate(sizes):
        try:
            chosen = place(cluster, model(f"m{n}", size=size), NOW_MS)
        except NoPlace:
            continue
        cluster.reserve(chosen, f"m{n}", size, NOW_MS)
    for member in cluster:
        reserved = sum(reservation.size_bytes for reservation in member.reservations.values())
        firm = member.instance.fixed_bytes + member.instance.unloading_bytes
        assert not reserved or firm + reserved <= member.capacity_bytes


@settings(max_examples=60, deadline=None)
@given(some_instances, st.data())
def test_a_view_kept_up_to_date_is_the_same_as_one_made_anew(found: list[Instance], data: st.DataObject) -> None:
    cluster = Cluster(constraints=CONSTRAINTS)
    for kind in ("", "gpu", "fast"):
        assert len(cluster.pool(kind)) == 0
    now: dict[str, Instance] = {}
    for instance in found:
        cluster.put(replace(instance, zone="elsewhere", draining=not instance.draining, used_bytes=1))
        cluster.put(instance)
        now[instance.id] = instance
        if data.draw(st.booleans()):
            cluster.remove(instance.id)
            del now[instance.id]
    fresh = Cluster(now.values(), CONSTRAINTS)
    assert cluster.newest_version == fresh.newest_version
    for kind in ("", "gpu", "fast"):
        kept, made = cluster.pool(kind), fresh.pool(kind)
        assert {member.id for member in kept.members} == {member.id for member in made.members}
        assert (kept.capacity_bytes, kept.free_bytes, kept.zones) == (made.capacity_bytes, made.free_bytes, made.zones)
        assert kept.requests_per_minute == pytest.approx(made.requests_per_minute, abs=1e-3)
        assert kept.rings.keys() == made.rings.keys()
        wanted = model(type=kind, size=1)
        if len(made):
            try:
                expected = place(fresh, wanted, NOW_MS)
            except NoPlace:
                continue
            assert place(cluster, wanted, NOW_MS) == expected


@settings(max_examples=60, deadline=None)
@given(some_instances, st.integers(1, 300))
def test_more_room_never_makes_an_instance_lose(found: list[Instance], size: int) -> None:
    found = [replace(instance, loading=0, requests_per_minute=0.0, version="", zone="") for instance in found]
    wanted = model(size=size)
    try:
        chosen = place(Cluster(found), wanted, NOW_MS)
    except NoPlace:
        return
    better = [replace(i, used_bytes=0, fixed_bytes=0, unloading_bytes=0) if i.id == chosen else i for i in found]
    cluster = Cluster(better)
    winner = place(cluster, wanted, NOW_MS)
    if winner != chosen:  # another one is as good within what counts as alike
        gained, won = cluster.get(chosen), cluster.get(winner)
        assert gained is not None
        assert won is not None
        assert (won.free_bytes - size) * won.inverse >= (gained.free_bytes - size) * gained.inverse - 0.06


def test_a_copy_that_is_loading_is_no_reason_to_choose_its_instance_again() -> None:
    cluster = Cluster(instances(2))
    assert place(cluster, model(copies={"i0": Copy(CopyState.LOADING, NOW_MS)}), NOW_MS) == "i1"


def test_a_hot_model_goes_to_an_instance_that_stays_below_the_given_traffic() -> None:
    cluster = Cluster([*instances(5, requests_per_minute=900), Instance("calm", GIB, used_bytes=GIB // 2)])
    hot = model(demand=Demand(requests_per_minute=600))
    assert place(cluster, hot, NOW_MS, below_rate=1000) == "calm"
    with pytest.raises(NoPlace):
        place(cluster, hot, NOW_MS, below_rate=500)
