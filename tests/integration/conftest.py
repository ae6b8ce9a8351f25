"""What the controller's tests share: an API server, and a cluster in a namespace of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.api_servers import ApiServer, api_server
from tests.clusters import Cluster, running
from tests.management import BROKEN, SCALE
from tests.serving import write_model


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The real API server where this machine has it, ours otherwise."""
    started = api_server(tmp_path_factory.mktemp("kubernetes"))
    try:
        yield started.start()
    finally:
        started.stop()


@pytest.fixture
async def cluster(kubernetes: ApiServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster with its controller, and models that multiply by two and three, and one that cannot be loaded."""
    async with running(kubernetes, tmp_path) as found:
        for factor in (2, 3):
            write_model(found.models, f"scale-{factor}", SCALE.replace("FACTOR", str(factor)))
        write_model(found.models, "broken", BROKEN)
        yield found
