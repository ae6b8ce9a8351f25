"""The HTTP side: paths, verbs, lists in pages, watches."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import yaml
from aiohttp import web

from tests.apiserver.access import Access, Call, User
from tests.apiserver.answers import Refused
from tests.apiserver.objects import Objects
from tests.apiserver.resources import Resource, Resources
from tests.apiserver.store import Change, Store, Stored

log = logging.getLogger(__name__)

_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_PATH: Final = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_SNAPSHOTS: Final = 64
#: How often a watch that wants bookmarks gets one, and how long before its end.
_BOOKMARK_EVERY_S: Final = 60.0
_BOOKMARK_BEFORE_END_S: Final = 2.0
_WATCH_S: Final = 1800.0
_LARGEST: Final = 3 * 2**20


@dataclass(frozen=True, slots=True)
class _Target:
    resource: Resource
    namespace: str
    name: str
    subresource: str


class ApiServer:
    """``users`` by their tokens; ``cel_rules`` False is a server that is too old for rules in CEL."""

    def __init__(self, users: Mapping[str, User], *, cel_rules: bool = True) -> None:
        self.resources = Resources()
        self.store = Store()
        self._objects = Objects(self.resources, self.store, cel_rules=cel_rules)
        self._access = Access(self.resources, self.store)
        self._users = users
        self._minor = "33" if cel_rules else "22"
        self._snapshots: OrderedDict[str, tuple[list[Stored], int]] = OrderedDict()
        self._watches: set[asyncio.Task[Any]] = set()
        #: Requests so far by user and by method and plural; watches have a method of their own.
        self._counts: dict[str, dict[str, int]] = {}

    def app(self) -> web.Application:
        """To be served by aiohttp."""
        app = web.Application(client_max_size=_LARGEST)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except Refused as refused:
            return _json(refused.status(), refused.code)
        except Exception as error:
            log.exception("%s %s", request.method, request.path_qs)
            return _json(Refused(500, "InternalError", f"{type(error).__name__}: {error}").status(), 500)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if path in ("/readyz", "/livez", "/healthz"):
            return web.Response(text="ok")
        user = self._user(request)
        if path == "/version":
            return _json({"major": "1", "minor": self._minor, "gitVersion": f"v1.{self._minor}.0"})
        if path == "/testing/expire" and request.method == "POST":
            self.expire()
            return _json({})
        if path == "/testing/requests":
            return _json(self._counts)
        found = _PATH.fullmatch(path)
        if found is None:
            return self._discovery(path)
        target = self._target(found)
        self._count(user, request, target)
        if request.method == "GET":
            return await self._get(request, user, target)
        data = await request.read()
        body = _body(data, request.content_type)
        return self._write(request, user, target, body)

    def expire(self) -> None:
        """End all watches, and know no version older than now, as after a compaction."""
        self.store.forget()
        self._snapshots.clear()
        for watch in list(self._watches):
            watch.cancel()

    def _count(self, user: User, request: web.Request, target: _Target) -> None:
        method = "WATCH" if request.query.get("watch") else request.method
        counts = self._counts.setdefault(user.name, {})
        what = f"{method} {target.resource.plural}"
        counts[what] = counts.get(what, 0) + 1

    def _user(self, request: web.Request) -> User:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        user = self._users.get(token) if scheme == "Bearer" else None
        if user is None:
            raise Refused(401, "Unauthorized", "Unauthorized")
        return user

    def _target(self, found: re.Match[str]) -> _Target:
        group, version = found["group"] or "", found["version"]
        api_version = f"{group}/{version}" if group else version
        plural, namespace, name, sub = (found[one] or "" for one in ("plural", "namespace", "name", "sub"))
        if not group and plural in ("status", "finalize"):
            # Of a namespace itself: /api/v1/namespaces/NAME/status.
            plural, namespace, name, sub = "namespaces", "", namespace, plural
        resource = self.resources.get(api_version, plural)
        if resource is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return _Target(resource, namespace, name, sub)

    def _discovery(self, path: str) -> web.Response:
        root, _, api_version = path.lstrip("/").partition("/")
        listed = self.resources.of(api_version) if root in ("api", "apis") and api_version else []
        if not listed or (root == "api") != ("/" not in api_version):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        entries = []
        for one in listed:
            names = [one.plural, f"{one.plural}/status"] if one.has_status else [one.plural]
            entries += [{"name": name, "kind": one.kind, "namespaced": one.namespaced, "verbs": []} for name in names]
        return _json({"kind": "APIResourceList", "groupVersion": api_version, "resources": entries})

    # Reading.

    async def _get(self, request: web.Request, user: User, target: _Target) -> web.StreamResponse:
        resource, query = target.resource, request.query
        if target.name:
            self._allow(user, "get", target)
            stored = self._objects.read(resource, (target.namespace, target.name))
            return web.Response(body=stored.data, content_type="application/json")
        verb = "watch" if query.get("watch") in ("true", "1") else "list"
        fields = _pairs(query.get("fieldSelector", ""))
        self._access.check(user, Call(verb, resource, target.namespace, fields.get("metadata.name", "")))
        chosen = _selector(query.get("labelSelector", ""), fields)
        if verb == "watch":
            return await self._watch(request, target, chosen)
        return self._list(query, target, chosen)

    def _list(self, query: Mapping[str, str], target: _Target, chosen: Callable[[Stored], bool]) -> web.Response:
        token = query.get("continue", "")
        if token:
            if token not in self._snapshots:
                raise Refused(410, "Expired", "The provided continue parameter is too old")
            left, version = self._snapshots[token]
        else:
            left = [one for one in self.store.all(target.resource, target.namespace) if chosen(one)]
            version = self.store.version
        limit = int(query.get("limit") or 0) or len(left)
        page, left = left[:limit], left[limit:]
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if left:
            number = f"{version}/{page[-1].item['metadata'].get('namespace', '')}/{page[-1].item['metadata']['name']}"
            following = base64.urlsafe_b64encode(f"{number}/{target.resource.plural}".encode()).decode()
            self._snapshots[following] = (left, version)
            if len(self._snapshots) > _SNAPSHOTS:
                self._snapshots.popitem(last=False)
            metadata |= {"continue": following, "remainingItemCount": len(left)}
        head = orjson.dumps(
            {
                "kind": f"{target.resource.kind}List",
                "apiVersion": target.resource.api_version,
                "metadata": metadata,
            }
        )
        data = head[:-1] + b',"items":[' + b",".join(one.data for one in page) + b"]}"
        return web.Response(body=data, content_type="application/json")

    async def _watch(
        self, request: web.Request, target: _Target, chosen: Callable[[Stored], bool]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await self._send_changes(request, answer, target, chosen)
        except (asyncio.CancelledError, ConnectionError):
            if task.cancelling():
                # Ended by expire, or with the connection.
                task.uncancel()
        finally:
            self._watches.discard(task)
        return answer

    async def _send_changes(
        self, request: web.Request, answer: web.StreamResponse, target: _Target, chosen: Callable[[Stored], bool]
    ) -> None:
        query, resource = request.query, target.resource
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + float(query.get("timeoutSeconds") or _WATCH_S)
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        bookmark_at = min(loop.time() + _BOOKMARK_EVERY_S, ends_at - _BOOKMARK_BEFORE_END_S)
        version = int(query.get("resourceVersion") or 0)
        if not version:
            version = self.store.version
            for stored in self.store.all(resource, target.namespace):
                if chosen(stored):
                    await answer.write(_event("ADDED", stored.data))
        while (now := loop.time()) < ends_at:
            try:
                changes = self.store.since(resource, version)
            except Refused as refused:
                await answer.write(_event("ERROR", orjson.dumps(refused.status())))
                return
            told = [line for change in changes if (line := _told(change, target.namespace, chosen))]
            if told:
                await answer.write(b"".join(told))
            if changes:
                version = changes[-1].version
                continue
            if bookmarks and now >= bookmark_at:
                version = max(version, self.store.version)
                mark = {
                    "kind": resource.kind,
                    "apiVersion": resource.api_version,
                    "metadata": {"resourceVersion": str(version), "creationTimestamp": None},
                }
                await answer.write(_event("BOOKMARK", orjson.dumps(mark)))
                bookmark_at = now + _BOOKMARK_EVERY_S
            until = min(ends_at, bookmark_at) if bookmarks else ends_at
            await self.store.wait(resource, version, until - now)

    # Writing.

    def _write(self, request: web.Request, user: User, target: _Target, body: Any) -> web.Response:
        resource, key = target.resource, (target.namespace, target.name)
        manager = request.query.get("fieldManager") or request.headers.get("User-Agent", "").partition("/")[0]
        if request.method == "POST" and not target.name:
            self._allow(user, "create", target)
            stored = self._objects.create(resource, target.namespace, body, manager)
            if resource.kind == "CustomResourceDefinition":
                self.resources.define(stored.item)
            return _stored(stored, 201)
        if request.method == "PUT" and resource.kind == "Namespace" and target.subresource == "finalize":
            self._allow(user, "update", target)
            return _stored(self._objects.finalize(resource, key, body))
        if not target.name or target.subresource not in ("", "status"):
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        if target.subresource and not resource.has_status:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if request.method == "PUT":
            self._allow(user, "update", target)
            return _stored(self._objects.replace(resource, key, body, manager, target.subresource))
        if request.method == "PATCH":
            return self._patch(request, user, target, body, manager)
        if request.method == "DELETE":
            self._allow(user, "delete", target)
            kept = self._objects.delete(resource, key, body or {})
            return (
                _stored(kept)
                if kept is not None
                else _json({"kind": "Status", "apiVersion": "v1", "status": "Success"})
            )
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _patch(self, request: web.Request, user: User, target: _Target, body: Any, manager: str) -> web.Response:
        resource, key = target.resource, (target.namespace, target.name)
        self._allow(user, "patch", target)
        if request.content_type == _MERGE:
            return _stored(self._objects.patch(resource, key, body, manager, target.subresource))
        if request.content_type != _APPLY:
            raise Refused(415, "UnsupportedMediaType", f"patches are {_APPLY} or {_MERGE}")
        if not request.query.get("fieldManager"):
            raise Refused(422, "Invalid", "PatchOptions.meta.k8s.io: fieldManager: Required value")
        fresh = self.store.get(resource, key) is None
        if fresh and target.subresource:
            self._objects.read(resource, key)
        if fresh:
            self._allow(user, "create", target)
        force = request.query.get("force") == "true"
        stored = self._objects.apply(resource, key, body, manager, target.subresource, force=force)
        return _stored(stored, 201 if fresh else 200)

    def _allow(self, user: User, verb: str, target: _Target) -> None:
        self._access.check(user, Call(verb, target.resource, target.namespace, target.name, target.subresource))


def _told(change: Change, namespace: str, chosen: Callable[[Stored], bool]) -> bytes:
    """What a watch is told of a change: objects come and go as they begin and cease to be chosen."""
    if namespace and change.after.item["metadata"].get("namespace") != namespace:
        return b""
    was = change.before is not None and chosen(change.before)
    is_now = not change.deleted and chosen(change.after)
    if is_now:
        return _event("MODIFIED" if was else "ADDED", change.after.data)
    return _event("DELETED", change.after.data) if was else b""


def _event(kind: str, data: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), data)


def _pairs(text: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("=") for part in text.split(",") if part)}


def _selector(labels: str, fields: Mapping[str, str]) -> Callable[[Stored], bool]:
    wanted = [part for part in labels.split(",") if part]

    def chosen(stored: Stored) -> bool:
        item = stored.item
        found = item["metadata"].get("labels") or {}
        for part in wanted:
            key, equals, value = part.partition("=")
            if key not in found or (equals and found[key] != value.lstrip("=")):
                return False
        return all(_field(item, path) == value for path, value in fields.items())

    return chosen


def _field(item: Any, path: str) -> str:
    for key in path.split("."):
        item = item.get(key) if isinstance(item, dict) else None
    return "" if item is None else str(item)


def _body(data: bytes, content_type: str) -> Any:
    if not data:
        return None
    try:
        found = yaml.safe_load(data) if content_type == _APPLY and not data.startswith(b"{") else orjson.loads(data)
    except (ValueError, yaml.YAMLError) as error:
        raise Refused(400, "BadRequest", f"the body cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, "BadRequest", "the body is no object")
    return found


def _stored(stored: Stored, code: int = 200) -> web.Response:
    return web.Response(body=stored.data, status=code, content_type="application/json")


def _json(value: Any, code: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=code, content_type="application/json")
