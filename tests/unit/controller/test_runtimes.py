"""What is wrong with a runtime, said so that its user can mend it."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.runtime_address import runtime_address
from mmcore.controller.runtimes import Runtime, problems
from mmcore.controller.serving_config import ServingConfig
from tests.unit.controller.objects import own_runtime, runtime

CONTAINER = {"name": "triton", "image": "t", "resources": {"requests": {"memory": "1Gi"}}}


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
            {"builtInAdapter": {"serverType": "triton", "modelLoadingTimeoutMillis": -5}},
            "builtInAdapter.modelLoadingTimeoutMillis must be a whole number from 1, not '-5'",
        ),
        (
            {"builtInAdapter": {"serverType": "triton", "env": [{"name": "LOADING_CONCURRENCY", "value": "many"}]}},
            "builtInAdapter.env LOADING_CONCURRENCY must be a whole number from 1, not 'many'",
        ),
        ({"containers": [{"name": "triton", "image": "t"}]}, "container 'triton' states no memory"),
        ({"containers": [CONTAINER, CONTAINER]}, "two containers are named 'triton'"),
        ({"volumes": [{"name": "tc-config"}]}, "volume name 'tc-config'"),
        ({"containers": [{**CONTAINER, "ports": [{"containerPort": 8033}]}]}, "port 8033 is the instance's own"),
        ({"containers": [{**CONTAINER, "ports": [{"name": "grpc", "containerPort": 1}]}]}, "port name 'grpc'"),
        ({"containers": [{**CONTAINER, "resources": {"limits": {"memory": "1Gx"}}}]}, "resources.limits.memory"),
    ],
)
def test_what_is_wrong_with_a_spec(spec: dict[str, Any], told: str) -> None:
    assert told in found(runtime(**spec))


def test_what_models_may_take_may_be_said_to_the_instance_itself() -> None:
    adapter = {"serverType": "triton", "env": [{"name": "MMCORE_CAPACITY", "value": "1GiB"}]}
    assert found(runtime(builtInAdapter=adapter, containers=[{"name": "triton", "image": "t"}])) == ""


def test_a_server_that_is_allowed_and_has_no_adapter() -> None:
    config = ServingConfig(server_types=("tfserving",))
    item = runtime(builtInAdapter={"serverType": "tfserving"}, containers=[{**CONTAINER, "name": "tfserving"}])
    assert "instances have no adapter for builtInAdapter.serverType 'tfserving'" in problems(item, config)


@pytest.mark.parametrize(
    ("server", "spec", "address"),
    [
        ("ovms", {}, "ovms://127.0.0.1:8001?repo=/models/_ovms_models&rest=8888&config=/models/model_config_list.json"),
        (
            "ovms",
            {"grpcDataEndpoint": "port:9001", "builtInAdapter": {"serverType": "ovms", "runtimeManagementPort": 9888}},
            "ovms://127.0.0.1:9001?repo=/models/_ovms_models&rest=9888&config=/models/model_config_list.json",
        ),
        (
            "torchserve",
            {"grpcDataEndpoint": "port:7070"},
            "torchserve://127.0.0.1:7070?repo=/models/_torchserve_models&management=7071",
        ),
    ],
)
def test_servers_that_are_managed_elsewhere(server: str, spec: dict[str, Any], address: str) -> None:
    stated = {"builtInAdapter": {"serverType": server}, "containers": [{**CONTAINER, "name": server}], **spec}
    item = runtime(**stated)
    assert runtime_address(item) == address
    assert found(item) == ""


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
