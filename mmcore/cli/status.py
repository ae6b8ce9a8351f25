"""``mmcore status``: the instances that work together and what each of them holds."""

from __future__ import annotations

from typing import Any

import click

from mmcore.cli.connection import CLUSTER, Connection, ask, connection_options
from mmcore.cli.models import list_options
from mmcore.cli.tables import ago, print_json, print_rest, print_table
from mmcore.pb import cluster_pb2

_TITLES = ("INSTANCE", "ADDRESS", "UP", "MODELS", "LOADING", "USED", "RPM", "IN FLIGHT", "LABELS", "STATE")


@click.command("status")
@connection_options
@list_options
def command(target: str, timeout: float, limit: int, as_json: bool) -> None:
    """List the instances that work together, as one of them knows them: memory, models and load of each."""

    async def instances(connection: Connection) -> cluster_pb2.ListInstancesResponse:
        request = cluster_pb2.ListRequest(limit=limit)
        return await connection.call("ListInstances", request, cluster_pb2.ListInstancesResponse, service=CLUSTER)

    response = ask(target, timeout, instances)
    found = sorted(response.instances, key=lambda instance: instance.id)
    if as_json:
        print_json([_plain(one) for one in found])
    else:
        print_table(_TITLES, [_row(one) for one in found])
    print_rest(len(found), response.total)


def _row(one: cluster_pb2.ListInstancesResponse.Instance) -> tuple[str, ...]:
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


def _plain(one: cluster_pb2.ListInstancesResponse.Instance) -> dict[str, Any]:
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
