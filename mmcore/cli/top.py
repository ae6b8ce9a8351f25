"""A live top for models: ``mmcore status --watch``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from mmcore.cli.connection import Connection, ask
from mmcore.cli.instances import INSTANCE_TITLES, instance_row, list_instances, plain_instance
from mmcore.cli.tables import table
from mmcore.errors import RpcError, Status
from mmcore.pb import cluster_pb2, inference_pb2

if TYPE_CHECKING:
    from rich.console import RenderableType

_TITLES: Final = ("MODEL", "VERSION", "REQUESTS/S", "MEAN MS", "QUEUE MS", "FAILURES/S")
_INSTANCES: Final = 50


class Count(NamedTuple):
    """What a model has counted since it was loaded; times in nanoseconds."""

    answered: int = 0
    took_ns: int = 0
    queued_ns: int = 0
    failed: int = 0

    @staticmethod
    def of(told: inference_pb2.InferStatistics) -> Count:
        """From a model's statistics."""
        return Count(told.success.count, told.success.ns, told.queue.ns, told.fail.count)


Counts = dict[tuple[str, str], Count]


class Use(NamedTuple):
    """A model's use between two looks."""

    model: str
    version: str
    requests_per_s: float
    mean_ms: float
    queue_ms: float
    failures_per_s: float


class Look(NamedTuple):
    """What one look has found; ``models`` are those in use, the most used first."""

    instances: list[cluster_pb2.ListInstancesResponse.Instance]
    models: list[Use]


def follow(target: str, timeout_s: float, every_s: float, top: int, *, as_json: bool) -> None:
    """Look every so many seconds until interrupted, and show the ``top`` models each time.

    Raises:
        click.ClickException: nothing answers at ``target``.
        RpcError: what the instance answered instead.
    """

    async def work(connection: Connection) -> None:
        if as_json:
            await _look_on(connection, every_s, lambda look: click.echo(json.dumps(_plain(look, top))))
            return
        from rich.live import Live

        with Live(screen=True, auto_refresh=False) as live:
            await _look_on(connection, every_s, lambda look: live.update(_drawn(look, top), refresh=True))

    try:
        ask(target, timeout_s, work)
    except KeyboardInterrupt:
        return


async def _look_on(connection: Connection, every_s: float, show: Callable[[Look], object]) -> None:
    before, at = await _counts(connection), time.monotonic()
    while True:
        instances, _ = await list_instances(connection, _INSTANCES)
        counts, now = await _counts(connection), time.monotonic()
        show(Look(instances, used(before, counts, now - at)))
        before, at = counts, now
        await asyncio.sleep(every_s)


async def _counts(connection: Connection) -> Counts:
    """What the models of the instance have counted; nothing where a runtime keeps that to itself."""
    request = inference_pb2.ModelStatisticsRequest()
    try:
        told = await connection.call("ModelStatistics", request, inference_pb2.ModelStatisticsResponse)
    except RpcError as error:
        if error.status is not Status.UNIMPLEMENTED:
            raise
        return {}
    return {(one.name, one.version): Count.of(one.inference_stats) for one in told.model_stats}


def used(before: Counts, after: Counts, seconds: float) -> list[Use]:
    """The models that were asked between two looks, the most used first; one that was loaded anew begins at zero."""
    found = []
    for (model, version), now in after.items():
        then = before.get((model, version), Count())
        if now.answered < then.answered or now.failed < then.failed:
            then = Count()
        answered, failed = now.answered - then.answered, now.failed - then.failed
        if answered or failed:
            each_ms = 1e6 * max(1, answered)
            mean_ms, queue_ms = (now.took_ns - then.took_ns) / each_ms, (now.queued_ns - then.queued_ns) / each_ms
            rate, failing = answered / max(seconds, 1e-3), failed / max(seconds, 1e-3)
            found.append(Use(model, version, rate, mean_ms, queue_ms, failing))
    return sorted(found, key=lambda one: (-one.requests_per_s, -one.failures_per_s, one.model, one.version))


def _plain(look: Look, top: int) -> dict[str, Any]:
    return {
        "instances": [plain_instance(one) for one in look.instances],
        "models": [
            {name: round(value, 3) if isinstance(value, float) else value for name, value in one._asdict().items()}
            for one in look.models[:top]
        ],
    }


def _drawn(look: Look, top: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    rows = [(one.model, one.version, *(f"{value:,.2f}" for value in one[2:])) for one in look.models[:top]]
    more = len(look.models) - top
    below = f"and {more} more in use" if more > 0 else "" if rows else "no model was asked since the last look"
    return Group(
        table(INSTANCE_TITLES, map(instance_row, look.instances)), Text(), table(_TITLES, rows), Text(below),
        Text(time.strftime("%H:%M:%S, Ctrl-C ends it")),
    )  # fmt: skip
