"""SUITE=controller: ten thousand Predictors: how soon all are known, how soon a change is served, what rest costs.

The controller is its own process, its API server the one of the tests (Python, so slower than the real one), its
instance a real one with real models, started by the kubelet of the tests.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from rich.console import Console

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.processes import PeerFailed
from bench.rows import UNITS, Row, compare
from mmcore.controller.informer import Informer
from mmcore.controller.objects import PREDICTOR, Object, Ref, at
from tests.api_servers import OwnApiServer
from tests.clusters import Cluster, predictor, runtime
from tests.etcds import free_port
from tests.management import SCALE
from tests.serving import environment, write_model

PREDICTORS: Final = 10_000
QUICK_PREDICTORS: Final = 500
CHANGES: Final = 40
REST_S: Final = 30.0
#: Issue 8: all are known and looked at within a minute, one change is handled within a second.
SYNC_S: Final = 60.0
CHANGE_MS: Final = 1000.0
WITHIN_S: Final = 1200.0
AT_ONCE: Final = 64
#: No request for so long is rest.
QUIET_S: Final = 3.0


def run(console: Console, plan: Plan) -> list[Row]:
    """Make the Predictors, start the controller twice, change some, and let it rest."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    count = PREDICTORS if plan.duration_s >= 1 else QUICK_PREDICTORS
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        return asyncio.run(_run(console, Path(folder), count))


async def _run(console: Console, folder: Path, count: int) -> list[Row]:
    (folder / "kubernetes").mkdir()
    server = OwnApiServer(folder / "kubernetes")
    try:
        async with _cluster(server.start(), folder, count) as cluster:
            return await _Bench(console, server, cluster, count).measure()
    finally:
        server.stop()


@asynccontextmanager
async def _cluster(server: OwnApiServer, folder: Path, count: int) -> AsyncIterator[Cluster]:
    cluster = Cluster(server, folder, "serving")
    await cluster.prepare(cluster_scope=False)
    for factor in (2, 3):
        write_model(cluster.models, f"scale-{factor}", SCALE.replace("FACTOR", str(factor)))
    limits = {"resources": {"limits": {"memory": "8Gi"}}}
    await cluster.apply(runtime(containers=[{"name": "mmcore", **limits}]))
    free = asyncio.Semaphore(AT_ONCE)

    async def make(number: int) -> None:
        async with free:
            await cluster.apply(predictor(_name(number), "scale-2"))

    await asyncio.gather(*map(make, range(count)))
    kubelet = asyncio.ensure_future(cluster.kubelet.run())
    try:
        yield cluster
    finally:
        kubelet.cancel()
        await asyncio.wait([kubelet])
        await cluster.close()


def _name(number: int) -> str:
    return f"model-{number:05}"


class _Bench:
    def __init__(self, console: Console, server: OwnApiServer, cluster: Cluster, count: int) -> None:
        self._console = console
        self._server = server
        self._cluster = cluster
        self._count = count
        self._moved = asyncio.Event()
        self._predictors = Informer(cluster.api, PREDICTOR, lambda before, after: self._moved.set())

    async def measure(self) -> list[Row]:
        following = asyncio.ensure_future(self._predictors.run())
        try:
            return [*await self._first(), *await self._second()]
        finally:
            following.cancel()
            await asyncio.wait([following])

    async def _first(self) -> list[Row]:
        """None of them has been seen by a controller."""
        began = time.monotonic()
        async with self._controller() as process:
            registered = await self._until_all(began, lambda one: at(one, "status", "observedGeneration"))
            loaded = await self._until_all(began, _loaded)
            await self._rest()
            counted, cpu = _without_watches(self._server.requests()), _cpu(process)
        self._say(f"new: all told of after {registered:.1f} s, loaded after {loaded:.1f} s, {counted} requests")
        each = counted / self._count
        return [
            _row("new", "registered", registered, "s"),
            _row("new", "loaded", loaded, "s"),
            _row("new", "requests", each, "requests per Predictor"),
            _row("new", "cpu", cpu, "s of CPU"),
        ]

    async def _second(self) -> list[Row]:
        """All of them are served: a controller starts anew."""
        before = _without_watches(self._server.requests())
        began = time.monotonic()
        async with self._controller() as process:
            synced = await self._rest() - began
            counted, cpu = _without_watches(self._server.requests()) - before, _cpu(process)
            self._say(f"again: at rest after {synced:.1f} s, {counted} requests")
            changes = [await self._change(number) for number in range(CHANGES)]
            await self._rest()
            resting = await self._resting(process)
        p50, p99 = np.percentile(changes, (50, 99))
        self._say(f"a change is loaded and told after {p50:.0f} ms (median), {max(changes):.0f} ms at worst")
        return [
            compare("again", "sync", synced, "budget", SYNC_S),
            _row("again", "requests", counted, "requests"),
            _row("again", "cpu", cpu, "s of CPU"),
            Row("change", "change_p50", float(p50), "", None, None, UNITS["change_p50"]),
            compare("change", "change_p99", float(p99), "budget", CHANGE_MS),
            *resting,
        ]

    async def _change(self, number: int) -> float:
        """How long until a Predictor that asks for another model has it, in ms."""
        where = Ref(self._cluster.namespace, _name(number * self._count // CHANGES))
        began = time.monotonic()
        made = await self._cluster.api.patch(PREDICTOR, where, {"spec": {"storage": {"path": "scale-3"}}})
        generation = made["metadata"]["generation"]

        def done() -> bool:
            item = self._predictors.items[where]
            return at(item, "status", "observedGeneration") == generation and _loaded(item)

        await self._until(done)
        return (time.monotonic() - began) * 1e3

    async def _resting(self, process: psutil.Process) -> list[Row]:
        before, cpu = self._server.requests(), _cpu(process)
        await asyncio.sleep(REST_S)
        after = self._server.requests()
        more = {what: number - before.get(what, 0) for what, number in after.items()}
        leases = sum(number for what, number in more.items() if what.endswith(" leases"))
        memory = process.memory_info().rss / 1e6
        others = {what: number for what, number in more.items() if number and not what.endswith(" leases")}
        self._say(f"at rest for {REST_S:.0f} s: {leases} requests for the lease, others {others}, {memory:.0f} MB")
        return [
            _row("rest", "lease", leases / REST_S, "requests/s"),
            _row("rest", "others", sum(others.values()) / REST_S, "requests/s"),
            _row("rest", "cpu", (_cpu(process) - cpu) * 1e3 / REST_S, "ms of CPU per s"),
            _row("rest", "rss", memory, "MB"),
        ]

    async def _rest(self) -> float:
        """When the controller made its last request, but for its lease, before it made none for a while."""
        last, moved = -1, time.monotonic()
        async with asyncio.timeout(WITHIN_S):
            while time.monotonic() - moved < QUIET_S:
                found = {what: number for what, number in self._server.requests().items() if " leases" not in what}
                if sum(found.values()) != last:
                    last, moved = sum(found.values()), time.monotonic()
                await asyncio.sleep(0.2)
        return moved

    async def _until_all(self, began: float, fits: Callable[[Object], Any]) -> float:
        """Seconds since ``began`` until all Predictors are so."""
        left = {Ref(self._cluster.namespace, _name(number)) for number in range(self._count)}

        def done() -> bool:
            items = self._predictors.items
            left.difference_update([where for where in left if where in items and fits(items[where])])
            return not left

        try:
            await self._until(done)
        except TimeoutError:
            raise PeerFailed(f"{len(left)} Predictors are not so: {sorted(map(str, left))[:3]}") from None
        return time.monotonic() - began

    async def _until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not done():
                self._moved.clear()
                await self._moved.wait()
                if self._count > QUICK_PREDICTORS and not done():
                    # Not each of many changes is looked at.
                    await asyncio.sleep(0.01)

    @asynccontextmanager
    async def _controller(self) -> AsyncIterator[psutil.Process]:
        port = free_port()
        argv = [sys.executable, "-m", "mmcore.cli.main", "controller", "--namespace", self._cluster.namespace]
        argv += [
            "--namespace-scope",
            "--kubeconfig",
            str(self._server.controller_kubeconfig),
            "--probe-port",
            str(port),
        ]
        with (self._cluster.folder / "controller.log").open("ab") as log:
            started = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log, env=environment())
        try:
            async with asyncio.timeout(WITHIN_S):
                while started.returncode is None and not await asyncio.to_thread(_ready, port):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            if started.returncode is not None:
                raise PeerFailed((self._cluster.folder / "controller.log").read_text()[-2000:])
            yield psutil.Process(started.pid)
        finally:
            if started.returncode is None:
                started.terminate()
            async with asyncio.timeout(30):
                await started.wait()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)
        sys.stdout.flush()


def _ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
    except OSError:
        return False
    return True


def _loaded(item: Object) -> bool:
    status = item.get("status") or {}
    return bool(status.get("activeModelState") == "Loaded" and not status.get("targetModelState"))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _without_watches(counts: dict[str, int]) -> int:
    return sum(number for what, number in counts.items() if not what.startswith("WATCH") and " leases" not in what)


def _row(case: str, metric: str, value: float, unit: str) -> Row:
    return Row(case, metric, value, "", None, None, unit)
