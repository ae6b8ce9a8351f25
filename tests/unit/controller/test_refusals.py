"""What the API server does not take of a namespace's objects, and who is told of it."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.api import ApiError
from mmcore.controller.known import Installation, Known
from mmcore.controller.namespace_reconciler import NamespaceReconciler
from mmcore.controller.objects import DEPLOYMENT, Kind, Object, Ref
from tests.unit.controller.objects import serving_runtime


class Server:
    """Has no objects, and takes none of a Deployment's."""

    def __init__(self, code: int) -> None:
        self._code = code

    async def get(self, kind: Kind, where: Ref) -> Object:
        raise ApiError(404, "not found")

    async def apply(self, kind: Kind, item: Object) -> Object:
        if kind is DEPLOYMENT:
            raise ApiError(self._code, "no")
        return item


class Told:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def warn(self, item: Object, reason: str, message: str) -> None:
        self.reasons.append(reason)


class Mesh:
    def set_addresses(self, addresses: list[str]) -> None:
        assert not addresses


@pytest.mark.parametrize(("code", "told"), [(422, [1, 1, 1]), (500, [0, 1, 1]), (503, [0, 0, 0]), (409, [0, 0, 0])])
async def test_refusals_are_told_and_failures_of_the_server_when_they_stay(code: int, told: list[int]) -> None:
    server: Any = Server(code)
    known = Known(server, Installation("models"), lambda kind, before, after: None)
    item = serving_runtime("r")
    item["metadata"] |= {"resourceVersion": "1", "generation": 1}
    known.runtimes._take([item])
    space = {"metadata": {"name": "models", "resourceVersion": "1"}}
    known.namespaces._take([space])
    events: Any = Told()
    looked_at: list[str] = []
    reconciler = NamespaceReconciler(server, known, events, looked_at.append)
    mesh: Any = Mesh()
    found = []
    for _ in told:
        # All the same it is tried again.
        with pytest.raises(ApiError):
            await reconciler.reconcile("models", mesh)
        found.append(len(known.refused.get("models", [])))
    assert found == told
    assert events.reasons.count("Refused") == sum(told)
    # Models are looked at when that changes, and not each time.
    assert looked_at == (["models"] if any(told) else [])
