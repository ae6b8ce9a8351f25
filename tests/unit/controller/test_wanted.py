"""What Predictors and InferenceServices ask for, in every form that manifests have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmcore.controller.wanted import InvalidSpec, is_served, of_inference_service, of_predictor


def predictor(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "m"}, "spec": {"modelType": {"name": "onnx"}, **spec}}


def service(predictor: dict[str, Any], **annotations: str) -> dict[str, Any]:
    stated = {f"serving.kserve.io/{key}": value for key, value in annotations.items()}
    return {"metadata": {"name": "m", "annotations": stated}, "spec": {"predictor": predictor}}


def block(**fields: Any) -> dict[str, Any]:
    return {"model": {"modelFormat": {"name": "sklearn"}, **fields}}


def test_a_predictor_in_the_new_form() -> None:
    storage = {"key": "minio", "path": "a/b", "schemaPath": "s.json", "parameters": {"bucket": "models"}}
    found = of_predictor(predictor(storage=storage, protocolVersion="grpc-v2", runtime={"name": "triton"}))
    assert (found.path, found.runtime, found.protocol) == ("a/b", "triton", "grpc-v2")
    assert json.loads(found.key) == {
        "storage_key": "minio",
        "storage_params": {"bucket": "models"},
        "model_type": {"name": "onnx"},
        "schema_path": "s.json",
    }


def test_a_predictor_in_the_old_form() -> None:
    found = of_predictor(predictor(path="a", schemaPath="s", storage={"s3": {"secretKey": "k", "bucket": "b"}}))
    assert (found.path, found.schema_path, found.storage_key, found.storage_params) == ("a", "s", "k", {"bucket": "b"})


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"path": "a", "storage": {"path": "b"}}, "spec.path"),
        ({"schemaPath": "a", "storage": {"schemaPath": "b"}}, "spec.schemaPath"),
        ({"storage": {"persistentVolumeClaim": {"claimName": "c"}}}, "persistentVolumeClaim"),
        ({"storage": {"s3": {"secretKey": "k"}, "path": "b"}}, "spec.storage.s3"),
        ({"storage": {"path": "/etc", "parameters": {"type": "local"}}}, "the type local"),
    ],
)
def test_a_predictor_that_contradicts_itself(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec, match=told.replace(".", r"\.")):
        of_predictor(predictor(**spec))


@pytest.mark.parametrize(
    ("uri", "path", "params"),
    [
        ("s3://bucket/a/b", "a/b", {"type": "s3", "bucket": "bucket"}),
        ("gs://bucket/a", "a", {"type": "gcs", "bucket": "bucket"}),
        ("pvc://claim/a", "a", {"type": "pvc", "name": "claim"}),
        ("https://host/a/b?raw=1", "a/b", {"type": "http", "url": "https://host?raw=1"}),
        (
            "https://acct.blob.core.windows.net/box/a",
            "a",
            {"type": "azure", "account_name": "acct", "container": "box"},
        ),
    ],
)
def test_a_storage_uri(uri: str, path: str, params: dict[str, str]) -> None:
    found = of_inference_service(service(block(storageUri=uri)))
    assert (found.path, found.storage_params) == (path, params)


def test_what_the_uri_says_goes_before_the_parameters() -> None:
    storage = {"parameters": {"bucket": "other", "region": "eu"}}
    found = of_inference_service(service(block(storageUri="s3://b/p", storage=storage), secretKey="k"))
    assert found.storage_params == {"type": "s3", "bucket": "b", "region": "eu"}
    assert found.storage_key == "k"


def test_the_block_of_a_framework() -> None:
    found = of_inference_service(
        service({"sklearn": {"storageUri": "s3://b/p"}}, servingRuntime="mlserver-1.x", schemaPath="s")
    )
    assert (found.format, found.runtime, found.schema_path) == ("sklearn", "mlserver-1.x", "s")


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (service({}), "has no model"),
        (service({**block(storageUri="s3://b/p"), "onnx": {"storageUri": "s3://b/p"}}), "both model and onnx"),
        (service(block(storageUri="s3://b/p"), servingRuntime="x"), "servingRuntime"),
        (service(block(storageUri="s3://b/p", storage={"path": "p"})), "cannot both be specified"),
        (service(block()), "place is missing"),
        (service(block(storageUri="ftp://b/p")), "storageUri"),
        (service(block(storageUri="file:///etc/passwd")), "local is not served"),
    ],
)
def test_an_inference_service_that_cannot_be_served(item: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        of_inference_service(item)


def test_only_the_mode_modelmesh_is_served() -> None:
    assert is_served(service({}, deploymentMode="ModelMesh"))
    assert not is_served(service({}, deploymentMode="Serverless"))
    assert not is_served(service({}))


def test_what_changes_nothing_of_the_model_is_no_new_model() -> None:
    plain, marked = predictor(path="a"), predictor(path="a", gpu="required", serviceAccountName="x")
    assert of_predictor(plain).model_id("rt:x") == of_predictor(marked).model_id("rt:x")
    for other in (of_predictor(predictor(path="b")).model_id("rt:x"), of_predictor(plain).model_id("rt:y")):
        assert other != of_predictor(plain).model_id("rt:x")
    assert of_predictor(plain).model_id("rt:x").startswith("m__ksp-")
