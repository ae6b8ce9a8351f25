"""SUITE=registry: how soon an instance has its table, how soon a change is everywhere, and what it costs to be idle.

Instances are processes. Models are registered as the archived controller registers them: about 250 bytes of JSON each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.machine import cores
from bench.processes import PeerFailed, Process
from bench.rows import UNITS, Row, compare
from mmcore.registry import ModelRecord
from mmcore.registry.etcd import EtcdStore, etcd_store
from mmcore.registry.records import encode
from mmcore.registry.sqlite import SqliteStore
from mmcore.registry.store import Store
from tests.etcds import Etcd

#: Issue 5: a joining instance has its table in 5 s, a change is in all of three within 100 ms. Design §9: 500 bytes.
JOIN_S: Final = 5.0
CHANGE_MS: Final = 100.0
START_S: Final = 10.0
BYTES: Final = 500.0

INSTANCES: Final = 3
MODELS: Final = 100_000
MANY: Final = 1_000_000
CHANGES: Final = 300
EVERY_S: Final = 0.02
IDLE_S: Final = 20.0
#: Keys in one transaction; etcd takes no more than 128.
CHUNK: Final[dict[type[Store], int]] = {EtcdStore: 100, SqliteStore: 5000}


def run(console: Console, plan: Plan) -> list[Row]:
    """Each kind of registry with 100,000 models and three instances; then a file with 1,000,000 and one."""
    rows: list[Row] = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        if plan.wants_case("etcd"):
            etcd = Etcd(Path(folder) / "etcd").start()
            try:
                url = f"etcd://{etcd.endpoint}/bench"
                console.print(f"registering {MODELS} models in etcd")
                register(etcd_store(url), MODELS)
                rows += _shared("etcd", url, etcd)
            finally:
                etcd.kill()
        if plan.wants_case("sqlite"):
            console.print(f"registering {MODELS} models in a file")
            path = Path(folder) / "registry.db"
            register(SqliteStore(path), MODELS)
            rows += _shared("sqlite", f"sqlite:{path}", None)
        if plan.wants_case("million"):
            console.print(f"registering {MANY} models in a file")
            path = Path(folder) / "million.db"
            register(SqliteStore(path), MANY)
            rows += _million(f"sqlite:{path}")
    return rows


def _shared(case: str, url: str, etcd: Etcd | None) -> list[Row]:
    with ExitStack() as running:
        instances = [running.enter_context(_instance(url, number)) for number in range(INSTANCES)]
        joined = max(_number(instance, "join_s") for instance in instances)
        instances[0].ask(f"write {CHANGES} {EVERY_S}", 120)
        time.sleep(1)
        heard = [json.loads(instance.ask("heard", 10))["heard_ns"] for instance in instances]
        # Changes that an instance heard of only together with the next one do not count.
        numbers = set.intersection(*(set(one) for one in heard))
        if len(numbers) < 0.9 * CHANGES:
            raise PeerFailed(f"of {CHANGES} changes only {len(numbers)} were heard of by all instances")
        everywhere_ms = [max(one[number] for one in heard) / 1e6 for number in numbers]
        p50, p99 = np.percentile(everywhere_ms, (50, 99))
        return [
            compare(case, "join", joined, "budget", JOIN_S),
            Row(case, "change_p50", float(p50), "", None, None, UNITS["change_p50"]),
            compare(case, "change_p99", float(p99), "budget", CHANGE_MS),
            *_idle(case, instances, etcd),
        ]


def _idle(case: str, instances: Sequence[Process], etcd: Etcd | None) -> Iterator[Row]:
    """What one instance costs while nothing happens; its requests and bytes by what etcd counts itself."""
    before, traffic = _cpu(instances), _traffic(etcd)
    time.sleep(IDLE_S)
    share = IDLE_S * len(instances)
    yield Row(case, "idle_cpu", (_cpu(instances) - before) * 1e3 / share, "", None, None, UNITS["idle_cpu"])
    if etcd is not None:
        requests, size = (after - first for after, first in zip(_traffic(etcd), traffic, strict=True))
        yield Row(case, "idle_requests", requests / share, "", None, None, UNITS["idle_requests"])
        yield Row(case, "idle_bytes", size / share, "", None, None, UNITS["idle_bytes"])


def _million(url: str) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        empty = f"sqlite:{folder}/empty.db"
        with _instance(empty, 0) as instance:
            without = _number(instance, "bytes")
    with _instance(url, 0) as instance:
        per_model = (_number(instance, "bytes") - without) / MANY
        return [
            compare("million", "join", _number(instance, "join_s"), "budget", START_S),
            compare("million", "bytes", per_model, "budget", BYTES),
        ]


def register(store: Store, count: int) -> None:
    """Write so many models."""
    chunk = CHUNK[type(store)]

    async def run() -> None:
        await store.connect()
        for start in range(0, count, chunk):
            await store.create_missing([_model(number) for number in range(start, start + chunk)])
        await store.close()

    asyncio.run(run())


def _model(number: int) -> tuple[str, bytes]:
    """A model's key and record, as a Predictor of ModelMesh Serving is registered."""
    key = json.dumps(
        {"storage_key": "localMinIO", "storage_params": {"bucket": "models"}, "model_type": {"name": "sklearn"}}
    )
    record = ModelRecord(
        "mt:sklearn", f"team-{number % 97}/model-{number:07}", key, last_used_ms=1764117600000 + number
    )
    return f"models/model-{number:07}__ksp-{number:010x}", encode(record)


def _instance(url: str, number: int) -> Process:
    argv = [sys.executable, "-m", "bench.registry_instance", url, f"i{number}"]
    return Process(f"instance {number}", argv, core=cores()[number % 2])


def _number(instance: Process, name: str) -> float:
    value = instance.ready[name]
    assert isinstance(value, int | float)
    return float(value)


def _cpu(instances: Sequence[Process]) -> float:
    return sum(float(json.loads(instance.ask("cpu", 10))["cpu_s"]) for instance in instances)


def _traffic(etcd: Etcd | None) -> tuple[float, float]:
    """Calls started, and bytes received and sent, as etcd counts them."""
    if etcd is None:
        return 0, 0
    calls, size = 0.0, 0.0
    for line in etcd.metrics().splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("grpc_server_started_total"):
            calls += float(value)
        elif name.startswith("etcd_network_client_grpc_"):
            size += float(value)
    return calls, size
