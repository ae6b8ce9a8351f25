"""Requests and answers of models written out: as CloudEvents, one a line to a file, or each to an HTTP endpoint.

A thread of its own writes. What it cannot keep up with is dropped and counted: requests neither wait for it nor fail
by it.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import queue
import random
import threading
import uuid
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import Final, Protocol
from urllib.parse import urlsplit

from mmcore._ext.pbwire import find_string
from mmcore.config import PayloadSettings
from mmcore.errors import InvalidRequest, Status
from mmcore.server.calls import Answer, Body
from mmcore.server.watched import Ended

log = logging.getLogger(__name__)

#: Events that may wait, and their bytes together.
_EVENTS: Final = 1024
_BYTES: Final = 64 * 2**20
#: A file is begun anew at this length; so many old ones are kept.
_FILE_BYTES: Final = 100 * 2**20
_FILES: Final = 5
_POST_TIMEOUT_S: Final = 5.0
_CLOSE_S: Final = 5.0
_CONTENT_TYPE: Final = "application/x-protobuf"


class PayloadLog:
    """Writes payloads as the settings say. A :class:`mmcore.server.watched.Watcher`.

    Attributes:
        written, dropped: events.
    """

    def __init__(self, destination: str, settings: PayloadSettings, instance: str) -> None:
        self.written = 0
        self.dropped = 0
        self._settings = settings
        self._source = f"mmcore/{instance}"
        self._waiting: queue.Queue[tuple[dict[str, str], bytes] | None] = queue.Queue(_EVENTS)
        self._bytes = 0
        self._lock = threading.Lock()
        self._destination = destination
        self._write = _opened(destination)
        self._thread = threading.Thread(target=self._run, name="mmcore-payloads", daemon=True)
        self._thread.start()

    def begin(self, path: str, call: Answer, body: bytes) -> Ended | None:
        """See :class:`mmcore.server.watched.Watcher`. What other instances pass on is written where it came in."""
        settings = self._settings
        method = path.rpartition("/")[2]
        if method not in settings.methods or getattr(call, "internal", False):
            return None
        try:
            model = find_string(body, (1,)) or _named(call)
        except InvalidRequest:
            return None
        if settings.models and model not in settings.models:
            return None
        if random.random() >= settings.ratio:  # noqa: S311  # samples, hides nothing
            return None
        request = uuid.uuid4().hex
        self._put("request", request, method, model, body, "")

        def ended(status: int, details: str, message: Body | None) -> None:
            answer = b"".join(message) if isinstance(message, list) else bytes(message or b"")
            self._put("response", request, method, model, answer, Status(status).name, details)

        return ended

    def _put(
        self, kind: str, request: str, method: str, model: str, body: bytes, status: str, details: str = ""
    ) -> None:
        event = {
            "specversion": "1.0",
            "id": f"{request}-{kind}",
            "source": self._source,
            "type": f"mmcore.inference.{kind}",
            "time": datetime.now(UTC).isoformat(),
            "subject": model,
            "datacontenttype": _CONTENT_TYPE,
            "requestid": request,
            "method": method,
            **({"status": status} if status else {}),
            **({"details": details} if details else {}),
        }
        with self._lock:
            if self._bytes + len(body) > _BYTES:
                self.dropped += 1
                return
            try:
                self._waiting.put_nowait((event, body))
            except queue.Full:
                self.dropped += 1
                return
            self._bytes += len(body)

    def close(self) -> None:
        """Write what waits, for some seconds at most; not on the loop's thread."""
        try:
            self._waiting.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        failing = False
        while (item := self._waiting.get()) is not None:
            event, body = item
            try:
                self._write(json.dumps({**event, "data_base64": base64.b64encode(body).decode()}))
                self.written += 1
                failing = False
            except (OSError, MemoryError, http.client.HTTPException) as error:
                self.dropped += 1
                if not failing:
                    log.warning("payloads cannot be written to %s: %s", self._destination, error or "no memory")
                failing = True
            with self._lock:
                self._bytes -= len(body)
        self._write.close()


def _named(call: Answer) -> str:
    for name, value in call.metadata:
        if name in ("mm-model-id", "mm-vmodel-id") and isinstance(value, str):
            return value
    return ""


class _Destination(Protocol):
    """Where events go."""

    def __call__(self, text: str) -> None:
        """Write one; OSError or HTTPException where it was not taken."""

    def close(self) -> None:
        """Let go of it."""


def _opened(destination: str) -> _Destination:
    """What writes events to a file, or to an ``http://`` or ``https://`` endpoint."""
    return _Endpoint(destination) if urlsplit(destination).scheme in ("http", "https") else _File(destination)


class _File:
    """A file with an event a line, which begins anew when it is long."""

    def __init__(self, path: str) -> None:
        self._lines = _Lines(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8", delay=True)

    def __call__(self, text: str) -> None:
        """Write one; OSError where it cannot be."""
        self._lines.emit(logging.LogRecord("payload", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        """Close it."""
        self._lines.close()


class _Lines(RotatingFileHandler):
    """What goes wrong is raised."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Let the error through, which is being handled where this is called."""
        raise


class _Endpoint:
    """Takes each event as a structured CloudEvent (CloudEvents HTTP binding, section 3.2) over one kept connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=_POST_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __call__(self, text: str) -> None:
        """Post one; OSError where it was not taken."""
        try:
            headers = {"content-type": "application/cloudevents+json; charset=utf-8"}
            self._connection.request("POST", self._path, text.encode(), headers)
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            # The next one opens it anew.
            self._connection.close()
            raise
        if answer.status >= 300:
            raise OSError(f"it answers {answer.status} {answer.reason}")
