"""The instances that work together, as commands show them."""

from __future__ import annotations

from typing import Any, Final

from mmcore.cli.connection import CLUSTER, Connection
from mmcore.cli.tables import ago
from mmcore.pb import cluster_pb2

INSTANCE_TITLES: Final = (
    *("INSTANCE", "ADDRESS", "UP", "MODELS", "LOADING", "USED", "RPM", "IN FLIGHT", "LABELS", "STATE"),
)


async def list_instances(
    connection: Connection, limit: int
) -> tuple[list[cluster_pb2.ListInstancesResponse.Instance], int]:
    """The instances by their ids, ``limit`` at most (0: all), and how many there are.

    Raises:
        RpcError: what the instance that was asked answered instead.
    """
    request = cluster_pb2.ListRequest(limit=limit)
    response = await connection.call("ListInstances", request, cluster_pb2.ListInstancesResponse, service=CLUSTER)
    return sorted(response.instances, key=lambda instance: instance.id), response.total


def instance_row(one: cluster_pb2.ListInstancesResponse.Instance) -> tuple[str, ...]:
    """One as a row under :data:`INSTANCE_TITLES`."""
    used = f"{one.used_bytes / 2**20:.0f} of {one.capacity_bytes / 2**20:.0f} MiB"
    states = [
        name for name, holds in (("leader", one.leader), ("draining", one.draining), ("asked", one.asked)) if holds
    ]
    return (
        one.id,
        one.address,
        ago(one.started),
        str(one.models),
        str(one.loading),
        used,
        str(one.requests_per_minute),
        str(one.in_flight),
        ",".join(one.labels),
        ", ".join(states),
    )


def plain_instance(one: cluster_pb2.ListInstancesResponse.Instance) -> dict[str, Any]:
    """One as JSON has it."""
    return {
        "id": one.id,
        "address": one.address,
        "version": one.version,
        "location": one.location,
        "zone": one.zone,
        "labels": list(one.labels),
        "started_ms": one.started,
        "capacity_bytes": one.capacity_bytes,
        "used_bytes": one.used_bytes,
        "models": one.models,
        "loading": one.loading,
        "requests_per_minute": one.requests_per_minute,
        "in_flight": one.in_flight,
        "draining": one.draining,
        "leader": one.leader,
        "asked": one.asked,
    }
