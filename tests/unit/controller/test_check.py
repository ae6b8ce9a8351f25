"""``mmcore controller check``: what it says of manifests that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcore.cli.main import run
from mmcore.controller.check import check, read
from tests.serving import ROOT
from tests.unit.controller.objects import serving_runtime

MANIFESTS = """
apiVersion: serving.kserve.io/v1alpha1
kind: ClusterServingRuntime
metadata: {name: mlserver-1.x}
spec:
  multiModel: true
  supportedModelFormats: [{name: sklearn, version: "0", autoSelect: true}]
  protocolVersions: [grpc-v2]
  builtInAdapter: {serverType: mlserver}
  containers: [{name: mlserver, image: mlserver, resources: {limits: {memory: 1Gi}}}]
---
apiVersion: v1
kind: List
items:
  - apiVersion: serving.kserve.io/v1alpha1
    kind: Predictor
    metadata: {name: good}
    spec: {modelType: {name: sklearn, version: "0.24"}, gpu: preferred, storage: {path: p}}
  - apiVersion: serving.kserve.io/v1alpha1
    kind: Predictor
    metadata: {name: bad}
    spec: {modelType: {name: sklearn}, path: a, storage: {path: b}}
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: mesh, annotations: {serving.kserve.io/deploymentMode: ModelMesh}}
spec: {predictor: {minReplicas: 1, model: {modelFormat: {name: pmml}, storageUri: "s3://b/p"}}}
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: alone}
spec: {predictor: {}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: model-serving-config}
data: {config.yaml: "modelMeshImage: {name: x}"}
---
apiVersion: v1
kind: Secret
metadata: {name: storage-config}
stringData: {minio: '{"type": "s3"}', odd: nonsense}
"""


def test_every_object_is_judged() -> None:
    findings = {(one.name, one.level): one.text for one in check(read([MANIFESTS]))}
    assert findings["ClusterServingRuntime mlserver-1.x", "ok"] == "its pods run 'mlserver' and one instance beside it"
    assert findings["Predictor good", "ok"] == "it goes to the runtime 'mlserver-1.x'"
    assert "gpu has no effect" in findings["Predictor good", "note"]
    assert "spec.path" in findings["Predictor bad", "error"]
    assert "no runtime lists the format 'pmml'" in findings["InferenceService mesh", "error"]
    assert "minReplicas" in findings["InferenceService mesh", "note"]
    assert "left to KServe's controller" in findings["InferenceService alone", "note"]
    assert "modelmeshimage has no effect" in findings["ConfigMap model-serving-config", "note"]
    assert "'odd'" in findings["Secret storage-config", "error"]


def test_of_what_was_for_the_adapters_container_the_limits_have_an_effect() -> None:
    env = [{"name": "DEFAULT_MODELSIZE", "value": "1"}, {"name": "LOADING_CONCURRENCY", "value": "3"}]
    item = serving_runtime(builtInAdapter={"serverType": "triton", "modelLoadingTimeoutMillis": 90000, "env": env})
    item["metadata"]["annotations"] = {"maxLoadingConcurrency": "2", "productConfig": "x"}
    notes = [one.text for one in check([item]) if one.level == "note"]
    assert [note.partition(":")[0] for note in notes] == [
        "productConfig has no effect", "builtInAdapter.env DEFAULT_MODELSIZE has no effect"
    ]  # fmt: skip


def test_limits_that_instances_have_not_themselves_are_told() -> None:
    adapter = {"serverType": "mmcore", "modelLoadingTimeoutMillis": 90000}
    item = serving_runtime(builtInAdapter=adapter, containers=[{"name": "mmcore"}])
    item["metadata"]["annotations"] = {"maxLoadingConcurrency": "2"}
    [note] = [one.text for one in check([item]) if one.level == "note"]
    assert note.startswith("builtInAdapter.modelLoadingTimeoutMillis has no effect")


def test_the_command_fails_where_something_will_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(MANIFESTS)
    assert run(["controller", "check", str(file)]) == 1
    assert "error  Predictor bad: " in capsys.readouterr().out
    file.write_text("kind: Namespace\nmetadata: {name: x}\n")
    assert run(["controller", "check", str(file)]) == 0
    file.write_text("a: [")
    assert run(["controller", "check", str(file)]) == 1


def test_what_is_shipped_works() -> None:
    files = [*ROOT.glob("deploy/runtimes/cluster/*.yaml"), *ROOT.glob("deploy/samples/kubernetes/*.yaml")]
    findings = check(read(file.read_text() for file in files if file.name != "kustomization.yaml"))
    assert {one.level for one in findings} == {"ok"}, findings
    assert len([one for one in findings if "it goes to the runtime" in one.text]) >= 8


@pytest.mark.parametrize(("name", "role"), [("model-serving-tls", False), ("mine", True)])
def test_the_secret_of_tls_is_told_and_who_must_be_let_to_read_it(name: str, role: bool) -> None:
    config = {"config.yaml": f"tls: {{secretName: {name}}}"}
    item = {"kind": "ConfigMap", "metadata": {"name": "model-serving-config"}, "data": config}
    [note] = [one.text for one in check([item]) if one.level == "note"]
    assert f"the secret {name} must be in every namespace" in note
    assert ("role" in note) == role


def archived(*more: str) -> dict[str, list[tuple[str, str]]]:
    """What is said of the manifests of an installation of the archived release, by object."""
    texts = [(ROOT / "tests/data/archived" / f"{name}.yaml").read_text() for name in ("runtimes", "installation")]
    found: dict[str, list[tuple[str, str]]] = {}
    for one in check(read([*texts, *more])):
        found.setdefault(one.name, []).append((one.level, one.text))
    return found


def test_an_installation_of_the_archived_release_is_told_what_becomes_of_it() -> None:
    found = archived()
    for name in ("triton-2.x", "mlserver-1.x", "ovms-1.x", "torchserve-0.x"):
        assert ("ok", f"its pods run '{name[:-4]}' and one instance beside it") in found[
            f"ClusterServingRuntime {name}"
        ]
    assert ("ok", "it goes to the runtime 'triton-2.x'") in found["Predictor tf-mnist"]
    assert ("ok", "it goes to the runtime 'triton-2.x'") in found["Predictor xgboost-fil"]
    assert ("ok", "it goes to the runtime 'ovms-1.x'") in found["Predictor face-openvino"]
    assert ("ok", "it goes to the runtime 'torchserve-0.x'") in found["Predictor image-mar"]
    assert "error" not in [level for one in found.values() for level, _ in one]
    assert ("ok", "it goes to the runtime 'mlserver-1.x'") in found["InferenceService sklearn-digits"]
    assert found["Secret storage-config"] == [("ok", "1 entries are read as before")]
    assert [text for level, text in found["Secret model-serving-etcd"] if "registered anew" in text]
    [webhook] = found["ValidatingWebhookConfiguration modelmesh-servingruntime.serving.kserve.io"]
    assert webhook[0] == "note" and "delete it" in webhook[1]
    config = " ".join(text for _, text in found["ConfigMap model-serving-config"])
    for key in ("modelmeshimage", "modelmeshresources", "storagehelperimage", "payloadprocessors", "restProxy.image"):
        assert f"{key} has no effect" in config


def test_beside_ours_models_of_the_archived_release_go_to_instances_unless_they_name_another() -> None:
    found = archived((ROOT / "deploy/runtimes/cluster/mmcore.yaml").read_text())
    assert ("ok", "it goes to the runtime 'mmcore'") in found["Predictor tf-mnist"]
    assert ("ok", "it goes to the runtime 'mmcore'") in found["Predictor face-openvino"]
    assert ("ok", "it goes to the runtime 'triton-2.x'") in found["Predictor xgboost-fil"]


def test_a_field_that_is_not_known_is_told() -> None:
    item = serving_runtime(workerSpec={})
    assert [one.text for one in check([item]) if one.level == "note"] == ["spec: workerSpec have no effect"]


def test_manifests_of_an_odd_shape_are_errors_of_their_own() -> None:
    odd = """
{kind: List, items: [1, null]}
---
{kind: PredictorList, items: 5}
---
{kind: Predictor, metadata: x}
---
{kind: ServingRuntime, metadata: {name: r}, spec: {multiModel: true, containers: 3}}
"""
    [finding] = [one for one in check(read([odd, MANIFESTS])) if one.name == "ServingRuntime r"]
    assert finding.level == "error"
    assert "not of the type" in finding.text


def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("page.md", b"| a |"), ("packed.gz", b"\x1f\x8b\x08")):
        file = tmp_path / name
        file.write_bytes(content)
        assert run(["controller", "check", str(file)]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"mmcore: {file}: ")
