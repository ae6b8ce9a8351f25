"""Predictors of every built-in format, from claims, S3 and the web: the archived release's acceptance tests of models.

The numbers in the comments are those of its suite (P: predictors, T: storage).
"""

from __future__ import annotations

import asyncio
import io
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import onnx
import pytest
import xgboost
from sklearn.linear_model import LogisticRegression

from mmcore.controller.objects import CONFIG_MAP, DEPLOYMENT, INFERENCE_SERVICE, PREDICTOR, at
from mmcore.errors import RpcError
from tests.api_servers import secret
from tests.clusters import Cluster, failed, infer, inference_service, predictor, runtime, state
from tests.management import SCALE
from tests.serving import write_model
from tests.stores import BUCKET, Bucket, Site, moto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

random = np.random.default_rng(8)
ROWS = random.normal(size=(60, 4)).astype(np.float32)
LABELS = (ROWS.sum(axis=1) > 0).astype(int)
FORMATS = ("sklearn", "xgboost", "lightgbm", "onnx", "python")


def sklearn_file(labels: Any) -> bytes:
    file = io.BytesIO()
    joblib.dump(LogisticRegression().fit(ROWS, labels), file)
    return file.getvalue()


def onnx_file(factor: float) -> bytes:
    rows = onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["n", 4])
    scaled = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["n", 4])
    value = onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [1], [factor])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["X", "factor"], ["Y"])], "scale", [rows], [scaled], [value]
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())


def write_formats(models: Path) -> None:
    """Two models of each format, named FORMAT-1 and FORMAT-2, of which the second answers the opposite."""
    for number, labels in ((1, LABELS), (2, 1 - LABELS)):
        files = {
            f"sklearn-{number}/model.joblib": sklearn_file(labels),
            f"onnx-{number}/model.onnx": onnx_file(number),
        }
        for name, content in files.items():
            (models / name).parent.mkdir()
            (models / name).write_bytes(content)
        (models / f"xgboost-{number}").mkdir()
        booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(ROWS, labels), 4)
        booster.save_model(models / f"xgboost-{number}" / "model.json")
        (models / f"lightgbm-{number}").mkdir()
        options = {"objective": "binary", "verbose": -1, "min_data_in_leaf": 1, "num_threads": 1}
        trained = lightgbm.train(options, lightgbm.Dataset(ROWS, labels), 4)
        trained.save_model(models / f"lightgbm-{number}" / "model.txt")
        write_model(models, f"python-{number}", SCALE.replace("FACTOR", str(number)))


async def answer(cluster: Cluster, name: str) -> Any:
    """What a model of a format says of a row; a model of Python takes any numbers."""
    rows = ROWS[0] if name.startswith("python") else ROWS[:1]
    given = {"sklearn": "predict", "xgboost": "predict", "lightgbm": "predict"}.get(name, "X")
    return (await cluster.ask(name, rows, name=given)).ravel().astype(float)


async def test_models_of_all_formats_are_loaded_updated_and_kept(cluster: Cluster) -> None:
    write_formats(cluster.models)
    await cluster.apply(runtime("own", *FORMATS))
    for name in FORMATS:  # P1, P2, P3
        await cluster.apply(predictor(name, f"{name}-1", model_type=name))
    first = {}
    for name in FORMATS:
        status = (await cluster.until(PREDICTOR, name, state("Loaded")))["status"]
        assert (status["available"], status["transitionStatus"]) == (True, "UpToDate")
        assert "lastFailureInfo" not in status
        first[name] = await answer(cluster, name)  # P13 to P24

    for name in FORMATS:  # P4
        await cluster.apply(predictor(name, f"{name}-2", model_type=name))
    for name in FORMATS:
        done = lambda one: one["status"].get("observedGeneration") == 2 and state("Loaded")(one)  # noqa: E731
        status = (await cluster.until(PREDICTOR, name, done))["status"]
        assert (status["available"], status["transitionStatus"]) == (True, "UpToDate")
        assert not np.array_equal(await answer(cluster, name), first[name])

    for name in FORMATS:  # P5
        await cluster.apply(predictor(name, "nowhere", model_type=name))
    for name in FORMATS:
        status = (await cluster.until(PREDICTOR, name, state("Loaded", "FailedToLoad")))["status"]
        assert (status["available"], status["transitionStatus"]) == (True, "BlockedByFailedLoad")
        assert status["lastFailureInfo"]["reason"] == "ModelLoadFailed"
        assert {"location", "time", "message", "modelId"} <= status["lastFailureInfo"].keys()
        await answer(cluster, name)

    # P11: another path and another type.
    await cluster.apply(predictor("sklearn", "xgboost-1", model_type="xgboost"))
    await cluster.until(PREDICTOR, "sklearn", lambda one: state("Loaded")(one) and not failed("ModelLoadFailed")(one))
    assert np.allclose(await answer(cluster, "sklearn"), first["xgboost"])

    # P18: what does not fit is refused with a reason, and REST answers as gRPC does.
    with pytest.raises(RpcError) as refused:
        await cluster.ask("xgboost", ROWS[:, :2])
    assert refused.value.details
    body = {"inputs": [{"name": "X", "shape": [1], "datatype": "FP32", "data": [5]}]}
    url = f"http://{await cluster.instance()}:{cluster.rest_port}/v2/models/python/infer"
    found = await asyncio.to_thread(post, url, body)
    assert (found["model_name"], found["outputs"][0]["data"]) == ("python", [10])
    with urllib.request.urlopen(url.removesuffix("/infer"), timeout=10) as described:
        assert json.loads(described.read())["name"] == "python"
    with pytest.raises(urllib.error.HTTPError):
        await asyncio.to_thread(post, url, {"inputs": []})


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as found:
        return json.loads(found.read())


async def test_models_come_from_buckets_and_sites(cluster: Cluster) -> None:
    site = Site()
    site.files["/repo/model.joblib"] = sklearn_file(LABELS)
    with moto() as endpoint:
        try:
            await stores(cluster, endpoint, site)
        finally:
            site.close()


async def stores(cluster: Cluster, endpoint: str, site: Site) -> None:
    bucket = Bucket(endpoint)
    bucket.client.create_bucket(Bucket=BUCKET)
    bucket.put("svm/model.joblib", sklearn_file(LABELS))
    entries = {
        "s3": bucket.entry,
        "wrong": {**bucket.entry, "bucket": "no-such-bucket"},
        # Objects within an entry, and one that is no entry at all, are in nobody's way.
        "web": {"type": "http", "url": site.url, "headers": {"X-Of-Ours": ["1"]}},
        "broken": "{no JSON",
    }
    await cluster.apply(secret(cluster.namespace, "storage-config", **entries))
    await cluster.apply(runtime("own", "sklearn"))

    def stored(key: str, path: str) -> Any:
        item = predictor(f"{key}-{path.replace('/', '-')}", "x", model_type="sklearn")
        item["spec"]["storage"] = {"key": key, "path": path}
        return item

    await cluster.apply(stored("s3", "svm"))
    await cluster.apply(stored("web", "repo/model.joblib"))
    await cluster.apply(stored("wrong", "svm"))  # P7
    legacy = predictor("legacy", "x", model_type="sklearn")
    legacy["spec"] |= {"storage": {"s3": {"secretKey": "s3", "bucket": BUCKET}}, "path": "svm/model.joblib"}
    await cluster.apply(legacy)
    nothing = predictor("nothing", "x", model_type="sklearn")  # P12
    del nothing["spec"]["storage"]
    await cluster.apply(nothing)
    # P26, P27 and T1
    model = {"modelFormat": {"name": "sklearn"}, "protocolVersion": "grpc-v2", "storageUri": f"s3://{BUCKET}/svm"}
    await cluster.apply(inference_service("new", {"model": model}, secretKey="s3"))
    await cluster.apply(inference_service("old", {"sklearn": {"storageUri": f"s3://{BUCKET}/svm"}}, secretKey="s3"))
    uri = f"{site.url}/repo/model.joblib?raw=true"
    await cluster.apply(inference_service("site", {"model": {"modelFormat": {"name": "sklearn"}, "storageUri": uri}}))

    for name in ("s3-svm", "web-repo-model.joblib", "legacy"):
        await cluster.until(PREDICTOR, name, state("Loaded"))
    expected = float(LogisticRegression().fit(ROWS, LABELS).predict(ROWS[:1])[0])
    for name in ("new", "old", "site"):
        loaded = lambda one: at(one, "status", "modelStatus", "states", "activeModelState") == "Loaded"  # noqa: E731
        await cluster.until(INFERENCE_SERVICE, name, loaded)
    for name in ("s3-svm", "web-repo-model.joblib", "legacy", "new", "old", "site"):
        assert (await cluster.ask(name, ROWS[:1], name="predict")).ravel()[0] == expected
    for name in ("wrong-svm", "nothing"):
        status = (await cluster.until(PREDICTOR, name, failed("ModelLoadFailed")))["status"]
        assert (status["activeModelState"], status["available"]) == ("FailedToLoad", False)
        assert {"location", "time"} <= status["lastFailureInfo"].keys()
    assert any(path.endswith("?raw=true") for _, path, _ in site.requests)
    assert any(headers.get("x-of-ours") == "1" for _, _, headers in site.requests)
    told = await cluster.events("storage-config")
    assert ("InvalidEntry", "no JSON object: broken") in told


async def test_claims_are_mounted_as_models_and_settings_name_them(cluster: Cluster) -> None:
    write_model((cluster.claims / "second"), "scale-5", SCALE.replace("FACTOR", "5"))
    write_model((cluster.claims / "third"), "scale-7", SCALE.replace("FACTOR", "7"))
    entries = {name: {"type": "pvc", "name": name} for name in ("models", "second")}
    await cluster.apply(secret(cluster.namespace, "storage-config", **entries))
    await cluster.apply(runtime("own", "python"))

    def of(claim: str, path: str) -> Any:
        item = predictor(claim, path)
        item["spec"]["storage"]["parameters"]["name"] = claim
        return item

    await cluster.apply(of("models", "scale-2"))  # T2, T3
    await cluster.apply(of("second", "scale-5"))  # T4
    await cluster.apply(of("third", "scale-7"))
    await cluster.until(PREDICTOR, "models", state("Loaded"))
    await cluster.until(PREDICTOR, "second", state("Loaded"))
    assert await infer(cluster, "second", 2) == 10
    info = (await cluster.until(PREDICTOR, "third", failed("ModelLoadFailed")))["status"]["lastFailureInfo"]  # T5
    assert {"location", "time"} <= info.keys()

    # T6, T7: any claim that is there, if the configuration says so; one that is not stops no pod.
    claim = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "third"}, "spec": claim}
    await cluster.apply(volume)
    await cluster.apply(of("missing", "scale-2"))
    await cluster.configure(allowAnyPVC=True)
    await cluster.until(PREDICTOR, "third", state("Loaded"))
    assert await infer(cluster, "third", 1) == 7
    await cluster.until(PREDICTOR, "missing", failed("ModelLoadFailed"))
    await cluster.until(PREDICTOR, "models", state("Loaded"))


async def test_runtimes_of_one_model_are_not_ours(cluster: Cluster) -> None:
    await cluster.apply(runtime("single", "python", multiModel=False))  # P25
    await cluster.apply(predictor("m", "scale-2"))
    status = (await cluster.until(PREDICTOR, "m", failed("NoSupportingRuntime")))["status"]
    assert not status["available"]
    assert await cluster.get(DEPLOYMENT, "modelmesh-serving-single") is None
    assert await cluster.get(CONFIG_MAP, "tc-config") is None
