"""The standard health service, ``grpc.health.v1`` (grpc/doc/health-checking.md)."""

from __future__ import annotations

import asyncio

from mmcore._ext.h2server import ServerCall
from mmcore.errors import InvalidRequest, NotFound, Unavailable
from mmcore.pb.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse
from mmcore.transport.server import Server
from mmcore.transport.streams import StreamCall


class Health:
    """What each service's health is; ``""`` stands for the whole server."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed: set[asyncio.Event] = set()
        self._closed = False

    def set(self, service: str, serving: bool) -> None:
        """Note a service's health and tell those who watch."""
        self._serving[service] = serving
        for event in self._changed:
            event.set()

    def close(self) -> None:
        """End the watches: a client keeps one open for as long as it lives, which must not hold up a drain."""
        self._closed = True
        for event in self._changed:
            event.set()

    def _response(self, service: str) -> HealthCheckResponse:
        serving = self._serving.get(service)
        if serving is None:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    def check(self, call: ServerCall, body: bytes) -> bytes:
        """``Check``: NOT_FOUND for a service nobody has named."""
        service = _service(body)
        if service not in self._serving:
            raise NotFound(f"unknown service {service!r}")
        return self._response(service).SerializeToString()

    def list_all(self, call: ServerCall, body: bytes) -> bytes:
        """``List``: every service's health."""
        return HealthListResponse(
            statuses={service: self._response(service) for service in self._serving}
        ).SerializeToString()

    async def watch(self, call: StreamCall) -> None:
        """``Watch``: the health now and after each change; SERVICE_UNKNOWN until a service is named."""
        request = await anext(call, None)
        if request is None:
            raise InvalidRequest("Watch takes one HealthCheckRequest, none was sent")
        service = _service(request)
        changed = asyncio.Event()
        self._changed.add(changed)
        told: HealthCheckResponse | None = None
        try:
            while True:
                changed.clear()
                current = self._response(service)
                if current != told:
                    told = current
                    await call.send(current.SerializeToString())
                if self._closed:
                    raise Unavailable("the server is shutting down")
                await changed.wait()
        finally:
            self._changed.discard(changed)


def _service(body: bytes) -> str:
    try:
        return HealthCheckRequest.FromString(body).service
    except Exception as error:  # protobuf's DecodeError has no stable home across its versions
        raise InvalidRequest(f"not a HealthCheckRequest: {error}") from error


def add_health(server: Server) -> Health:
    """Serve ``grpc.health.v1.Health``; its answers are what the returned object is told."""
    health = Health()
    server.add_unary("/grpc.health.v1.Health/Check", health.check)
    server.add_unary("/grpc.health.v1.Health/List", health.list_all)
    server.add_stream("/grpc.health.v1.Health/Watch", health.watch)
    return health
