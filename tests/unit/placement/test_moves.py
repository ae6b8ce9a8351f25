"""Hot instances, empty instances, instances that leave and instances that are gone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from mmcore.placement import (
    Cluster,
    Copy,
    CopyState,
    Demand,
    Drop,
    Instance,
    Load,
    Model,
    TypeConstraints,
    drain,
    evicted,
    fill,
    prune,
    relieve,
)

GIB = 1 << 30
MIB = 1 << 20
NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
LONG_AGO_MS = NOW_MS - HOUR_MS


def instances(count: int, **facts: object) -> list[Instance]:
    return [replace(Instance(f"i{n}", GIB), **facts) for n in range(count)]  # type: ignore[arg-type]


def held(name: str, on: str, rate: float = 0.0, size: int = MIB, age_ms: int = HOUR_MS, **facts: object) -> Model:
    copies = {holder: Copy(CopyState.LOADED, NOW_MS - age_ms) for holder in on.split()}
    made = Model(
        name, size_bytes=size, copies=copies, last_used_ms=NOW_MS, demand=Demand(requests_per_minute=rate * len(copies))
    )
    return replace(made, **facts)  # type: ignore[arg-type]


def test_a_hot_instance_gives_busy_copies_to_calm_ones_until_it_is_not_hot() -> None:
    cluster = Cluster([*instances(9, requests_per_minute=900), Instance("hot", GIB, requests_per_minute=2000)])
    models = [held(f"m{n}", "hot", rate) for n, rate in enumerate((1200, 500, 300, 100, 100, 2))]
    moves = relieve(cluster, "hot", models, NOW_MS)
    assert {move.source for move in moves} == {"hot"}
    assert "m0" not in {move.model for move in moves}  # it would only make another one hot
    assert "m5" not in {move.model for move in moves}
    rates = Counter({member.id: member.requests_per_minute for member in cluster})
    assert max(rates[move.instance] for move in moves) <= 1.05 * 1010
    assert relieve(cluster, "i0", [held("n", "i0", 100)], NOW_MS) == []


def test_a_copy_loaded_a_moment_ago_or_on_its_way_stays() -> None:
    cluster = Cluster([*instances(9), Instance("hot", GIB, requests_per_minute=2000)])
    fresh = held("m", "hot", 100, age_ms=1000)
    loading = held("n", "hot", 100)
    loading = replace(loading, copies={**loading.copies, "i0": Copy(CopyState.LOADING, NOW_MS)})
    assert relieve(cluster, "hot", [fresh, loading], NOW_MS) == []


def test_a_full_instance_gives_large_copies_to_emptier_ones() -> None:
    cluster = Cluster([*instances(9, used_bytes=500 * MIB), Instance("full", GIB, used_bytes=950 * MIB)])
    models = [held(f"m{n}", "full", size=size * MIB) for n, size in enumerate((600, 200, 100, 100, 50))]
    moves = relieve(cluster, "full", models, NOW_MS)
    assert [move.model for move in moves][:2] == ["m1", "m2"]
    assert all(member.free_bytes >= 300 * MIB for member in cluster if member.id != "full")
    assert relieve(Cluster(instances(5, used_bytes=GIB)), "i0", models, NOW_MS) == []


def test_what_one_instance_evicts_goes_where_room_is_and_makes_nobody_else_evict() -> None:
    """modelmesh-serving#455: evictions that lead to evictions."""
    full = instances(5, used_bytes=GIB, oldest_used_ms=NOW_MS - 9 * HOUR_MS)
    warm = Model("m", size_bytes=MIB, last_used_ms=NOW_MS - HOUR_MS)
    assert evicted(Cluster(full), warm, "i0", LONG_AGO_MS, NOW_MS) is None
    cluster = Cluster([*full, Instance("empty", GIB)])
    assert evicted(cluster, replace(warm, copies={"i1": Copy()}), "i0", LONG_AGO_MS, NOW_MS) is None
    assert evicted(cluster, warm, "empty", LONG_AGO_MS, NOW_MS) is None
    assert evicted(cluster, warm, "i0", NOW_MS - 59_999, NOW_MS) is None
    assert evicted(cluster, warm, "i0", LONG_AGO_MS, NOW_MS) == Load("m", "empty", "evicted elsewhere")
    assert cluster.reserved("m") == ["empty"]


def test_a_new_instance_is_filled_with_what_was_used_last() -> None:
    cluster = Cluster([*instances(5, used_bytes=GIB), Instance("new", GIB, loader_threads=8)])
    waiting = [Model(f"m{n}", size_bytes=100 * MIB) for n in range(30)]
    loads = fill(cluster, waiting, NOW_MS, most=100)
    assert [load.model for load in loads] == [f"m{n}" for n in range(9)]  # a sixteenth stays free
    assert {load.instance for load in loads} == {"new"}
    assert fill(cluster, waiting[9:], NOW_MS, most=100) == []


def test_filling_is_even_bounded_and_does_not_make_loads_queue() -> None:
    cluster = Cluster(instances(4, loader_threads=2))
    waiting = [Model(f"m{n}", size_bytes=MIB) for n in range(100)]
    assert len(fill(cluster, waiting, NOW_MS, most=3)) == 3
    fill(cluster, waiting[3:], NOW_MS, most=100)
    assert {member.loads for member in cluster} == {4}


def test_filling_respects_labels_and_failures() -> None:
    constraints = TypeConstraints.of({"t": {"required": ["gpu"]}})
    cluster = Cluster([*instances(3), Instance("gpu", GIB, used_bytes=MIB, labels=frozenset({"gpu"}))], constraints)
    waiting = [Model("m", "t", MIB), Model("n", "t", MIB, failures={"gpu": NOW_MS}), Model("o", "", MIB)]
    loads = fill(cluster, waiting, NOW_MS, most=10)
    assert loads[0] == Load("m", "gpu", "room")
    assert [load.model for load in loads] == ["m", "o"]


def leaving_cluster(**facts: object) -> Cluster:
    return Cluster([*instances(5, **facts), Instance("leaving", GIB, draining=True)])


def test_an_instance_that_leaves_hands_over_first_what_is_used_most() -> None:
    models = [
        held("calm", "leaving", 10),
        held("hot", "leaving", 1000),
        held("idle", "leaving", last_used_ms=NOW_MS - 2 * HOUR_MS),
        held("wanted", "leaving", last_used_ms=NOW_MS - 2 * HOUR_MS, min_copies=1),
        held("elsewhere", "leaving i0", 10),
        held("two", "leaving i0", 10, min_copies=2),
        held("busy", "leaving i0", 1900),
    ]
    cluster = leaving_cluster()
    moves = drain(cluster, "leaving", models, NOW_MS)
    assert [move.model for move in moves] == ["busy", "hot", "two", "calm", "wanted"]
    assert all(move.source == "leaving" and move.instance.startswith("i") for move in moves)
    assert moves[0].instance != "i0"
    assert {cluster.reserved(move.model)[0] for move in moves} == {move.instance for move in moves}


def test_a_drain_displaces_nothing_that_is_used_more() -> None:
    cluster = leaving_cluster(used_bytes=GIB, oldest_used_ms=NOW_MS - 1000)
    models = [held("m", "leaving", last_used_ms=NOW_MS - 60_000), held("n", "leaving", 10)]
    assert [move.model for move in drain(cluster, "leaving", models, NOW_MS)] == ["n"]


def test_the_only_instance_leaves_without_a_plan() -> None:
    cluster = Cluster([Instance("leaving", GIB, draining=True)])
    assert drain(cluster, "leaving", [held("m", "leaving", 10)], NOW_MS) == []


def test_the_copies_of_a_dead_instance_are_pruned_after_a_minute() -> None:
    cluster = Cluster(instances(2))
    model = replace(held("m", "i0 dead blinking"), failures={"dead": 1, "lost": 1})
    since = {"dead": NOW_MS - 60_000, "lost": NOW_MS - 90_000, "blinking": NOW_MS - 59_999, "i0": 0}
    drops = prune(cluster, model, since.get, NOW_MS)
    assert drops == [Drop("m", name, "its instance is gone") for name in ("dead", "lost")]
    assert prune(cluster, model, {}.get, NOW_MS) == []
