"""What kube-controller-manager does with owners and namespaces, for tests: API servers do not do it themselves.

Objects whose owners are all gone are deleted, and so is what is in a namespace that ends; then the namespace is let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final
from urllib.error import HTTPError

from mmcore.controller.api import Api, ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.objects import (
    AUTOSCALERS,
    CLUSTER_SERVING_RUNTIME,
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGETS,
    EVENT,
    INFERENCE_SERVICE,
    NAMESPACE,
    NETWORK_POLICY,
    POD,
    PREDICTOR,
    SECRET,
    SERVICE,
    SERVING_RUNTIME,
    Kind,
    Ref,
    deleting,
    ref,
)
from tests.api_servers import ApiServer

_OWNERS: Final = (SERVING_RUNTIME, CLUSTER_SERVING_RUNTIME, SERVICE)
_IN_NAMESPACES: Final = (
    PREDICTOR, INFERENCE_SERVICE, SERVING_RUNTIME, DEPLOYMENT, SERVICE, CONFIG_MAP, SECRET, NETWORK_POLICY, POD, EVENT,
)  # fmt: skip
#: What is not followed is looked at so often.
_AGAIN_S: Final = 0.2


class GarbageCollector:
    """Works in the namespaces whose names start so, and on objects of the cluster."""

    def __init__(self, server: ApiServer, namespaces: str) -> None:
        self._server = server
        self._api = Api(server.kubeconfig)
        self._namespaces = namespaces
        self._dirty = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        dependents = [DEPLOYMENT]
        for versions in (AUTOSCALERS, DISRUPTION_BUDGETS):
            kind = await self._api.served(versions)
            dependents += [kind] if kind is not None else []
        self._owners = {kind.name: self._follow(kind) for kind in _OWNERS}
        self._dependents = [self._follow(kind) for kind in dependents]
        namespaces = self._follow(NAMESPACE)
        followed = [*self._owners.values(), *self._dependents, namespaces]
        async with asyncio.TaskGroup() as group:
            for informer in followed:
                group.create_task(informer.run())
            for informer in followed:
                await informer.synced.wait()
            while True:
                self._dirty.clear()
                for informer in self._dependents:
                    await self._collect(informer)
                ending = [where.name for where, item in namespaces.items.items() if deleting(item)]
                mine = [name for name in ending if name.startswith(self._namespaces)]
                left = [name for name in mine if not await self._empty(name, dependents)]
                try:
                    async with asyncio.timeout(_AGAIN_S if left else None):
                        await self._dirty.wait()
                except TimeoutError:
                    continue

    async def close(self) -> None:
        await self._api.close()

    def _follow(self, kind: Kind) -> Informer:
        return Informer(self._api, kind, lambda before, after: self._dirty.set())

    async def _collect(self, informer: Informer) -> None:
        for where, item in list(informer.items.items()):
            owners = item["metadata"].get("ownerReferences") or []
            if not owners or not where.namespace.startswith(self._namespaces) or deleting(item):
                continue
            if not any([await self._exists(owner, where.namespace) for owner in owners]):
                await self._api.delete(informer.kind, where)

    async def _exists(self, owner: dict[str, str], namespace: str) -> bool:
        informer = self._owners[owner["kind"]]
        where = Ref(namespace if informer.kind.namespaced else "", owner["name"])
        try:
            found = await self._api.get(informer.kind, where)
        except ApiError as error:
            if error.missing:
                return False
            raise
        return bool(found["metadata"]["uid"] == owner["uid"])

    async def _empty(self, namespace: str, dependents: Sequence[Kind]) -> bool:
        """Delete what is in a namespace, and then itself; whether it is gone."""
        left = 0
        for kind in dict.fromkeys((*_IN_NAMESPACES, *dependents)):
            items, _ = await self._api.list(kind, namespace)
            left += len(items)
            for item in items:
                if not deleting(item):
                    await self._api.delete(kind, ref(item))
        if not left:
            path = NAMESPACE.path(name=namespace)
            item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}, "spec": {}}
            try:
                await asyncio.to_thread(self._server.ask, "PUT", f"{path}/finalize", item)
            except HTTPError as error:
                # It is gone, and its watch has not told so yet.
                if error.code != 404:
                    raise
        return not left


@asynccontextmanager
async def collecting(server: ApiServer, namespaces: str) -> AsyncIterator[None]:
    """Collect garbage meanwhile."""
    collector = GarbageCollector(server, namespaces)
    working = asyncio.ensure_future(collector.run())
    try:
        yield
        assert not working.done(), working.result()
    finally:
        working.cancel()
        await asyncio.wait([working])
        await collector.close()
