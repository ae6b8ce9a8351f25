"""Objects kept in step with an API server that is scripted here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from mmcore.controller import informer as module
from mmcore.controller.api import ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.objects import NAMESPACE, PREDICTOR, Kind, Object, Ref

ITEM: Object = {"metadata": {"name": "a", "namespace": "models", "resourceVersion": "5"}, "spec": {}}


class Server:
    """Answers lists by turns, the last of them from then on; its watches break off at once."""

    def __init__(self, *lists: list[Object] | ApiError) -> None:
        self._lists = list(lists)
        self.asked = asyncio.Event()

    async def list(self, kind: Kind, namespace: str = "", **selectors: str) -> tuple[list[Object], str]:
        await asyncio.sleep(0)
        found = self._lists.pop(0) if len(self._lists) > 1 else self._lists[0]
        if len(self._lists) == 1:
            self.asked.set()
        if isinstance(found, ApiError):
            raise found
        return found, "7"

    async def watch(self, kind: Kind, namespace: str, version: str, **selectors: str) -> AsyncIterator[Any]:
        raise ApiError(410, "too old")
        yield


async def followed(monkeypatch: pytest.MonkeyPatch, kind: Kind, *lists: list[Object] | ApiError) -> list[Any]:
    """What is told, and is known at last, when lists are answered so."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)
    server, told = Server(*lists), []
    api: Any = server
    informer = Informer(api, kind, lambda before, after: told.append((before is not None, after is not None)))
    running = asyncio.ensure_future(informer.run())
    try:
        async with asyncio.timeout(10):
            await server.asked.wait()
            await informer.synced.wait()
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    return [told, set(informer.items)]


GONE = ApiError(404, "the server could not find the requested resource")
AWAY = ApiError(0, "the API server does not answer")


@pytest.mark.parametrize("error", [GONE, AWAY, ApiError(403, "forbidden"), ApiError(503, "not ready")])
@pytest.mark.parametrize("kind", [PREDICTOR, NAMESPACE])
async def test_what_cannot_be_looked_up_is_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, error: ApiError
) -> None:
    """The archived controller let all of a namespace go when the API server failed to answer for it."""
    found = await followed(monkeypatch, kind, [dict(ITEM)], error, error)
    assert found == [[(False, True)], {Ref("models", "a")}]


async def test_a_kind_that_the_server_does_not_have_has_no_objects_until_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await followed(monkeypatch, PREDICTOR, GONE, GONE) == [[], set()]
    assert await followed(monkeypatch, PREDICTOR, GONE, [dict(ITEM)], [dict(ITEM)]) == [
        [(False, True)],
        {Ref("models", "a")},
    ]


async def test_what_a_list_does_not_have_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await followed(monkeypatch, PREDICTOR, [dict(ITEM)], [], []) == [[(False, True), (True, False)], set()]
