"""One serving instance: builds its parts, starts them, says when it is ready, and drains it.

The only place of the serving side that constructs things. What it holds is made in :meth:`Node.start` and given back
in :meth:`Node.drain`, in the opposite order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Final

import mmcore
from mmcore import log as logs
from mmcore.config import ServeSettings
from mmcore.errors import MmcoreError
from mmcore.routing import Router
from mmcore.server.repository import Repository
from mmcore.server.v2 import SERVICE, V2Service
from mmcore.storage import ModelFolder
from mmcore.transport import Server, add_health, add_reflection

log = logging.getLogger(__name__)

#: The services that reflection tells of besides itself.
_SERVICES: Final = (SERVICE, "grpc.health.v1.Health")
#: How many models are loaded at once before the instance is ready.
_PRELOADS_AT_ONCE: Final = 4


class Node:
    """One instance.

    Attributes:
        instance: its id, new at every start.
        grpc: the address its TCP listener is bound to, once started.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.instance = secrets.token_hex(4)
        self.grpc = ""
        self._settings = settings

    async def start(self) -> None:
        """Listen, register the models of the folder and load those asked for; ready when it returns.

        Raises:
            OSError: an address cannot be listened on.
        """
        settings = self._settings
        self._server = Server(settings=settings.transport)
        self._router = Router(capacity_bytes=settings.capacity_bytes)
        self._repository = Repository(self._router)
        self._service = V2Service(self._router, self._repository, server_name=settings.server_name)
        self._service.register(self._server)
        self._health = add_health(self._server)
        self._set_serving(serving=False)
        # Descriptors are read when the first reflection call asks, not at start.
        from mmcore import pb

        add_reflection(self._server, pb.descriptor_protos(), list(_SERVICES))
        self._folder = ModelFolder(settings.models) if settings.models else None
        self.grpc = await self._server.listen_tcp(settings.host, settings.grpc_port)
        if settings.uds:
            await self._server.listen_unix(str(settings.uds))
        await self._preload(settings.preload)
        self._set_serving(serving=True)

    def ready_line(self) -> str:
        """What is printed when the instance is ready: one line of JSON."""
        ready: dict[str, str | int] = {"event": "ready", "grpc": self.grpc}
        if self._settings.uds:
            ready["uds"] = str(self._settings.uds)
        return json.dumps(ready | {"instance": self.instance, "models": len(self._router.names())})
