"""Answers what is asked under ``/dashboard``: the page's files, and JSON at ``/dashboard/api/``.

Every answer has an ETag, and a question that names it gets 304: a page asks every few seconds. Nothing here changes
anything; the page's test requests go to ``/v2`` like everybody's.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

import orjson

import mmcore
from mmcore.errors import NotFound
from mmcore.registry import InstanceRecord, Registry
from mmcore.routing import Registered, Router
from mmcore.server.access import Access
from mmcore.server.calls import Waiting
from mmcore.server.dashboard.events import Event, Events
from mmcore.server.dashboard.listing import STATES, Asked, InUse, Listing
from mmcore.server.dashboard.merging import events_of, row_of, shown, summary_of
from mmcore.server.dashboard.recent import LOOK_S, Recent
from mmcore.server.dashboard.siblings import ALONE, Heard, Siblings
from mmcore.server.rest.answers import HttpAnswer, metadata_of
from mmcore.server.rest.request import JSON, Request

ROOT: Final = "/dashboard"

_FOLDER: Final = Path(__file__).with_name("page")
_FILES: Final = {
    "": ("index.html", b"text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", b"text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", b"text/javascript; charset=utf-8"),
    "/shown.js": ("shown.js", b"text/javascript; charset=utf-8"),
    "/infer.js": ("infer.js", b"text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", b"image/svg+xml"),
}
#: The page is made of its own files alone, and asks nobody but this instance.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)

#: Events, failures and instances in one answer.
_MOST_EVENTS: Final = 200
_FAILURES_TOLD: Final = 50
_MOST_INSTANCES: Final = 1000

Query = dict[str, str]


class Shown(NamedTuple):
    """What is looked at; ``record`` tells what this instance is itself, ``ready`` whether it takes requests.

    ``siblings`` are the other workers of the same command; None: there are none.
    """

    registry: Registry
    router: Router
    registered: Registered
    events: Events
    recent: Recent
    record: Callable[[], InstanceRecord]
    ready: Callable[[], bool]
    siblings: Siblings | None = None


class Dashboard:
    """The handler of every path that begins with :data:`ROOT`; ``access`` guards what is told, None: nothing does."""

    def __init__(self, parts: Shown, access: Access | None = None) -> None:
        self._parts = parts
        self._access = access
        self._listing = Listing(parts.registry, parts.router, parts.registered, parts.recent)
        self._waiting = Waiting()

    def handle(self, request: Request) -> None:
        """Answer one request, now or later."""
        path, _, query = request.target.partition("?")
        below = path.removeprefix(ROOT).rstrip("/")
        if request.method not in ("GET", "HEAD"):
            request.fail(405, f"{path} takes GET, got {request.method}", ((b"allow", b"GET"),))
        elif below in _FILES:
            name, content_type = _FILES[below]
            _send(request, _file(name), content_type)
        elif below.startswith("/api/"):
            work = self._answer(request, below.removeprefix("/api/"), dict(parse_qsl(query)))
            self._waiting.start(HttpAnswer(request), work, "dashboard")
        else:
            request.fail(404, f"no such path: {path}")

    async def _answer(self, request: Request, path: str, query: Query) -> None:
        if self._access is not None:
            self._access.manage("the dashboard", metadata_of(request))
        self._parts.recent.watch()
        _send(request, orjson.dumps(await self._told(path, query)), JSON)

    def _told(self, path: str, query: Query) -> Coroutine[Any, Any, dict[str, Any]]:
        """What a path of the API tells.

        Raises:
            NotFound: there is no such path.
        """
        match path.split("/"):
            case ["summary"]:
                return self._summary()
            case ["models"]:
                return self._models(query)
            case ["models", name]:
                return self._model(unquote(name))
            case ["instances"]:
                return self._instances()
            case ["events"]:
                return self._events()
        raise NotFound(f"no such path: {ROOT}/api/{path}")

    async def heard(self, question: bytes) -> bytes:
        """What this worker tells another one that asks by :class:`Siblings`.

        Raises:
            NotFound: it is asked for what nobody tells.
        """
        self._parts.recent.watch()
        asked = orjson.loads(question)
        told: Any
        match asked["what"]:
            case "summary":
                told = self._own_summary()
            case "in use":
                # orjson takes no subclass of tuple.
                told = [tuple(one) for one in await self._listing.in_use(Asked.of(asked["query"]))]
            case "rows":
                told = [self._listing.row(name) for name in asked["names"]]
            case "model":
                told = self._own_model(asked["name"])
            case "events":
                told = self._own_events()
            case other:
                raise NotFound(f"{other!r} is told by nobody")
        return orjson.dumps(told)

    async def _ask(self, what: str, **more: Any) -> Heard:
        siblings = self._parts.siblings
        return ALONE if siblings is None else await siblings.ask(what, **more)

    async def _summary(self) -> dict[str, Any]:
        """The instance as a whole, all of its workers, and its last quarter of an hour."""
        heard = await self._ask("summary")
        own = self._own_summary()
        told = summary_of(own, heard.answers) if heard.answers else {**own, "loaded": len(own["loaded_names"])}
        del told["loaded_names"]
        return {**told, "workers": sorted([own["instance"], *heard.answers]), "missing": heard.missing}

    async def _models(self, query: Query) -> dict[str, Any]:
        """A page of the table."""
        asked = Asked.of(query)
        heard = await self._ask("in use", query=query)
        elsewhere = defaultdict[str, list[InUse]](list)
        for answer in heard.answers.values():
            for one in answer:
                elsewhere[one[0]].append(InUse(*one))
        page = await self._listing.page(asked, elsewhere)
        names = page["models"]
        rows = [[self._listing.row(name)] for name in names]
        if heard.answers and names:
            for others in (await self._ask("rows", names=names)).answers.values():
                for row, other in zip(rows, others, strict=True):
                    row.append(other)
        return {**page, "models": [shown(row_of(row, STATES) if len(row) > 1 else row[0]) for row in rows]}

    def _own_summary(self) -> dict[str, Any]:
        parts = self._parts
        cache, registry = parts.router.cache, parts.registry
        looks = list(parts.recent.looks)
        return {
            "instance": registry.instance,
            "version": mmcore.__version__,
            "ready": parts.ready(),
            "leader": registry.leader,
            "registry_connected": registry.connected,
            "instances": len({registry.instance, *registry.instances}),
            "models": len(parts.router.table) + len(registry.models) - parts.registered.held_models,
            "loaded_names": sorted({copy.name for copy in parts.router.copies()}),
            "loading": cache.loading,
            "failed": len(cache.failures),
            "capacity_bytes": cache.capacity_bytes,
            "used_bytes": cache.used_bytes,
            "evictions": cache.room.evictions,
            "in_flight": parts.record().in_flight,
            "every_s": LOOK_S,
            "history": {
                field: [None if (value := getattr(look, field)) is None else round(value, 3) for look in looks]
                for field in ("requests_per_s", "failures_per_s", "p50_ms", "p99_ms")
            },
            "failures": [
                {"model": name, "version": version, "reason": reason}
                for name, version, reason in cache.failures.told(_FAILURES_TOLD)
            ],
        }

    async def _model(self, name: str) -> dict[str, Any]:
        """One model, and its life as far as this instance and its workers remember it."""
        own = self._parts.registry.instance
        heard = await self._ask("model", name=name)
        parts = {own: self._own_model(name), **heard.answers}
        events = events_of({instance: part["events"] for instance, part in parts.items()}, _MOST_EVENTS)
        models = {instance: part["model"] for instance, part in parts.items() if part["model"] is not None}
        if not models and not events:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        told = None
        if models:
            told = shown(row_of(list(models.values()), STATES) if len(models) > 1 else next(iter(models.values())))
            told["versions"] = [
                {"instance": instance, **version} for instance, model in models.items() for version in model["versions"]
            ]
        return {"instance": own, "model": told, "events": events}

    def _own_model(self, name: str) -> dict[str, Any]:
        events = [_plain(event) for event in self._parts.events.latest(_MOST_EVENTS, name)]
        return {"model": self._listing.whole(name), "events": events}

    async def _events(self) -> dict[str, Any]:
        """The last events of all models."""
        heard = await self._ask("events")
        own = {self._parts.registry.instance: self._own_events()}
        return {"events": events_of({**own, **heard.answers}, _MOST_EVENTS)}

    def _own_events(self) -> list[dict[str, Any]]:
        return [_plain(event) for event in self._parts.events.latest(_MOST_EVENTS)]

    async def _instances(self) -> dict[str, Any]:
        """The instances that work together, this one first, as this one knows them."""
        registry = self._parts.registry
        names = [registry.instance, *sorted(name for name in registry.instances if name != registry.instance)]
        told = []
        for name in names[:_MOST_INSTANCES]:
            own = name == registry.instance
            record = self._parts.record() if own else registry.instances.get(name)
            if record is not None:
                told.append(_instance(name, record, own=own, leader=own and registry.leader))
        return {"total": len(names), "instances": told}


def _instance(name: str, record: InstanceRecord, *, own: bool, leader: bool) -> dict[str, Any]:
    fields = (
        "address", "version", "location", "zone", "labels", "started_ms", "capacity_bytes", "used_bytes",
        "unloading_bytes", "models", "loading", "requests_per_minute", "in_flight", "draining",
    )  # fmt: skip
    return {"id": name, "own": own, "leader": leader, **{field: getattr(record, field) for field in fields}}


def _plain(event: Event) -> dict[str, Any]:
    return event._asdict()


@cache
def _file(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


def _send(request: Request, body: bytes, content_type: bytes) -> None:
    """Answer with a body, or with 304 where the client has it already."""
    tag = b'"%b"' % hashlib.blake2b(body, digest_size=12).hexdigest().encode()
    headers = (*_HEADERS, (b"etag", tag))
    if request.headers.get(b"if-none-match") == tag:
        request.send(status=304, content_type=content_type, headers=headers)
    else:
        request.send(body, content_type=content_type, headers=headers)
