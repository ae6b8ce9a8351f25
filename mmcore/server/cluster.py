"""The service ``mmcore.Cluster``: models, vmodels and instances as the commands list them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, Protocol

from mmcore.errors import RpcError
from mmcore.pb import cluster_pb2 as pb
from mmcore.pb import model_mesh_pb2
from mmcore.registry import InstanceRecord, Registry
from mmcore.routing import Forwarding, IndexRow, ModelState, Registered, Router, VModels
from mmcore.server.calls import Waiting
from mmcore.server.management import model_status, vmodel_status
from mmcore.transport import Server

SERVICE: Final = "mmcore.Cluster"

_LIST_INSTANCES: Final = f"/{SERVICE}/ListInstances"
#: How long another instance may take to tell of itself, and how many are asked at once.
_TELL_WAIT_S: Final = 1.0
_MOST_ASKED: Final = 64

#: Rows made between two looks at the loop's other work, some milliseconds each time.
_AT_ONCE: Final = 100


class _Names(Protocol):
    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class Cluster:
    """Lists what this instance knows of all instances; ``own_record`` tells what it is itself at this moment.

    Other instances, those of ``forwarding``, are asked what they are at this moment; of one that does not answer its
    record is told.
    """

    def __init__(
        self,
        registry: Registry,
        router: Router,
        registered: Registered,
        vmodels: VModels,
        own_record: Callable[[], InstanceRecord],
        forwarding: Forwarding | None = None,
    ) -> None:
        self._forwarding = forwarding
        self._own_record = own_record
        self._registry = registry
        self._router = router
        self._registered = registered
        self._vmodels = vmodels

    def register(self, server: Server) -> None:
        """Add every method to ``server``."""
        server.add_unary(f"/{SERVICE}/ListModels", Waiting().handler(pb.ListRequest, self._list_models))
        server.add_unary(f"/{SERVICE}/ListVModels", Waiting().handler(pb.ListRequest, self._list_vmodels))
        server.add_unary(_LIST_INSTANCES, Waiting().handler(pb.ListRequest, self._list_instances))

    async def _list_models(self, request: pb.ListRequest) -> pb.ListModelsResponse:
        names, total = _chosen(self._router.names(), request)
        response = pb.ListModelsResponse(total=total)
        for number, name in enumerate(names):
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            rows = self._router.rows(name)
            if name in self._registered and not self._router.in_folder(name):
                self._add_registered(response, name, rows)
            else:
                for row in rows:
                    response.models.add(name=name, version=row.version, state=row.state, reason=row.reason)
        return response

    def _add_registered(self, response: pb.ListModelsResponse, name: str, rows: list[IndexRow]) -> None:
        record = self._registry.models.get(name)
        if record is None:
            return
        status = self._registered.status(name)
        row = rows[-1] if rows else IndexRow(name, "", "UNAVAILABLE", "")
        elsewhere = status.state is ModelState.LOADED and row.state != "READY"
        response.models.add(
            name=name,
            version=row.version,
            state="READY" if elsewhere else row.state,
            reason="loaded by another instance" if elsewhere else row.reason,
            registered=True,
            info=model_mesh_pb2.ModelInfo(type=record.type, path=record.path, key=record.key),
            status=model_status(status),
            references=record.references,
            auto_delete=record.auto_delete,
            last_used=record.last_used_ms,
        )

    async def _list_vmodels(self, request: pb.ListRequest) -> pb.ListVModelsResponse:
        names, total = _chosen(self._registry.vmodels, request)
        response = pb.ListVModelsResponse(total=total)
        for number, name in enumerate(names):
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            status = self._vmodels.status(name)
            if status is not None:
                response.vmodels.add(name=name, status=vmodel_status(status))
        return response

    async def _list_instances(self, request: pb.ListRequest) -> pb.ListInstancesResponse:
        own = self._registry.instance
        names, total = _chosen(list(dict.fromkeys((own, *self._registry.instances))), request)
        response = pb.ListInstancesResponse(total=total)
        turns = asyncio.Semaphore(_MOST_ASKED)
        asked = await asyncio.gather(*(self._told_by(name, turns) for name in names if name != own))
        fresh = {told.id: told for told in asked if told is not None}
        for name in names:
            if name in fresh:
                response.instances.append(fresh[name])
                continue
            record = self._own_record() if name == own else self._registry.instances.get(name)
            if record is None:
                continue
            response.instances.add(
                id=name,
                address=record.address,
                version=record.version,
                location=record.location,
                zone=record.zone,
                labels=record.labels,
                started=record.started_ms,
                capacity_bytes=record.capacity_bytes,
                used_bytes=record.used_bytes,
                models=record.models,
                loading=record.loading,
                requests_per_minute=record.requests_per_minute,
                in_flight=record.in_flight,
                draining=record.draining,
                asked=name == own,
                leader=name == own and self._registry.leader,
            )
        return response

    async def _told_by(self, instance: str, turns: asyncio.Semaphore) -> pb.ListInstancesResponse.Instance | None:
        """What another instance tells of itself; None where it does not."""
        peer = self._forwarding.peers.get(instance) if self._forwarding is not None else None
        if peer is None or not peer.usable:
            return None
        request = pb.ListRequest(prefix=instance, limit=1).SerializeToString()
        async with turns:
            try:
                body = await peer.unary(_LIST_INSTANCES, request, timeout_s=_TELL_WAIT_S)
            except RpcError:
                return None
        for told in pb.ListInstancesResponse.FromString(body).instances:
            if told.id == instance and told.asked:
                told.asked = False
                return told
        return None


def _chosen(names: _Names, request: pb.ListRequest) -> tuple[list[str], int]:
    """The names that a request asks for, in no order, and how many have its prefix.

    They are not sorted, which would take the loop a second with a million of them.
    """
    if request.prefix:
        names = [name for name in names if name.startswith(request.prefix)]
    return list(islice(names, request.limit or None)), len(names)
