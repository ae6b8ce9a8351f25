"""TensorFlow, Keras, TorchScript and OpenVINO models by the runtime that is shipped, from their manifests to answers.

The numbers in the comments are those of the archived release's suite. It served them with Triton and OVMS; the pods of
``mmcore`` answer them themselves, and say themselves what does not fit.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmcore.controller.objects import PREDICTOR, Object
from mmcore.errors import RpcError
from mmcore.pb import inference_pb2
from mmcore.transport import Channel
from tests.clusters import Cluster, failed, predictor, state
from tests.framework_models import INPUTS, rows
from tests.serving import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WITHIN_S = 120.0


def make(folder: Path) -> dict[str, Any]:
    """Write the models; what their frameworks answer."""
    line = [sys.executable, "-m", "tests.framework_models", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "answers.npz"))


async def described(cluster: Cluster, name: str) -> tuple[str, str, str, list[int]]:
    """The model's name and its only input, by its metadata."""
    channel = Channel(f"{await cluster.instance()}:{cluster.grpc_port}")
    try:
        request = inference_pb2.ModelMetadataRequest(name=name).SerializeToString()
        body = await channel.unary("/inference.GRPCInferenceService/ModelMetadata", request, timeout_s=20)
    finally:
        await channel.close()
    found = inference_pb2.ModelMetadataResponse.FromString(body)
    [given] = found.inputs
    return found.name, given.name, given.datatype, list(given.shape)


async def refused(cluster: Cluster, name: str, value: Any, given: str, datatype: str = "FP32") -> str:
    with pytest.raises(RpcError) as error:
        await cluster.ask(name, value, name=given, datatype=datatype)
    return f"{error.value.status.name}: {error.value.details}"


async def test_models_of_large_frameworks_answer_as_their_frameworks_do(cluster: Cluster) -> None:
    shipped: Object = yaml.safe_load((ROOT / "deploy/runtimes/cluster/mmcore.yaml").read_text())
    await cluster.apply({**shipped, "kind": "ServingRuntime"})
    # Another model of the same runtime starts its pod while these are made.
    await cluster.apply(predictor("first", "scale-2"))
    answers = await asyncio.to_thread(make, cluster.models)
    schema = predictor("bare", "pytorch-bare", model_type="pytorch")
    schema["spec"]["storage"]["schemaPath"] = "schema.json"
    versioned = predictor("tf", "tensorflow-1", model_type="tensorflow")
    # What the archived release's documentation has in its examples, and its selection did not find.
    versioned["spec"]["modelType"]["version"] = "1.15"
    for item in (
        versioned,
        predictor("keras", "keras/mnist.h5", model_type="keras"),
        predictor("torch", "pytorch", model_type="pytorch"),
        schema,
        predictor("ir", "openvino", model_type="openvino_ir"),
    ):
        await cluster.apply(item)
    files = {"tf": "tensorflow-1", "keras": "keras", "torch": "pytorch", "bare": "pytorch", "ir": "openvino"}
    for name, file in files.items():
        status = (await cluster.until(PREDICTOR, name, state("Loaded"), within_s=WITHIN_S))["status"]
        assert (status["available"], status["transitionStatus"]) == (True, "UpToDate")
        given, shape = INPUTS[file]
        # P13, P14, P16, P21, P22
        np.testing.assert_allclose(await cluster.ask(name, rows(file), name=given), answers[file], rtol=1e-4, atol=1e-4)
        told, *described_input = await described(cluster, name)
        assert told.startswith(name) and described_input == [given, "FP32", [-1, *shape]]
        wrong = await refused(cluster, name, np.repeat(rows(file), 2, axis=-1), given)
        assert wrong.startswith("INVALID_ARGUMENT") and given in wrong
    assert "FP32" in await refused(cluster, "tf", np.zeros((1, 784), np.int32), "inputs", "INT32")

    # In place: to another of its framework, and from one framework to another.
    await cluster.apply(predictor("tf", "tensorflow-2", model_type="tensorflow"))
    await cluster.apply(predictor("keras", "tensorflow-1", model_type="tensorflow"))
    # What is none of its framework: the one that is served stays.
    await cluster.apply(predictor("torch", "scale-2", model_type="pytorch"))
    for name, file in (("tf", "tensorflow-2"), ("keras", "tensorflow-1")):
        done = lambda one: one["status"].get("observedGeneration") == 2 and state("Loaded")(one)  # noqa: E731
        await cluster.until(PREDICTOR, name, done, within_s=WITHIN_S)
        np.testing.assert_allclose(
            await cluster.ask(name, rows(file), name="inputs"), answers[file], rtol=1e-4, atol=1e-4
        )
    await cluster.until(
        PREDICTOR, "torch", lambda one: state("Loaded", "FailedToLoad")(one) and failed("ModelLoadFailed")(one)
    )
    np.testing.assert_allclose(
        await cluster.ask("torch", rows("pytorch"), name="INPUT__0"), answers["pytorch"], rtol=1e-4, atol=1e-4
    )
