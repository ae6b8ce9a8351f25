"""Fixtures for tests of a running instance; what they give is in ``tests/serving.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Instances, Serve


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts ``mmcore serve`` on a free port: ``serve(models_dir, *flags)``; ended after the test."""
    instances = Instances(tmp_path)
    yield instances
    instances.end()


@pytest.fixture(scope="session")
def serve_for_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The same for instances that many tests share."""
    instances = Instances(tmp_path_factory.mktemp("instances"))
    yield instances
    instances.end()
