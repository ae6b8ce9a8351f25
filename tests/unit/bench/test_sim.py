"""The simulator at a size that takes a second: what its mesh does, and that ours is the better policy there too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.rows import write
from bench.sim.mesh import NOWHERE, SEVERAL, Mesh
from bench.sim.ours import OwnPolicy
from bench.sim.placement import Scenario, Simulation, simulate
from bench.sim.policies import ModelMeshPolicy, RandomPolicy
from bench.sim.workload import Workload

TINY = Scenario(
    instances=12, models=3000, minutes=6, capacity_bytes=2_000_000_000, deploy_minutes=(1, 3), zone_lost_minute=4
)


def small_mesh(capacity: int = 100_000_000) -> Mesh:
    workload = Workload(20, 100.0, seed=1)
    workload.sizes[:] = 40_000_000
    return Mesh(workload, 3, capacity)


def test_a_node_evicts_what_was_used_longest_ago() -> None:
    mesh = small_mesh()
    gone: list[tuple[int, int, int]] = []
    mesh.evicted = lambda model, slot, since_ms: gone.append((model, slot, since_ms))
    for model in (1, 2):
        mesh.load(model, 0, now_ms=model)
    mesh.workload.last_used_ms[1] = 10
    mesh.workload.last_used_ms[2] = 2
    assert mesh.load(3, 0, now_ms=20) == 1400
    assert gone == [(2, 0, 2)]
    assert set(mesh.nodes[0].models) == {1, 3}
    assert mesh.nodes[0].used == 80_000_000
    assert mesh.oldest_used_ms(mesh.nodes[0]) == 10


def test_loads_beyond_the_threads_wait() -> None:
    mesh = small_mesh(capacity=10**9)
    waits = [mesh.load(model, 0, now_ms=0) for model in range(6)]
    assert waits == [1400] * 4 + [2800] * 2
    record = mesh.record(mesh.nodes[0], 1500)
    assert (record.loading, record.fixed_bytes, record.used_bytes) == (2, 80_000_000, 240_000_000)


def test_copies_are_known_by_model_and_by_node() -> None:
    mesh = small_mesh()
    mesh.load(1, 0, 0)
    assert mesh.home[1] == 0
    mesh.load(1, 2, 0)
    assert mesh.home[1] == SEVERAL
    mesh.stop(0)
    assert mesh.home[1] == 2
    assert not mesh.nodes[0].models
    mesh.drop(1, 2)
    assert mesh.home[1] == NOWHERE
    assert not mesh.copies


def test_popularity_drifts_and_stays_the_same_in_sum() -> None:
    workload = Workload(5000, 1000.0, seed=1)
    before = workload.rates.copy()
    workload.drift()
    assert workload.rates.sum() == pytest.approx(1000.0)
    assert 4 <= np.count_nonzero(workload.rates != before) <= 14
    asked = workload.used(now_ms=60_000, lasting_ms=60_000)
    assert (workload.last_used_ms[asked] == 60_000).all()
    assert workload.rates[asked].sum() > 500


@pytest.mark.parametrize("policy", [OwnPolicy, RandomPolicy, ModelMeshPolicy])
def test_a_mesh_stays_whole_through_restarts_deaths_and_the_loss_of_a_zone(policy: type) -> None:
    simulation = Simulation(TINY, policy)
    figures = simulation.run()
    mesh = simulation.mesh
    sizes = simulation.workload.sizes
    for node in mesh.nodes:
        assert node.used == sum(int(sizes[model]) for model in node.models)
        assert node.used <= node.capacity
        assert node.up or not node.models
    held = {(model, slot) for model, slots in mesh.copies.items() for slot in slots}
    assert held == {(model, node.slot) for node in mesh.nodes for model in node.models}
    assert {node.version for node in mesh.nodes} == {"1", "2"}
    assert 0 < figures["miss_rate"] < 0.2


def test_the_same_seed_gives_the_same_figures() -> None:
    first, second = (Simulation(TINY, OwnPolicy).run() for _ in range(2))
    timed = {"decision_us", "decision_p99_us"}
    assert {key: value for key, value in first.items() if key not in timed} == {
        key: value for key, value in second.items() if key not in timed
    }


def test_ours_balances_better_and_the_file_has_the_figures_of_each(tmp_path: Path) -> None:
    path = write(tmp_path, "sim", simulate(TINY))
    figures = json.loads(path.read_text())
    assert list(figures) == ["summary", "random", "modelmesh"]
    expected = {"instances", "models", "memory_max_over_mean", "traffic_max_over_mean", "miss_rate"}
    expected |= {"moves_per_model_hour", "decision_us"}
    assert all(expected <= by_key.keys() for by_key in figures.values())
    ours = figures["summary"]
    assert ours["traffic_max_over_mean"] < figures["modelmesh"]["traffic_max_over_mean"]
    assert ours["traffic_max_over_mean"] < figures["random"]["traffic_max_over_mean"]
    assert ours["memory_max_over_mean"] <= 1.1
