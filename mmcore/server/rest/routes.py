"""Which path is answered by what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import orjson

from mmcore._ext.calls import CallCounters
from mmcore.server.calls import Body, Waiting
from mmcore.server.rest.answers import HttpAnswer, UnaryHandler
from mmcore.server.rest.encodings import TooLong
from mmcore.server.rest.inference import RestInference
from mmcore.server.rest.methods import Methods, NotReady
from mmcore.server.rest.pages import openapi, try_page
from mmcore.server.rest.request import Request
from mmcore.server.v2 import SERVICE

#: Paths in segments, ``*`` for a name that the method is given, ``*:predict`` for one with an ending; and the methods
#: of :class:`Methods` by HTTP method.
ROUTES: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("v2", {"GET": "server_metadata"}),
    ("v2/health/live", {"GET": "live"}),
    ("v2/health/ready", {"GET": "ready"}),
    ("v2/models", {"GET": "models"}),
    ("v2/models/stats", {"GET": "model_statistics"}),
    ("v2/models/*", {"GET": "model_metadata"}),
    ("v2/models/*/ready", {"GET": "model_ready"}),
    ("v2/models/*/config", {"GET": "model_config"}),
    ("v2/models/*/stats", {"GET": "model_statistics"}),
    ("v2/models/*/infer", {"POST": "infer"}),
    ("v2/models/*/versions/*", {"GET": "model_metadata"}),
    ("v2/models/*/versions/*/ready", {"GET": "model_ready"}),
    ("v2/models/*/versions/*/config", {"GET": "model_config"}),
    ("v2/models/*/versions/*/stats", {"GET": "model_statistics"}),
    ("v2/models/*/versions/*/infer", {"POST": "infer"}),
    ("v2/models/*/trace/setting", {"GET": "trace_settings", "POST": "trace_settings"}),
    ("v2/trace/setting", {"GET": "trace_settings", "POST": "trace_settings"}),
    ("v2/logging", {"GET": "log_settings", "POST": "log_settings"}),
    ("v2/repository/index", {"POST": "index"}),
    ("v2/repository/*/index", {"POST": "index"}),
    ("v2/repository/models/*/load", {"POST": "load"}),
    ("v2/repository/models/*/unload", {"POST": "unload"}),
    ("v2/systemsharedmemory/status", {"GET": "region_status"}),
    ("v2/systemsharedmemory/unregister", {"POST": "unregister_region"}),
    ("v2/systemsharedmemory/region/*/status", {"GET": "region_status"}),
    ("v2/systemsharedmemory/region/*/register", {"POST": "register_region"}),
    ("v2/systemsharedmemory/region/*/unregister", {"POST": "unregister_region"}),
    ("v2/cudasharedmemory/status", {"GET": "cuda_status"}),
    ("v2/cudasharedmemory/unregister", {"POST": "unregister_cuda"}),
    ("v2/cudasharedmemory/region/*/status", {"GET": "cuda_status"}),
    ("v2/cudasharedmemory/region/*/register", {"POST": "register_cuda"}),
    ("v2/cudasharedmemory/region/*/unregister", {"POST": "unregister_cuda"}),
    ("v1/models", {"GET": "models"}),
    ("v1/models/*:predict", {"POST": "predict"}),
    ("v1/models/*", {"GET": "model_ready"}),
)

#: What does not ask the service: path to content type and what makes it.
_PAGES: Final[dict[str, tuple[bytes, Callable[[], bytes]]]] = {
    "/openapi.json": (
        b"application/json", lambda: openapi(tuple((path, tuple(methods.items())) for path, methods in ROUTES))
    ),
    "/docs": (b"text/html; charset=utf-8", try_page),
}  # fmt: skip

_INFER: Final = "ModelInfer"
#: What requests are counted under: the gRPC method that they stand for.
_CALLED: Final = {
    "live": "ServerLive",
    "ready": "ServerReady",
    "server_metadata": "ServerMetadata",
    "models": "RepositoryIndex",
    "index": "RepositoryIndex",
    "load": "RepositoryModelLoad",
    "unload": "RepositoryModelUnload",
    "model_ready": "ModelReady",
    "model_metadata": "ModelMetadata",
    "model_config": "ModelConfig",
    "model_statistics": "ModelStatistics",
    "predict": _INFER,
    "infer": _INFER,
    "trace_settings": "TraceSetting",
    "log_settings": "LogSettings",
    "region_status": "SystemSharedMemoryStatus",
    "register_region": "SystemSharedMemoryRegister",
    "unregister_region": "SystemSharedMemoryUnregister",
    "cuda_status": "CudaSharedMemoryStatus",
    "register_cuda": "CudaSharedMemoryRegister",
    "unregister_cuda": "CudaSharedMemoryUnregister",
}

_PATTERNS: Final = tuple((tuple(path.split("/")), methods) for path, methods in ROUTES)


class Routes:
    """The handler of the REST port. ``handler`` gives the gRPC handler of a method's full path.

    Requests are counted in ``counted`` by the gRPC methods' names; ``max_bytes`` is what a body may decompress to.
    ``dashboard`` answers what is below ``/dashboard``, if anything does.
    """

    def __init__(
        self,
        handler: Callable[[str], UnaryHandler],
        max_bytes: int,
        counted: defaultdict[str, CallCounters],
        dashboard: Callable[[Request], None] | None = None,
    ) -> None:
        self._dashboard = dashboard
        self._waiting = Waiting()
        self._methods = Methods(handler, max_bytes)
        self._counted = counted
        self._inference = RestInference(
            partial(handler, f"/{SERVICE}/ModelInfer"), self._methods.describe, self._waiting, max_bytes
        )

    def handle(self, request: Request) -> None:
        """Answer one request, now or later."""
        path = request.target.partition("?")[0]
        segments = path.strip("/").split("/")
        if "%" in path:
            segments = [unquote(segment) for segment in segments]
        match segments:
            case ["v2", "models", name, "infer"] if request.method == "POST":
                request.counters = self._counted[_INFER]
                self._inference.serve(request, name, "")
                return
            case ["v2", "models", name, "versions", version, "infer"] if request.method == "POST":
                request.counters = self._counted[_INFER]
                self._inference.serve(request, name, version)
                return
        if self._dashboard is not None and segments[0] == "dashboard":
            self._dashboard(request)
            return
        wanted = "GET" if request.method == "HEAD" else request.method
        page = _PAGES.get(path)
        if page is not None and wanted == "GET":
            content_type, make = page
            request.send(make(), content_type=content_type)
            return
        methods, names = _find(segments)
        if methods is None and page is None:
            request.fail(404, f"no such path: {path}; /docs has a list of those that there are")
        elif methods is None or wanted not in methods:
            allowed = ", ".join(methods or ("GET",))
            request.fail(405, f"{path} takes {allowed}, got {request.method}", ((b"allow", allowed.encode()),))
        else:
            request.counters = self._counted[_CALLED[methods[wanted]]]
            call = HttpAnswer(request)
            work = getattr(self._methods, methods[wanted])(request, *names)
            self._waiting.start(call, _answered(request, work), methods[wanted])


def _find(segments: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The methods of a path, and the names in it."""
    for pattern, methods in _PATTERNS:
        if len(pattern) == len(segments):
            names = []
            for expected, segment in zip(pattern, segments, strict=True):
                if expected.startswith("*") and segment.endswith(expected[1:]) and len(segment) >= len(expected):
                    names.append(segment.removesuffix(expected[1:]))
                elif expected != segment:
                    break
            else:
                return methods, names
    return None, []


async def _answered(request: Request, work: Coroutine[Any, Any, Any]) -> Body | None:
    """The JSON of what a method answers; it sees itself to an answer that is no 200."""
    try:
        told = await work
    except NotReady as not_ready:
        request.send(orjson.dumps(not_ready.told), status=503)
        return None
    except TooLong as error:
        request.fail(413, str(error))
        return None
    return b"" if told is None else orjson.dumps(told)
