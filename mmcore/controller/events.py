"""Events on objects: what happened to them, said once, and no more of them than an API server can take."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

from mmcore.controller.api import Api, ApiError
from mmcore.controller.objects import EVENT, MANAGER, Object, ref
from mmcore.controller.statuses import rfc3339

log = logging.getLogger(__name__)

#: Events a second, and how many may come at once; further ones are left out.
_RATE: Final = 5.0
_BURST: Final = 50.0
#: How long the same is not said again of the same object, and of how many that is remembered.
_SILENT_S: Final = 600.0
_REMEMBERED: Final = 10_000


class Events:
    """Writes Events in the background."""

    def __init__(self, api: Api, namespace: str) -> None:
        """``namespace`` takes the Events on objects that are in none."""
        self._api = api
        self._namespace = namespace
        self._said: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = _BURST
        self._at = 0.0

    def warn(self, item: Object, reason: str, message: str) -> None:
        """Tell of something that a user can mend."""
        self._tell(item, "Warning", reason, message)

    def tell(self, item: Object, reason: str, message: str) -> None:
        """Tell of something that went as wanted."""
        self._tell(item, "Normal", reason, message)

    async def close(self) -> None:
        """Wait for what is being written."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    def _tell(self, item: Object, kind: str, reason: str, message: str) -> None:
        now = asyncio.get_running_loop().time()
        said = (item["metadata"].get("uid", ""), reason, message)
        if now - self._said.get(said, -_SILENT_S) < _SILENT_S or not self._may(now):
            return
        self._said[said] = now
        self._said.move_to_end(said)
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)
        task = asyncio.get_running_loop().create_task(self._write(item, kind, reason, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _may(self, now: float) -> bool:
        self._left = min(_BURST, self._left + (now - self._at) * _RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    async def _write(self, item: Object, kind: str, reason: str, message: str) -> None:
        where, now = ref(item), rfc3339(datetime.now(UTC))
        namespace = where.namespace or self._namespace
        event = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": f"{where.name}.{uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": item["apiVersion"],
                "kind": item["kind"],
                "name": where.name,
                "namespace": where.namespace or namespace,
                "uid": item["metadata"].get("uid", ""),
                "resourceVersion": item["metadata"].get("resourceVersion", ""),
            },
            "type": kind,
            "reason": reason,
            "message": message[:1024],
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "reportingInstance": socket.gethostname(),
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._api.create(EVENT, event)
        except ApiError as error:
            log.debug("an event on %s was not written: %s", where, error)
