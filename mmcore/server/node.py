"""One serving instance: builds its parts, starts them, says when it is ready, and drains it.

The only place of the serving side that constructs things. What :meth:`Node.start` makes, :meth:`Node.drain` gives back
in the opposite order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
from collections.abc import Callable
from typing import Final

import mmcore
from mmcore import log as logs
from mmcore import pb
from mmcore.config import ServeSettings
from mmcore.errors import Unavailable
from mmcore.routing import Router
from mmcore.runtimes.isolation import policy_loader
from mmcore.server.allocator import keep_freed_memory
from mmcore.server.v2 import SERVICE, V2Service
from mmcore.storage import ModelFolder
from mmcore.transport import Server, add_health, add_reflection

log = logging.getLogger(__name__)

#: The services that reflection tells of.
_SERVICES: Final = (SERVICE, "grpc.health.v1.Health")


class Node:
    """One instance.

    Attributes:
        instance: its id, new at every start.
        addresses: where it listens, by kind: ``grpc``, and ``uds`` where it has been told to.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.instance = secrets.token_hex(4)
        self.addresses: dict[str, str] = {}
        self._settings = settings
        self._server = Server(settings=settings.transport)
        self._health = add_health(self._server)
        self._router = Router(
            capacity_bytes=settings.capacity_bytes,
            folder=ModelFolder(settings.models) if settings.models else None,
            load=policy_loader(settings.isolate),
        )
        self._service = V2Service(
            self._router,
            server_name=settings.server_name,
            response_cache_bytes=settings.response_cache_bytes,
        )
        self._service.register(self._server)
        add_reflection(self._server, pb.descriptor_protos(), list(_SERVICES))
        self._set_serving(serving=False)

    async def start(self) -> None:
        """Register the models of the folder, listen, load what is to be loaded; ready when it returns.

        Raises:
            Unavailable: an address cannot be listened on; the text tells which option to change.
        """
        settings = self._settings
        await self._router.start()
        try:
            self.addresses["grpc"] = await self._server.listen_tcp(settings.host, settings.grpc_port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise Unavailable(
                f"cannot listen on {settings.host}:{settings.grpc_port}: {reason}; "
                "choose another --host or --grpc-port (0 picks a free port)"
            ) from error
        if settings.uds:
            try:
                self.addresses["uds"] = (await self._server.listen_unix(str(settings.uds))).removeprefix("unix:")
            except OSError as error:
                raise Unavailable(f"cannot listen on {settings.uds}: {error}; choose another --uds") from error
        await self._preload()
        self._set_serving(serving=True)

    def ready_line(self) -> str:
        """What is printed when the instance is ready: one line of JSON."""
        return json.dumps(
            {"event": "ready", **self.addresses, "instance": self.instance, "models": len(self._router.names())},
            separators=(",", ":"),
        )

    async def drain(self) -> None:
        """Take nothing new, finish what is under way within the grace, and let go of everything."""
        self._set_serving(serving=False)
        self._health.close()
        self._service.drain()
        await self._server.drain(self._settings.grace_s)
        await self._router.close()

    def _set_serving(self, *, serving: bool) -> None:
        self._service.ready = serving
        for service in ("", SERVICE):
            self._health.set(service, serving)

    async def _preload(self) -> None:
        """Load the models asked for; one that fails is logged and does not keep the others from being served."""
        for name, error in (await self._router.preload(self._settings.preload)).items():
            log.error("model %s was not preloaded: %s", name, error)


def run(settings: ServeSettings) -> int:
    """Run one instance until it is told to end; the exit code: 0 drained, 1 failed or ended at once."""
    keep_freed_memory()
    logs.configure(settings.log_level)
    log.info("mmcore %s, capacity %d bytes", mmcore.__version__, settings.capacity_bytes)
    with asyncio.Runner(loop_factory=_loop_factory(settings.event_loop)) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: ServeSettings) -> int:
    node = Node(settings)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if told.is_set():
            log.warning("ending at once")
            # Threads may be inside a model that never returns; nothing of this process is worth waiting for.
            logging.shutdown()
            os._exit(1)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    starting = loop.create_task(node.start(), name="start")
    ending = loop.create_task(told.wait(), name="wait for a signal")
    await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        try:
            starting.result()
        except BaseException:
            ending.cancel()
            await node.drain()
            raise
        print(node.ready_line(), flush=True)
        await ending
    else:
        starting.cancel()
        await asyncio.wait([starting])
    log.info("draining, for %g seconds at most", settings.grace_s)
    await node.drain()
    return 0


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
