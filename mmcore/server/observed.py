"""The metrics port: ``/metrics`` for Prometheus, ``/live``, ``/ready`` and ``/drained`` for Kubernetes, and for support
``/debug/state``.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import mmcore
from mmcore.metrics import CONTENT_TYPE
from mmcore.server.parts import Parts
from mmcore.server.rest import Request
from mmcore.server.scrape import Scrape

#: Models told of in /debug/state, the most recently used first.
_MODELS_TOLD: Final = 1000


class Observed:
    """Answers the requests of the metrics port. ``per_model``: so many models have labels of their own."""

    def __init__(self, parts: Parts, *, per_model: int = 0) -> None:
        self._parts = parts
        self._started = time.time()
        self._scrape = Scrape(parts, per_model=per_model, started=self._started)
        self._waiting: list[Request] = []

    def handle(self, request: Request) -> None:
        """Answer one request."""
        path = request.target.partition("?")[0]
        if request.method not in ("GET", "HEAD"):
            request.fail(405, f"{path} takes GET, got {request.method}", ((b"allow", b"GET"),))
        elif path == "/metrics":
            request.send(self._scrape.text(), content_type=CONTENT_TYPE)
        elif path == "/live":
            request.send(b'{"live":true}')
        elif path == "/ready":
            ready = self._parts.ready()
            request.send(json.dumps({"ready": ready}).encode(), status=200 if ready else 503)
        elif path == "/drained":
            self._waiting.append(request)
        elif path == "/debug/state":
            request.send(json.dumps(self.state(), indent=1).encode())
        else:
            request.fail(404, f"no such path: {path}; there are /metrics, /live, /ready, /drained and /debug/state")

    def drained(self) -> None:
        """Answer those who wait for this instance to have ended its calls: servers that answer for it may end now."""
        for request in self._waiting:
            request.send(b'{"drained":true}')
        self._waiting.clear()

    def state(self) -> dict[str, Any]:
        """The instance's view, for people: what is loaded, how much it takes and what went wrong."""
        router = self._parts.router
        cache = router.cache
        copies = router.copies()[::-1]
        return {
            "instance": self._parts.instance,
            "version": mmcore.__version__,
            "ready": self._parts.ready(),
            "up_s": round(time.time() - self._started, 1),
            "leader": self._parts.registry.leader,
            "registry_connected": self._parts.registry.connected,
            "models": self._parts.models(),
            "capacity_bytes": self._parts.capacity(),
            "used_bytes": cache.used_bytes,
            "connections": {
                "grpc": self._parts.grpc.connections,
                "http": self._parts.rest.connections if self._parts.rest is not None else 0,
            },
            "loaded": [
                {
                    "model": copy.name,
                    "version": copy.version,
                    "bytes": copy.weight,
                    "requests": copy.statistics.snapshot().success.count,
                }
                for copy in copies[:_MODELS_TOLD]
            ],
            "failures": [
                {"model": name, "version": version, "reason": reason}
                for name, version, reason in cache.failures.told(_MODELS_TOLD)
            ],
        }
