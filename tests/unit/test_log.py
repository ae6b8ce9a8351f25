from __future__ import annotations

import json
import logging
import re

import pytest

from mmcore import log

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


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


def test_lines_as_json_have_the_fields_of_their_event(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    logger = logging.getLogger("mmcore.cache.cache")
    logger.info("loaded %s\nat last", "m", extra=log.event("loaded", model="m", bytes=3))
    try:
        raise ValueError("seven")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info", "logger": "cache.cache", "message": "loaded m\nat last",
        "event": "loaded", "model": "m", "bytes": 3,
    }  # fmt: skip
    assert second["level"] == "error"
    assert "ValueError: seven" in second["exception"]
    assert "event" not in second


def test_events_do_not_show_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    logging.getLogger("mmcore.x").info("loaded", extra=log.event("loaded", model="m"))
    assert capsys.readouterr().err.endswith("INFO x: loaded\n")
