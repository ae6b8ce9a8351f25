"""What is wrong with a runtime, said so that its user can mend it."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.runtimes import Runtime, problems
from mmcore.controller.serving_config import ServingConfig
from tests.unit.controller.objects import own_runtime, runtime

CONTAINER = {"name": "triton", "image": "t"}


def found(item: Runtime) -> str:
    return "; ".join(problems(item, ServingConfig()))


def with_annotations(**annotations: str) -> Runtime:
    item = runtime()
    names = {
        "cls": "autoscalerClass",
        "target": "targetUtilizationPercentage",
        "least": "min-scale",
        "most": "max-scale",
    }
    stated = {f"serving.kserve.io/{names.get(key, key)}": value for key, value in annotations.items()}
    item.resource["metadata"]["annotations"] = stated
    return item


def test_what_is_right() -> None:
    assert found(runtime()) == found(own_runtime()) == ""
    assert found(with_annotations(cls="hpa", least="1", most="3", metrics="memory", target="90")) == ""
    assert found(with_annotations(cls="none")) == ""


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"builtInAdapter": {"serverType": "other"}}, "'other' is not one of builtInServerTypes"),
        ({"containers": [{"name": "x"}]}, "no container has that name"),
        ({"containers": []}, "say serverType: mmcore"),
        ({"builtInAdapter": {"serverType": "mmcore"}}, "needs no other container"),
        ({"builtInAdapter": None}, "grpcEndpoint is missing"),
        ({"builtInAdapter": None, "grpcEndpoint": "8085"}, "must be port:NUMBER or unix:PATH"),
        (
            {"builtInAdapter": {"serverType": "torchserve"}, "containers": [{"name": "torchserve"}]},
            "no adapter for builtInAdapter.serverType 'torchserve'",
        ),
        ({"containers": [CONTAINER, CONTAINER]}, "two containers are named 'triton'"),
        ({"volumes": [{"name": "tc-config"}]}, "volume name 'tc-config'"),
        ({"containers": [{**CONTAINER, "ports": [{"containerPort": 8033}]}]}, "port 8033 is the instance's own"),
        ({"containers": [{**CONTAINER, "ports": [{"name": "grpc", "containerPort": 1}]}]}, "port name 'grpc'"),
        ({"containers": [{**CONTAINER, "resources": {"limits": {"memory": "1Gx"}}}]}, "resources.limits.memory"),
    ],
)
def test_what_is_wrong_with_a_spec(spec: dict[str, Any], told: str) -> None:
    assert told in found(runtime(**spec))


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        ({"cls": "magic"}, "must be hpa, external or none, not 'magic'"),
        ({"cls": "hpa", "least": "0"}, "min-scale must be a whole number from 1"),
        ({"cls": "hpa", "least": "3", "most": "2"}, "above"),
        ({"cls": "hpa", "target": "101"}, "from 1 to 100"),
        ({"cls": "hpa", "metrics": "queue"}, "cpu, memory or a metric mmcore_"),
        ({"cls": "hpa", "metrics": "mmcore_requests_in_flight"}, "must say what of"),
    ],
)
def test_what_is_wrong_with_its_scaling(annotations: dict[str, str], told: str) -> None:
    assert told in found(with_annotations(**annotations))


def test_replicas_are_not_stated_twice() -> None:
    item = with_annotations(cls="hpa")
    item.spec["replicas"] = 2
    assert "replicas must not be set" in found(item)
