"""The event loops of asynchronous tests, and running instances for tests (``tests/serving.py``)."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from _pytest.faulthandler import fault_handler_stderr_fd_key

from mmcore import log
from tests.serving import Instances, Serve

# As mmcore.runtimes.loading does, for the tests that import OpenVINO themselves.
sys.modules.setdefault("openvino_telemetry", None)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Modules that say ``EVERY_LOOP = True`` run their tests on each kind of loop we serve on."""
    if getattr(getattr(item, "module", None), "EVERY_LOOP", False):
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: pytest.CallInfo[object]) -> None:
    """Say at once why a test failed, and watch over its clean-up.

    The watches of pytest and of pytest-timeout end with the failure: a clean-up that hangs would hold the run for ever.
    """
    if not isinstance(node, pytest.Item) or call.excinfo is None:
        return
    stderr = node.config.stash[fault_handler_stderr_fd_key]
    why = call.excinfo.exconly().splitlines()[0][:300]
    os.write(stderr, f"\n{node.nodeid} failed in its {call.when}: {why}\n".encode(errors="replace"))
    faulthandler.dump_traceback_later(float(node.config.getini("faulthandler_timeout")), exit=True, file=stderr)


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


@pytest.fixture
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what a command that runs in this process does to its logging: its lines go to this test's stderr."""
    monkeypatch.setattr(log, "switches", log.LogSwitches())
    root, package = logging.getLogger(), logging.getLogger("mmcore")
    handlers, level = list(root.handlers), package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.captureWarnings(False)
