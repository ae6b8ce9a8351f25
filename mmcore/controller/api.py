"""The API server, asked over the official client's connection: its files, tokens and certificates, objects as they are.

The one place that imports ``kubernetes``. Objects stay dictionaries: ten thousand of them cost less so than as the
client's classes, and fields that those do not know survive.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson

from mmcore.controller.objects import MANAGER, Kind, Object, Ref
from mmcore.errors import InvalidSetting, Unavailable

log = logging.getLogger(__name__)

#: Objects in one answer of a list.
_PAGE: Final = 500
#: How long the server keeps a watch, and how much longer one may then be silent.
_WATCH_S: Final = 300
_WATCH_SLACK_S: Final = 30
_REQUEST_S: Final = 30.0
_CONNECTIONS: Final = 64

_IN_BACKGROUND: Final[Object] = {"propagationPolicy": "Background"}

APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"


class ApiError(Unavailable):
    """The API server refused, with the HTTP status ``code``, or could not be reached, with 0."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def missing(self) -> bool:
        """There is no such object, or no such kind."""
        return self.code == 404

    @property
    def conflict(self) -> bool:
        """It is there already, or has been changed meanwhile."""
        return self.code == 409

    @property
    def gone(self) -> bool:
        """The server does not know that version of its objects any more."""
        return self.code == 410


class Api:
    """One API server. Every method raises :class:`ApiError`."""

    def __init__(self, kubeconfig: Path | None = None) -> None:
        """``kubeconfig`` None takes the pod's own account, or where there is none the usual files."""
        self._kubeconfig = kubeconfig
        self._client: Any = None
        self._session: Any = None
        self._proxy: str | None = None
        self._served: dict[str, bool] = {}
        #: Requests made, by method and plural of the kind; watches are not counted.
        self.requests: Counter[tuple[str, str]] = Counter()

    async def connect(self) -> None:
        """Read where the server is and who we are.

        Raises:
            ApiError: nothing says where it is.
            InvalidSetting: the client of Kubernetes is not installed.
        """
        try:
            import aiohttp
            from kubernetes.aio import client, config
        except ImportError as error:
            raise InvalidSetting(
                f"the controller needs a package that cannot be imported ({error.name}); "
                "install it with: pip install 'mmcore[controller]'"
            ) from None
        configuration = client.Configuration()
        configuration.connection_pool_maxsize = _CONNECTIONS
        try:
            if self._kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                path = str(self._kubeconfig) if self._kubeconfig is not None else None
                await config.load_kube_config(config_file=path, client_configuration=configuration)
        except config.ConfigException as error:
            raise ApiError(0, f"no API server is configured: {error}") from None
        await self.close()
        self._client = client.ApiClient(configuration)
        rest = self._client.rest_client
        # The client's own session looks for proxies and passwords in the environment before each request, by a thread.
        self._session = aiohttp.ClientSession(connector=rest.pool_manager.connector, connector_owner=False)
        self._proxy = rest.proxy or _proxy_of_environment(configuration.host)

    async def close(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            await self._session.close()
            await client.close()

    async def get(self, kind: Kind, where: Ref) -> Object:
        """One object."""
        return await self._ask("GET", kind, kind.path(where.namespace, where.name))

    async def list(self, kind: Kind, namespace: str = "", **selectors: str) -> tuple[list[Object], str]:
        """All objects of a kind that ``fieldSelector`` and ``labelSelector`` choose, and the version of the list."""
        items: list[Object] = []
        query = {"limit": str(_PAGE), **{name: value for name, value in selectors.items() if value}}
        while True:
            page = await self._ask("GET", kind, kind.path(namespace), query=query)
            for item in page.get("items") or []:
                # Lists leave out what their own kind tells.
                items.append({"apiVersion": kind.api_version, "kind": kind.name, **item})
            more = page["metadata"].get("continue")
            if not more:
                return items, page["metadata"]["resourceVersion"]
            query["continue"] = more

    async def watch(
        self, kind: Kind, namespace: str, version: str, **selectors: str
    ) -> AsyncIterator[tuple[str, Object]]:
        """Changes since ``version``: ADDED, MODIFIED, DELETED or BOOKMARK, and the object; the server ends it."""
        chosen = {name: value for name, value in selectors.items() if value}
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_S),
            **chosen,
        }
        async with await self._open(
            "GET", kind.path(namespace), query=query, silent_s=_WATCH_S + _WATCH_SLACK_S
        ) as answer:
            if answer.status >= 400:
                raise _error(answer.status, await answer.read())
            async for line in _lines(answer.content):
                event = orjson.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(int(event["object"].get("code") or 500), str(event["object"].get("message")))
                yield event["type"], event["object"]

    async def create(self, kind: Kind, item: Object) -> Object:
        """Make a new object."""
        return await self._ask("POST", kind, kind.path(item["metadata"].get("namespace", "")), body=item)

    async def replace(self, kind: Kind, item: Object) -> Object:
        """Write a whole object over the version that it was read as."""
        metadata = item["metadata"]
        return await self._ask("PUT", kind, kind.path(metadata.get("namespace", ""), metadata["name"]), body=item)

    async def apply(self, kind: Kind, item: Object) -> Object:
        """Have an object be so, made or changed; fields that others manage and it does not name stay as they are."""
        metadata = item["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": MANAGER, "force": "true"}
        return await self._ask("PATCH", kind, path, query=query, body=item, content=APPLY)

    async def patch(self, kind: Kind, where: Ref, change: Object, subresource: str = "") -> Object:
        """Merge a change into an object (RFC 7386); with a resourceVersion in it only into that version."""
        path = kind.path(where.namespace, where.name, subresource)
        return await self._ask("PATCH", kind, path, query={"fieldManager": MANAGER}, body=change, content=MERGE)

    async def delete(self, kind: Kind, where: Ref) -> None:
        """Delete an object, and in the background what it owns; one that is not there is no error."""
        try:
            await self._ask("DELETE", kind, kind.path(where.namespace, where.name), body=_IN_BACKGROUND)
        except ApiError as error:
            if not error.missing:
                raise

    async def served(self, kinds: Sequence[Kind]) -> Kind | None:
        """The first of these kinds that the server has."""
        for kind in kinds:
            if await self._has(kind):
                return kind
        return None

    async def _has(self, kind: Kind) -> bool:
        known = f"{kind.api_version}/{kind.plural}"
        if known not in self._served:
            root = kind.path().removesuffix("/" + kind.plural)
            try:
                found = await self._ask("GET", kind, root)
            except ApiError as error:
                if error.missing:
                    return False
                raise
            if any(entry["name"] == kind.plural for entry in found.get("resources") or []):
                # Kept only where it is: what is missing may be installed later.
                self._served[known] = True
            else:
                return False
        return True

    async def _ask(
        self,
        method: str,
        kind: Kind,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
    ) -> Object:
        self.requests[method, kind.plural] += 1
        for last_try in (False, True):
            async with await self._open(method, path, query=query, body=body, content=content) as answer:
                data = await answer.read()
            if answer.status == 401 and not last_try:
                # A token has run out: what it came from knows the next one.
                await self.connect()
                continue
            break
        if answer.status >= 400:
            raise _error(answer.status, data)
        found: Object = orjson.loads(data) if data else {}
        return found

    async def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        silent_s: float | None = None,
    ) -> Any:
        import aiohttp

        if self._client is None:
            await self.connect()
        headers = {"Accept": "application/json", "Content-Type": content, "User-Agent": MANAGER}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        rest = self._client.rest_client
        timeout = aiohttp.ClientTimeout(total=None if silent_s else _REQUEST_S, sock_read=silent_s, sock_connect=10)
        extra = {"server_hostname": rest.server_hostname} if rest.server_hostname else {}
        try:
            return await self._session.request(
                method,
                url,
                data=orjson.dumps(body) if body is not None else None,
                headers=headers,
                timeout=timeout,
                proxy=self._proxy,
                **extra,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, f"the API server does not answer: {error or type(error).__name__}") from error


def _proxy_of_environment(host: str) -> str | None:
    parts = urlsplit(host)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


async def _lines(content: Any) -> AsyncIterator[bytes]:
    """Lines of any length, which the stream's own reader limits; a stream that breaks off ends."""
    import aiohttp

    left = b""
    try:
        async for chunk, _ in content.iter_chunks():
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                if line:
                    yield line
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
        log.debug("a watch broke off: %s", error)


def _error(code: int, data: bytes) -> ApiError:
    try:
        message = str(orjson.loads(data)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = data[:200].decode(errors="replace")
    return ApiError(code, message or f"the API server answered {code}")
