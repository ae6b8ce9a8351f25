from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mmcore import log


@pytest.fixture(autouse=True)
def _keep_logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "switches", log.LogSwitches())
    root, package = logging.getLogger(), logging.getLogger("mmcore")
    handlers, level = list(root.handlers), package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    logger = logging.getLogger("mmcore.server.node")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, level)("a %s line", level)
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def test_a_level_lets_itself_and_everything_above_through(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning")
    assert lines(capsys) == [
        "WARNING server.node: a warning line",
        "ERROR server.node: a error line",
        "CRITICAL server.node: a critical line",
    ]


def test_switches_work_one_by_one_while_running(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    log.switches.warning = False
    log.switches.verbose = 1
    log.switches.apply()
    assert [line.split(" ")[0] for line in lines(capsys)] == ["DEBUG", "INFO", "ERROR", "CRITICAL"]


def test_configuring_twice_writes_every_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    log.configure("error")
    assert [line.split(" ")[0] for line in lines(capsys)] == ["ERROR", "CRITICAL"]


def test_times_are_universal_time_to_the_millisecond(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    record = logging.makeLogRecord(
        {"name": "mmcore.x", "levelname": "INFO", "msg": "text", "created": 0.5, "msecs": 500}
    )
    formatter = log.LineFormatter("%(asctime)s %(levelname)s %(shortname)s: %(message)s")
    assert formatter.format(record) == "1970-01-01T00:00:00.500Z INFO x: text"
