"""Defects of ModelMesh that concern placement and that its users met: none of them is here.

The others are tested where their rule is: copies for steady use (modelmesh#151), pinned and least copies
(modelmesh#108), idle models (modelmesh-serving#312) in test_scaling; herds (modelmesh-serving#469), zones, versions and
reservations in test_places; cascades (modelmesh-serving#455) and drains (modelmesh#142) in test_moves; uneven traffic
(modelmesh-serving#330) in test_choice.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmcore.placement import (
    Cluster,
    Copy,
    Demand,
    Drop,
    Instance,
    Model,
    NoPlace,
    TypeConstraints,
    place,
    scale,
    serving,
)

GIB = 1 << 30
NOW_MS = 1_800_000_000_000
GPU = frozenset({"gpu"})
CONSTRAINTS = TypeConstraints.of({"t": {"required": ["gpu"]}})


def test_one_suitable_instance_is_found_however_full() -> None:
    """modelmesh#69: "nowhere available to load" with one suitable instance."""
    suitable = Instance("gpu", GIB, used_bytes=GIB, oldest_used_ms=NOW_MS - 1, loading=9, labels=GPU)
    cluster = Cluster([*(Instance(f"i{n}", GIB) for n in range(20)), suitable], CONSTRAINTS)
    assert place(cluster, Model("m", "t", GIB // 2), NOW_MS) == "gpu"


def test_more_models_in_use_than_fit_are_loaded_nevertheless() -> None:
    """modelmesh-serving#341: requests failed with "cache churn threshold exceeded"."""
    cluster = Cluster(Instance(f"i{n}", GIB, used_bytes=GIB, oldest_used_ms=NOW_MS - 100) for n in range(3))
    assert place(cluster, Model("m", size_bytes=GIB // 10, last_used_ms=NOW_MS), NOW_MS) in {"i0", "i1", "i2"}


def test_copies_go_down_under_type_constraints_too() -> None:
    """Mesh.md, section 5.8: an instance that was not the first of its labels never scaled down."""
    cluster = Cluster((Instance(f"g{n}", GIB, labels=GPU) for n in range(4)), CONSTRAINTS)
    cluster.put(Instance("plain", GIB))
    copies = {f"g{n}": Copy() for n in range(4)}
    idle = Model("m", "t", 1, copies=copies, last_used_ms=NOW_MS - 1000)
    assert [type(action) for action in scale(cluster, idle, NOW_MS)] == [Drop]


def test_models_used_at_the_same_moment_are_all_considered() -> None:
    """Mesh.md, section 5.8: of models with equal times only one was."""
    cluster = Cluster(Instance(f"i{n}", GIB) for n in range(4))
    models = [Model(f"m{n}", size_bytes=1, copies={"i0": Copy(), "i1": Copy()}, last_used_ms=0) for n in range(5)]
    assert all(scale(cluster, model, NOW_MS) for model in models)


def test_labels_make_no_difference_to_how_versions_are_told_apart() -> None:
    """Mesh.md, section 4.4: with any labels, which modelmesh-serving always sets, upgrades were not tracked."""
    cluster = Cluster(Instance(f"old{n}", GIB, labels=GPU, version="a", started_ms=1) for n in range(3))
    cluster.put(Instance("new", GIB, labels=GPU, version="b", started_ms=2))
    assert place(cluster, Model("m"), NOW_MS) == "new"


def test_a_candidate_is_judged_by_its_own_record() -> None:
    """Mesh.md, section 5.4: the shortlist compared the local instance's record instead."""
    full = Instance("full", GIB, used_bytes=GIB, oldest_used_ms=NOW_MS - 1000)
    for here in (full, replace(full, used_bytes=0)):
        cluster = Cluster([replace(here, id="here"), full, Instance("roomy", GIB, used_bytes=GIB // 2)])
        assert place(cluster, Model("m", size_bytes=GIB // 4), NOW_MS, exclude={"here"}) == "roomy"


def test_an_error_of_every_copy_does_not_make_one_more() -> None:
    """Mesh.md, section 6.1: a request whose copies all failed loaded the model at one more instance each time."""
    cluster = Cluster(Instance(f"i{n}", GIB) for n in range(9))
    model = Model("m", copies={"i0": Copy(), "i1": Copy()}, last_used_ms=NOW_MS, demand=Demand(1.0))
    assert serving(cluster, model) == ("i0", "i1")
    assert scale(cluster, model, NOW_MS) == []


def test_three_failures_are_told_as_such() -> None:
    cluster = Cluster(Instance(f"i{n}", GIB) for n in range(9))
    with pytest.raises(NoPlace, match="loading 'm' failed at 3 instances"):
        place(cluster, Model("m", failures={"i0": 1, "i1": 1, "i2": 1}), NOW_MS)
