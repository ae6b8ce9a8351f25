"""One instance with a folder of models, shared by the tests that drive it with other people's clients."""

from __future__ import annotations

import pytest

from tests.conformance.models import write_models
from tests.serving import Instance, Serve


@pytest.fixture(scope="session")
def instance(serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    models = tmp_path_factory.mktemp("models")
    write_models(models)
    return serve_for_session(models, "--server-name", "triton")
