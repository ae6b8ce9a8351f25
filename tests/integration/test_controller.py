"""The controller with a real API server, real instances and real etcd: what a user of manifests sees."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mmcore.controller.objects import DEPLOYMENT, PREDICTOR
from tests.api_servers import RealApiServer, assets
from tests.clusters import Cluster, predictor, running, runtime
from tests.management import SCALE
from tests.serving import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(assets() is None, reason="no API server is built: make kube-apiserver"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApiServer]:
    started = RealApiServer(tmp_path_factory.mktemp("kubernetes"))
    try:
        yield started.start()
    finally:
        started.stop()


@pytest.fixture
async def cluster(server: RealApiServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(server, tmp_path) as found:
        yield found


async def test_a_predictor_is_loaded(cluster: Cluster) -> None:
    write_model(cluster.models, "double", SCALE.replace("FACTOR", "2"))
    await cluster.apply(runtime())
    await cluster.until(DEPLOYMENT, "modelmesh-serving-own", lambda one: one["spec"]["replicas"] == 0)
    await cluster.apply(predictor("double", "double"))
    found = await cluster.until(PREDICTOR, "double", lambda one: one["status"]["activeModelState"] == "Loaded")
    status = found["status"]
    assert status["available"] and status["transitionStatus"] == "UpToDate" and "lastFailureInfo" not in status
