"""What is installed with ``deploy/``: overlays and chart say the same, and Kubernetes takes all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python import Chart, HelmError
from kubernetes_validate import validate

import mmcore
from mmcore.controller.check import check
from mmcore.controller.objects import Object, at
from mmcore.controller.serving_config import CONFIG_KEY, CONFIG_MAP_NAME, ServingConfig
from tests.overlays import CHART, charted, kustomized, named
from tests.serving import ROOT

OVERLAYS = ("kustomize/cluster", "kustomize/namespace", "kustomize/quickstart")
#: Kinds that Kubernetes itself does not have.
OURS = ("ServingRuntime", "ClusterServingRuntime", "Predictor", "InferenceService")
CLUSTER_WIDE = ("ClusterServingRuntime", "CustomResourceDefinition")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_what_an_overlay_makes(overlay: str) -> None:
    for item in kustomized(overlay):
        if item["kind"] not in OURS:
            validate(item, "1.33", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_controller_finds_nothing_wrong_with_what_an_overlay_makes(overlay: str) -> None:
    findings = check(kustomized(overlay))
    assert "error" not in {one.level for one in findings}, findings


@pytest.mark.parametrize("scope", ["cluster", "namespace"])
def test_the_chart_installs_what_the_overlay_does(scope: str) -> None:
    overlay = named([one for one in kustomized(f"kustomize/{scope}") if one["kind"] != "CustomResourceDefinition"])
    chart = named(charted({"scope": scope}))
    assert chart.keys() == overlay.keys()
    for key, item in overlay.items():
        if item["kind"] in CLUSTER_WIDE:
            # Kustomize gives a namespace to kinds that it does not know; API servers drop it.
            item["metadata"].pop("namespace", None)
        assert chart[key] == item


def test_the_chart_brings_the_custom_resources() -> None:
    with Chart.load(CHART) as chart:
        found = [yaml.safe_load(one["data"]) for one in chart.crds]
    assert named(found) == named(kustomized("crds"))


def test_the_chart_is_what_helm_asks_of_one() -> None:
    report = helm_python.lint(CHART, strict=True)
    assert not report["errors"]
    # Below a warning: that an icon would be nice.
    assert [one for one in report["messages"] if one["severity"] > 1] == []


def test_versions_are_those_of_the_package() -> None:
    with Chart.load(CHART) as chart:
        assert chart.version == chart.metadata["appVersion"] == mmcore.__version__
    for overlay in OVERLAYS:
        images = {one["image"] for item in kustomized(overlay) for one in containers(item)}
        assert f"mmcore:{mmcore.__version__}" in images
    assert ServingConfig().image == f"mmcore:{mmcore.__version__}"


def containers(item: Object) -> list[Object]:
    pod = at(item, "spec", "template", "spec") or {}
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_runs_as_root_or_writes_to_its_image(overlay: str) -> None:
    for item in kustomized(overlay):
        for one in containers(item):
            security = one["securityContext"]
            assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
            assert at(item, "spec", "template", "spec", "securityContext", "runAsNonRoot")
            assert one["resources"]["limits"]["memory"]


def test_the_charts_values_reach_the_pods_the_rights_and_the_configuration() -> None:
    values: dict[str, Any] = {
        "image": {"repository": "mine/mmcore", "tag": "v2"},
        "config": {"podsPerRuntime": 3, "tls": {"secretName": "keys"}, "storageSecretName": "stores"},
        "etcd": {"secretName": "kv", "connection": {"endpoints": "http://etcd:2379", "root_prefix": "p"}},
        "storage": {"minio": {"type": "s3", "bucket": "b"}},
        "runtimes": ["triton"],
        "runtimeImages": {"triton": "mine/triton:1"},
        "imagePullSecrets": [{"name": "pull"}],
        "logLevel": "debug",
        "nodeSelector": {"disk": "ssd"},
    }
    found = named(charted(values, "other"))
    for item in found.values():
        if item["kind"] not in OURS:
            validate(item, "1.33", strict=True)
        if not item["kind"].startswith("Cluster"):
            assert item["metadata"]["namespace"] == "other"
    pod = found["Deployment", "modelmesh-controller"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "mine/mmcore:v2"
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert (env["ETCD_SECRET_NAME"], env["MMCORE_LOG_LEVEL"]) == ("kv", "debug")
    assert pod["nodeSelector"] == {"disk": "ssd"} and pod["imagePullSecrets"] == [{"name": "pull"}]
    rules = found["ClusterRole", "modelmesh-controller"]["rules"]
    secrets = {name for rule in rules if rule["resources"] == ["secrets"] for name in rule.get("resourceNames", [])}
    assert secrets == {"keys", "kv", "stores"}
    texts = [
        found["ConfigMap", f"{CONFIG_MAP_NAME}-defaults"]["data"]["config-defaults.yaml"],
        found["ConfigMap", CONFIG_MAP_NAME]["data"][CONFIG_KEY],
    ]
    config = ServingConfig.read(*texts)
    assert (config.image, config.pods_per_runtime, config.tls_secret) == ("mine/mmcore:v2", 3, "keys")
    assert "etcd:2379" in found["Secret", "kv"]["stringData"]["etcd_connection"]
    assert yaml.safe_load(found["Secret", "stores"]["stringData"]["minio"])["bucket"] == "b"
    [runtime] = [item for (kind, _), item in found.items() if kind == "ClusterServingRuntime"]
    assert runtime["spec"]["containers"][0]["image"] == "mine/triton:1"
    digest = {"image": {"repository": "mine/mmcore", "digest": "sha256:" + "0" * 64}}
    found = named(charted(digest))
    told = found["ConfigMap", f"{CONFIG_MAP_NAME}-defaults"]["data"]["config-defaults.yaml"]
    assert ServingConfig.read(told).image == f"mine/mmcore@sha256:{'0' * 64}"


@pytest.mark.parametrize(
    "values",
    [
        {"scope": "world"},
        {"replicas": "many"},
        {"imgae": {}},
        {"runtimes": ["tritn"]},
        {"image": {"repository": "a", "digest": "latest"}},
        {"storage": {"minio": {"bucket": "b"}}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(HelmError):
        charted(values)


def test_the_chart_can_be_packed_and_needs_nothing_beside_it(tmp_path: Path) -> None:
    packed = helm_python.package(CHART, destination=tmp_path)
    with Chart.load(packed) as chart:
        rendered = chart.render(None, name="mmcore", namespace="model-serving")
        assert len(chart.crds) == 4
    assert "kind: ClusterServingRuntime" in rendered["mmcore/templates/runtimes.yaml"]


def test_every_runtime_is_in_the_overlay_and_in_the_chart() -> None:
    files = {file.stem for file in (ROOT / "deploy/runtimes/cluster").glob("*.yaml")} - {"kustomization"}
    with Chart.load(CHART) as chart:
        assert set(chart.values["runtimes"]) == files
    kinds = [one["kind"] for one in kustomized("runtimes/cluster")]
    assert kinds == ["ClusterServingRuntime"] * len(files)
    assert [one["kind"] for one in kustomized("runtimes/namespace")] == ["ServingRuntime"] * len(files)


@pytest.mark.parametrize(
    ("name", "short", "columns"),
    [
        ("predictors", [], ["Type", "Available", "ActiveModel", "TargetModel", "Transition", "Age"]),
        ("inferenceservices", ["isvc"], ["URL", "Ready", "Model", "Age"]),
        ("servingruntimes", [], ["Disabled", "ModelType", "Containers", "Valid", "Age"]),
        ("clusterservingruntimes", [], ["Disabled", "ModelType", "Containers", "Valid", "Age"]),
    ],
)
def test_lists_show_what_users_look_for(name: str, short: list[str], columns: list[str]) -> None:
    spec = yaml.safe_load((ROOT / f"deploy/crds/{name}.yaml").read_text())["spec"]
    [version] = spec["versions"]
    assert [one["name"] for one in version["additionalPrinterColumns"]] == columns
    assert spec["names"].get("shortNames", []) == short
    assert version["subresources"] == {"status": {}}
