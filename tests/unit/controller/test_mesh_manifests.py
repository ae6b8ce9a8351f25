"""Service, files of constraints, etcd's secret, policies and autoscalers of a namespace."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from kubernetes_validate import validate

from mmcore.controller import mesh_manifests as manifests
from mmcore.controller.objects import AUTOSCALERS, DISRUPTION_BUDGETS, SERVICE_MONITORS, Object
from mmcore.controller.runtimes import Runtime
from mmcore.controller.serving_config import ServingConfig
from mmcore.controller.type_constraints import instance_labels
from mmcore.placement.constraints import TypeConstraints
from tests.unit.controller.objects import own_runtime, runtime

CONFIG = ServingConfig()


def scaled(**annotations: str) -> Runtime:
    item = runtime()
    item.resource["metadata"]["annotations"] = {f"serving.kserve.io/{key}": text for key, text in annotations.items()}
    return item


def test_the_service_offers_what_is_served() -> None:
    found = manifests.service(CONFIG, "models")
    validate(found, "1.33", strict=True)
    assert [(one["name"], one["port"]) for one in found["spec"]["ports"]] == [
        ("grpc", 8033),
        ("http", 8008),
        ("prometheus", 2112),
    ]
    assert found["spec"]["clusterIP"] == "None"
    plain = ServingConfig.read("headlessService: false\nrestProxy: {enabled: false}\nmetrics: {enabled: false}")
    found = manifests.service(plain, "models")
    assert [one["name"] for one in found["spec"]["ports"]] == ["grpc"]
    assert "clusterIP" not in found["spec"]


def test_endpoints_and_the_scrape_follow_tls() -> None:
    assert manifests.endpoints(CONFIG, "a") == ("grpc://modelmesh-serving.a:8033", "http://modelmesh-serving.a:8008")
    tls = ServingConfig.read("tls: {secretName: s}\nrestProxy: {port: 9}")
    assert manifests.endpoints(tls, "a")[1] == "https://modelmesh-serving.a:9"
    assert manifests.endpoints(ServingConfig.read("restProxy: {enabled: false}"), "a")[1] == ""
    found = {"metadata": {"name": "modelmesh-serving", "uid": "2"}}
    for config, scheme in ((CONFIG, "http"), (tls, "https")):
        [endpoint] = manifests.service_monitor(config, "a", found, SERVICE_MONITORS[0])["spec"]["endpoints"]
        assert endpoint["scheme"] == scheme and ("tlsConfig" in endpoint) == (scheme == "https")


def test_instances_read_the_constraints_and_go_where_they_say() -> None:
    onnx, own = runtime(), own_runtime("mmcore", "sklearn")
    hidden = runtime("off", disabled=True)
    files = manifests.constraints_map(CONFIG, "models", [onnx, own, hidden])["data"]
    constraints = TypeConstraints.of(json.loads(files["type_constraints"]))

    def hosts(model_type: str) -> list[str]:
        key = constraints.key(model_type)
        return [one.name for one in (onnx, own) if constraints.allows(key, frozenset(instance_labels(one, rest=True)))]

    assert hosts("rt:triton-2.x") == ["triton-2.x"]
    assert hosts("mt:onnx:1|pv:v2") == ["triton-2.x"]
    assert hosts("mt:sklearn") == ["mmcore"]
    assert hosts("rt:off") == hosts("mt:pmml") == []


def test_another_namespace_has_a_prefix_of_its_own_and_all_files_that_the_connection_names() -> None:
    connection = {"endpoints": "https://etcd:2379", "root_prefix": "root/", "certificate_file": "ca.crt"}
    encoded = {"etcd_connection": json.dumps(connection), "ca.crt": "PEM"}
    source = {
        "metadata": {"name": "model-serving-etcd"},
        "data": {key: base64.b64encode(text.encode()).decode() for key, text in encoded.items()},
    }
    found = manifests.etcd_secret(source, "team")
    data = {key: base64.b64decode(text).decode() for key, text in found["data"].items()}
    assert json.loads(data["etcd_connection"])["root_prefix"] == "root/mm_ns/team"
    assert data["ca.crt"] == "PEM"
    assert found["metadata"]["namespace"] == "team"
    assert (manifests.etcd_prefix(source, "team"), manifests.etcd_prefix(source, "")) == ("root/mm_ns/team", "root")
    assert manifests.etcd_prefix(None, "team") == ""


@pytest.mark.parametrize("data", [{}, {"etcd_connection": "bm8="}, {"etcd_connection": "WzFd"}])
def test_a_secret_without_a_connection_is_refused(data: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="etcd_connection"):
        manifests.etcd_secret({"metadata": {"name": "e"}, "data": data}, "team")


def test_an_entry_that_is_no_json_harms_no_other_and_none_leaks_into_another() -> None:
    entries = {"a": {"type": "s3", "headers": {"X": ["y"]}}, "b": {"type": "pvc", "name": "claim"}}
    data = {key: base64.b64encode(json.dumps(value).encode()).decode() for key, value in entries.items()}
    data["c"] = base64.b64encode(b"{not json").decode()
    found, broken = manifests.storage_entries({"data": data})
    assert found == [entries["a"], entries["b"]]
    assert broken == ["c"]
    assert manifests.storage_entries(None) == ([], [])


def test_only_instances_reach_the_port_that_requests_are_passed_on_at() -> None:
    found = manifests.network_policy(ServingConfig.read("inferenceServicePort: 9000"), "models")
    validate(found, "1.33", strict=True)
    everyone, mesh = found["spec"]["ingress"]
    assert [one["port"] for one in everyone["ports"]] == [2112, 8008, 9000]
    assert [one["port"] for one in mesh["ports"]] == [8043]
    assert mesh["from"] == [{"podSelector": found["spec"]["podSelector"]}]


def test_one_pod_may_be_taken_away_at_a_time() -> None:
    found = manifests.disruption_budget(runtime(), CONFIG, "models", DISRUPTION_BUDGETS[0])
    validate(found, "1.33", strict=True)
    assert found["spec"]["maxUnavailable"] == 1


def test_the_monitor_goes_with_its_service() -> None:
    service: Object = {"metadata": {"name": "modelmesh-serving", "uid": "7"}}
    found = manifests.service_monitor(CONFIG, "models", service, SERVICE_MONITORS[0])
    assert found["metadata"]["ownerReferences"][0]["uid"] == "7"
    assert found["spec"]["endpoints"][0]["port"] == "prometheus"


@pytest.mark.parametrize(
    ("annotations", "bounds", "metric"),
    [
        (
            {"autoscalerClass": "hpa"},
            (1, 1),
            {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
        ),
        (
            {
                "autoscalerClass": "hpa",
                "min-scale": "2",
                "max-scale": "4",
                "metrics": "memory",
                "targetUtilizationPercentage": "90",
            },
            (2, 4),
            {"name": "memory", "target": {"type": "Utilization", "averageUtilization": 90}},
        ),
        ({"autoscalerClass": "hpa", "min-scale": "3"}, (3, 3), None),
    ],
)
def test_an_autoscaler(annotations: dict[str, str], bounds: tuple[int, int], metric: dict[str, Any] | None) -> None:
    found = manifests.autoscaler(scaled(**annotations), CONFIG, "models", AUTOSCALERS[0])
    assert found is not None
    validate(found, "1.33", strict=True)
    assert (found["spec"]["minReplicas"], found["spec"]["maxReplicas"]) == bounds
    if metric is not None:
        assert found["spec"]["metrics"] == [{"type": "Resource", "resource": metric}]


def test_an_autoscaler_by_a_metric_of_ours() -> None:
    item = scaled(autoscalerClass="hpa", metrics="mmcore_requests_in_flight", targetAverageValue="8")
    found = manifests.autoscaler(item, CONFIG, "models", AUTOSCALERS[0])
    assert found is not None
    validate(found, "1.33", strict=True)
    assert found["spec"]["metrics"][0]["pods"]["metric"] == {"name": "mmcore_requests_in_flight"}


@pytest.mark.parametrize("annotations", [{}, {"autoscalerClass": "none"}, {"autoscalerClass": "external"}])
def test_no_autoscaler_where_none_is_asked_for(annotations: dict[str, str]) -> None:
    assert manifests.autoscaler(scaled(**annotations), CONFIG, "models", AUTOSCALERS[0]) is None
