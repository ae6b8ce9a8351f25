"""Scale to zero and autoscalers: the archived release's acceptance tests of both (S, H)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mmcore.controller.objects import AUTOSCALERS, DEPLOYMENT, PREDICTOR, Kind, Object
from tests.clusters import Cluster, predictor, runtime, state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

GRACE_S = 3
OWN = "modelmesh-serving-own"
CLASS = "serving.kserve.io/autoscalerClass"


def replicas(number: int) -> Any:
    return lambda one: one["spec"]["replicas"] == number


async def stays(cluster: Cluster, number: int, seconds: float) -> None:
    """The replicas are so many for as long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until:
        assert await cluster.replicas("own") == number
        await asyncio.sleep(0.05)


async def test_runtimes_without_models_have_no_pods(cluster: Cluster) -> None:
    await cluster.configure(scaleToZero={"enabled": True, "gracePeriodSeconds": GRACE_S})
    await cluster.apply(runtime("own", "python"))
    await cluster.apply(runtime("other", "python", "sklearn"))
    await cluster.until(DEPLOYMENT, OWN, replicas(0))  # S1
    await cluster.until(DEPLOYMENT, "modelmesh-serving-other", replicas(0))
    await stays(cluster, 0, 0.3)
    item = predictor("m", "scale-2", runtime={"name": "own"})
    await cluster.apply(item)
    await cluster.until(PREDICTOR, "m", state("Loaded"))  # S2
    assert (await cluster.replicas("own"), await cluster.replicas("other")) == (1, 0)
    # One that nothing can serve holds nothing up.
    await cluster.apply(predictor("invalid", "scale-2", model_type="sklearn", runtime={"name": "nope"}))
    await stays(cluster, 1, GRACE_S + 0.5)  # S3
    assert await cluster.replicas("other") == 0

    loop = asyncio.get_running_loop()
    await cluster.delete(PREDICTOR, "m")
    await cluster.until_gone(PREDICTOR, "m")
    left_at = loop.time()
    await stays(cluster, 1, 0.3)  # S4
    # S5: back within the grace.
    await cluster.apply(item)
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    await stays(cluster, 1, max(0.0, left_at + GRACE_S + 0.5 - loop.time()))

    # A controller that starts anew goes on counting: it does not take the pods away at once, nor begin again.
    await cluster.delete(PREDICTOR, "m")
    await cluster.until_gone(PREDICTOR, "m")
    await cluster.until(DEPLOYMENT, OWN, lambda one: "serving.kserve.io/idle-since" in one["metadata"]["annotations"])
    idle_at = loop.time()
    await cluster.stop_controller()
    await cluster.start_controller()
    if loop.time() - idle_at < GRACE_S - 1:
        await stays(cluster, 1, 0.2)
    await cluster.until(DEPLOYMENT, OWN, replicas(0))
    assert GRACE_S - 1 < loop.time() - idle_at < GRACE_S * 3


async def scaler(cluster: Cluster) -> tuple[Kind, Object | None]:
    kind = await cluster.api.served(AUTOSCALERS)
    assert kind is not None
    return kind, await cluster.get(kind, OWN)


async def test_autoscalers_follow_their_runtimes(cluster: Cluster) -> None:
    kind = await cluster.api.served(AUTOSCALERS)
    assert kind is not None

    def scaled(least: int, most: int, metric: str, target: int) -> Any:
        def fits(one: Object) -> bool:
            [measured] = one["spec"]["metrics"]
            found = (measured["resource"]["name"], measured["resource"]["target"]["averageUtilization"])
            return (one["spec"]["minReplicas"], one["spec"]["maxReplicas"], *found) == (least, most, metric, target)

        return fits

    def annotated(**more: str) -> Object:
        item = runtime("own", "python")
        item["metadata"]["annotations"] = {f"serving.kserve.io/{key}": value for key, value in more.items()}
        return item

    await cluster.apply(annotated(autoscalerClass="hpa"))
    await cluster.until(DEPLOYMENT, OWN, replicas(0))  # H1
    assert await cluster.get(kind, OWN) is None
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(kind, OWN, scaled(1, 1, "cpu", 80))  # H3
    await cluster.until(DEPLOYMENT, OWN, replicas(1))
    # H4
    changes = {"min-scale": "2", "max-scale": "4", "targetUtilizationPercentage": "90", "metrics": "memory"}
    await cluster.apply(annotated(autoscalerClass="hpa", **changes))
    await cluster.until(kind, OWN, scaled(2, 4, "memory", 90))
    await cluster.until(DEPLOYMENT, OWN, replicas(2))
    # What the autoscaler decides within its bounds stays.
    found = await cluster.get(DEPLOYMENT, OWN)
    assert found is not None
    where = found["metadata"]
    path = f"/apis/apps/v1/namespaces/{where['namespace']}/deployments/{OWN}"
    body = {"spec": {"replicas": 3}}
    await asyncio.to_thread(cluster.server.ask, "PATCH", path, body, "application/merge-patch+json")
    await stays(cluster, 3, 1)
    await cluster.apply(annotated(autoscalerClass="hpa"))
    await cluster.until(kind, OWN, scaled(1, 1, "cpu", 80))
    await cluster.until(DEPLOYMENT, OWN, replicas(1))
    # H5
    await cluster.apply(annotated())
    await cluster.until_gone(kind, OWN)
    await stays(cluster, 1, 0.3)
    # A class that nobody knows is told, and what runs stays.
    await cluster.apply(annotated(autoscalerClass="keda"))
    async with asyncio.timeout(20):
        while "InvalidSpec" not in {reason for reason, _ in await cluster.events("own")}:
            await asyncio.sleep(0.05)
    assert await cluster.replicas("own") == 1
    # A runtime that is disabled leaves no autoscaler behind, nor does the last model (H2).
    await cluster.apply(annotated(autoscalerClass="hpa"))
    await cluster.until(kind, OWN, scaled(1, 1, "cpu", 80))
    disabled = annotated(autoscalerClass="hpa")
    disabled["spec"]["disabled"] = True
    await cluster.apply(disabled)
    await cluster.until_gone(kind, OWN)
    await cluster.until_gone(DEPLOYMENT, OWN)
    await cluster.apply(annotated(autoscalerClass="hpa"))
    await cluster.until(kind, OWN, scaled(1, 1, "cpu", 80))
    await cluster.delete(PREDICTOR, "m")
    await cluster.until_gone(kind, OWN)
    await cluster.until(DEPLOYMENT, OWN, replicas(0))
