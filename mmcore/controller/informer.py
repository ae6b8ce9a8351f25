"""The objects of a kind as the API server has them, kept in step by a watch."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from typing import Final

from mmcore.controller.api import Api, ApiError
from mmcore.controller.objects import Kind, Object, Ref, at, ref

log = logging.getLogger(__name__)

#: Called with an object as it was and as it is; None before it was made and after it is gone.
Changed = Callable[[Object | None, Object | None], None]

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 30.0
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


class Informer:
    """The objects of one kind.

    Attributes:
        items: the objects by where they are, without what only servers and clients use.
        synced: set when all of them are known; of a kind that the server does not have, there are none. One that it
            does not have any more has those that it had.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        changed: Changed,
        *,
        namespace: str = "",
        field_selector: str = "",
        label_selector: str = "",
    ) -> None:
        self.items: dict[Ref, Object] = {}
        self.synced = asyncio.Event()
        self.kind: Final = kind
        self._api = api
        self._changed = changed
        self._namespace = namespace
        self._selectors = {"fieldSelector": field_selector, "labelSelector": label_selector}
        self._names: dict[str, set[str]] = {}

    def get(self, namespace: str, name: str) -> Object | None:
        """One object, None where there is none."""
        return self.items.get(Ref(namespace, name))

    def of(self, namespace: str) -> Iterator[Object]:
        """The objects of one namespace; not to be changed while they are gone through."""
        for name in self._names.get(namespace, ()):
            yield self.items[Ref(namespace, name)]

    async def run(self) -> None:
        """Follow the server until cancelled: list, watch, and list again only where the server asks for it."""
        pause = _FIRST_PAUSE_S
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list()
                    self.synced.set()
                version = await self._watch(version)
                pause = _FIRST_PAUSE_S
                continue
            except ApiError as error:
                if error.gone:
                    version = ""
                    continue
                if error.missing:
                    # A server that has just started may not know its custom resources yet. What was there is taken to
                    # be there: else all models would be let go, and all pods.
                    version = ""
                    self.synced.set()
                quiet = error.missing and not self.items
                log.log(logging.DEBUG if quiet else logging.WARNING, "cannot follow %s: %s", self.kind.plural, error)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def put(self, item: Object) -> None:
        """Take over what the server answered to a change of ours to the version that was known.

        Nobody is told, now or when the watch brings it: who made the change knows.
        """
        where = ref(item)
        known = self.items.get(where)
        if known is not None and _newer(item, known):
            self.items[where] = _trimmed(item)

    async def _list(self) -> str:
        items, version = await self._api.list(self.kind, self._namespace, **self._selectors)
        self._take(items)
        return version

    def _take(self, items: list[Object]) -> None:
        gone = self.items.keys() - {ref(item) for item in items}
        for where in gone:
            self._drop(where)
        for item in items:
            self._set(ref(item), item)

    async def _watch(self, version: str) -> str:
        async for kind, item in self._api.watch(self.kind, self._namespace, version, **self._selectors):
            version = item["metadata"]["resourceVersion"]
            if kind == "BOOKMARK":
                continue
            if kind == "DELETED":
                self._drop(ref(item))
            else:
                self._set(ref(item), item)
        return version

    def _set(self, where: Ref, item: Object) -> None:
        before = self.items.get(where)
        if before is not None and at(before, "metadata", "resourceVersion") == item["metadata"]["resourceVersion"]:
            return
        self.items[where] = _trimmed(item)
        self._names.setdefault(where.namespace, set()).add(where.name)
        self._changed(before, item)

    def _drop(self, where: Ref) -> None:
        before = self.items.pop(where, None)
        if before is not None:
            self._names[where.namespace].discard(where.name)
            self._changed(before, None)


def _trimmed(item: Object) -> Object:
    item["metadata"].pop("managedFields", None)
    (item["metadata"].get("annotations") or {}).pop(_LAST_APPLIED, None)
    return item


def _newer(item: Object, than: Object) -> bool:
    # Versions are opaque by contract, and numbers of etcd in every server there is; equal or not is all that is safe
    # otherwise, and then the watch brings what is missing.
    try:
        return int(item["metadata"]["resourceVersion"]) > int(than["metadata"]["resourceVersion"])
    except ValueError:
        return False
