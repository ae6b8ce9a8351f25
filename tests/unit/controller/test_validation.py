"""What is told of a runtime's spec, and where there is no status to tell it in."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.api import ApiError
from mmcore.controller.known import Installation, Known
from mmcore.controller.namespace_reconciler import NamespaceReconciler
from mmcore.controller.objects import SERVING_RUNTIME, Kind, Object, Ref
from tests.unit.controller.objects import serving_runtime


class Server:
    """An API server that answers a change of status with this error, or takes it."""

    def __init__(self, error: ApiError | None) -> None:
        self.error = error
        self.told: list[Object] = []

    async def patch(self, kind: Kind, where: Ref, change: Object, subresource: str = "") -> Object:
        assert subresource == "status"
        if self.error is not None:
            raise self.error
        self.told += change["status"]["conditions"]
        return {
            **serving_runtime(),
            "metadata": {"name": where.name, "namespace": where.namespace, **change["metadata"]},
        }


class Warnings:
    """Events that are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, item: Object, reason: str, message: str) -> None:
        self.told.append(f"{reason}: {message}")


async def validated(error: ApiError | None, **spec: Any) -> tuple[list[Object], list[str]]:
    """The conditions and the Events of a runtime."""
    server, warnings = Server(error), Warnings()
    api: Any = server
    events: Any = warnings
    known = Known(api, Installation("models"), lambda kind, before, after: None)
    item = serving_runtime("r", **spec)
    item["metadata"] |= {"resourceVersion": "1", "generation": 3}
    known.runtimes._take([item])
    reconciler = NamespaceReconciler(api, known, events, lambda namespace: None)
    await reconciler.validate(SERVING_RUNTIME, known.runtimes, Ref("models", "r"))
    return server.told, warnings.told


async def test_a_runtime_is_told_valid_or_what_is_wrong_with_it() -> None:
    [condition], events = await validated(None)
    assert (condition["type"], condition["status"], condition["observedGeneration"]) == ("Valid", "True", 3)
    assert events == []
    [condition], events = await validated(None, grpcEndpoint="nowhere")
    assert condition["status"] == "False" and "grpcEndpoint must be" in condition["message"]
    assert events == [f"InvalidSpec: {condition['message']}"]


async def test_what_a_runtime_states_in_vain_is_told() -> None:
    [condition], events = await validated(None, httpDataEndpoint="port:8002")
    assert condition["status"] == "True"
    assert events == ["WithoutEffect: httpDataEndpoint has no effect: instances pull models and serve REST themselves"]


async def test_a_runtime_of_a_kind_without_status_is_told_by_events_alone() -> None:
    _, events = await validated(ApiError(404, "the server could not find the requested resource"), grpcEndpoint="x")
    assert len(events) == 1


async def test_other_refusals_are_tried_again() -> None:
    with pytest.raises(ApiError):
        await validated(ApiError(409, "the object has been modified"))
