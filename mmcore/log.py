"""Where log lines go and which of them: standard error, one line each, as text or as JSON, switched while running.

Modules log through ``logging.getLogger(__name__)``; only this one configures. The switches are those of the KServe v2
logging extension as Triton documents it: one for each of info, warning and error, and a verbosity for the rest.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

ROOT: Final = "mmcore"
LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("default", "ISO8601")
LINES: Final = ("text", "json")
#: The attribute of a record that holds its event.
_EVENT: Final = "event"


@dataclass(slots=True)
class LogSwitches:
    """Which lines are written; read for each record, so a change holds from the next line on.

    ``verbose`` above zero lets debug lines through. Errors above ERROR are always written. ``requests`` asks for a line
    for each request, ``on_requests`` is told when that changes.
    """

    info: bool = True
    warning: bool = True
    error: bool = True
    verbose: int = 0
    format: str = "ISO8601"
    requests: bool = False
    on_requests: Callable[[bool], object] = field(default=lambda wanted: None, repr=False, compare=False)

    def set_level(self, level: str) -> None:
        """Let lines of ``level`` (one of :data:`LEVELS`) and above through."""
        rank = LEVELS.index(level)
        self.verbose = int(rank == 0)
        self.info = rank <= 1
        self.warning = rank <= 2
        self.error = True

    def apply(self) -> None:
        """Set the lowest level that any switch lets through, so that refused lines cost nothing to their callers."""
        lowest = logging.CRITICAL
        for wanted, level in (
            (self.error, logging.ERROR),
            (self.warning, logging.WARNING),
            (self.info, logging.INFO),
            (self.verbose > 0, logging.DEBUG),
        ):
            if wanted:
                lowest = level
        logging.getLogger(ROOT).setLevel(lowest)
        self.on_requests(self.requests)

    def allows(self, record: logging.LogRecord) -> bool:
        """Whether the record's own switch is on."""
        level = record.levelno
        if level < logging.INFO:
            return self.verbose > 0
        if level < logging.WARNING:
            return self.info
        if level < logging.ERROR:
            return self.warning
        return self.error or level > logging.ERROR


#: The switches of this process.
switches: Final = LogSwitches()


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO server.node: text``; the default form has local time without its zone."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        """The record's time in the form chosen by the switches."""
        if switches.format == "ISO8601":
            return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        return f"{time.strftime('%m-%d %H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"

    def format(self, record: logging.LogRecord) -> str:
        """One line, a traceback on the lines after it."""
        record.shortname = record.name.removeprefix(f"{ROOT}.")
        return super().format(record)


class JsonFormatter(LineFormatter):
    """An object a line: ``time``, ``level``, ``logger``, ``message``, the fields of an :func:`event`, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix(f"{ROOT}."),
            "message": record.getMessage(),
            **getattr(record, _EVENT, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def event(name: str, **fields: object) -> dict[str, object]:
    """What a line tells, as fields of their own where lines are JSON: the ``extra`` of a logging call.

    Names of events are fixed: programs go by them.
    """
    return {_EVENT: {"event": name, **fields}}


def configure(level: str, lines: str = LINES[0]) -> None:
    """Send this process's log lines of ``level`` and above to standard error; a second call only sets the level.

    ``lines`` is one of :data:`LINES`.
    """
    switches.set_level(level)
    switches.apply()
    root = logging.getLogger()
    if not any(isinstance(handler.formatter, LineFormatter) for handler in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        kind = JsonFormatter if lines == "json" else LineFormatter
        handler.setFormatter(kind("%(asctime)s %(levelname)s %(shortname)s: %(message)s"))
        handler.addFilter(switches.allows)
        root.addHandler(handler)
        logging.captureWarnings(True)
