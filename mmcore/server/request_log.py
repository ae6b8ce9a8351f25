"""A line in the log for each request, while the log setting ``log_requests`` is on."""

from __future__ import annotations

import logging
import time

from mmcore._ext.pbwire import find_string
from mmcore.errors import InvalidRequest, Status
from mmcore.log import event
from mmcore.server.calls import Answer, Body
from mmcore.server.watched import Ended

log = logging.getLogger(__name__)


class RequestLog:
    """A :class:`mmcore.server.watched.Watcher`."""

    def begin(self, path: str, call: Answer, body: bytes) -> Ended | None:
        """See :class:`mmcore.server.watched.Watcher`."""
        began = time.monotonic()
        try:
            model = find_string(body, (1,))
        except InvalidRequest:
            model = ""

        def ended(status: int, details: str, message: Body | None) -> None:
            size = sum(map(len, message)) if isinstance(message, list) else len(message or b"")
            took_ms = (time.monotonic() - began) * 1e3
            log.info(
                "%s model=%s status=%s ms=%.3f request_bytes=%d answer_bytes=%d%s",
                path.rpartition("/")[2], _word(model), Status(status).name, took_ms, len(body), size,
                f" details={_word(details)}" if details else "",
                extra=event(
                    "request", method=path.rpartition("/")[2], model=model, status=Status(status).name,
                    ms=round(took_ms, 3), request_bytes=len(body), answer_bytes=size,
                    **({"details": details} if details else {}),
                ),
            )  # fmt: skip

        return ended


def _word(text: str) -> str:
    """What a client has written is not to forge lines or fields."""
    return text if text.isascii() and text.isprintable() and " " not in text else ascii(text)
