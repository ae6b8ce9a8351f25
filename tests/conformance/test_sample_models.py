"""The sample models, trained by their script and asked with tritonclient as its users would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.serving import ROOT, Serve

pytestmark = pytest.mark.slow

FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.4, 3.2, 4.5, 1.5], [7.1, 3.0, 5.9, 2.1]])


@pytest.fixture(scope="module")
def samples() -> Path:
    folder = ROOT / "build" / "samples"
    subprocess.run([sys.executable, ROOT / "deploy/samples/train.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def client(serve_for_session: Serve, samples: Path) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(serve_for_session(samples).grpc) as client:
        yield client


def ask(
    client: triton.InferenceServerClient,
    model: str,
    array: np.ndarray[Any, Any],
    datatype: str,
    name: str,
    *outputs: str,
) -> triton.InferResult:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return client.infer(model, [made], outputs=[triton.InferRequestedOutput(one) for one in outputs] or None)


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", np.float32), ("FP64", np.float64)])
@pytest.mark.parametrize("name", ["predict", "anything"])
def test_a_classifier_takes_any_name_and_kind_of_number(
    client: triton.InferenceServerClient, datatype: str, dtype: Any, name: str
) -> None:
    result = ask(client, "iris-sklearn", FLOWERS.astype(dtype), datatype, name)
    answer = result.as_numpy("predict")
    assert answer.dtype == np.int64
    assert answer.tolist() == [[0], [1], [2]]


def test_a_classifier_answers_probabilities_when_asked(client: triton.InferenceServerClient) -> None:
    result = ask(client, "iris-sklearn", FLOWERS, "FP64", "x", "predict_proba", "predict")
    assert [output.name for output in result.get_response().outputs] == ["predict_proba", "predict"]
    probabilities = result.as_numpy("predict_proba")
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert probabilities.argmax(axis=1).tolist() == [0, 1, 2]


def test_xgboost_answers_fp32(client: triton.InferenceServerClient) -> None:
    answer = ask(client, "iris-xgboost", FLOWERS.astype(np.float32), "FP32", "x").as_numpy("predict")
    assert answer.dtype == np.float32
    assert answer.shape == (3, 3)
    assert answer.argmax(axis=1).tolist() == [0, 1, 2]


def test_onnx_has_its_graphs_names(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("mlp-onnx")
    assert (metadata.platform, metadata.inputs[0].name, metadata.outputs[0].name) == (
        "onnxruntime_onnx",
        "input",
        "probabilities",
    )
    answer = ask(client, "mlp-onnx", FLOWERS.astype(np.float32), "FP32", "input").as_numpy("probabilities")
    assert answer.argmax(axis=1).tolist() == [0, 1, 2]
    with pytest.raises(InferenceServerException, match="input"):
        ask(client, "mlp-onnx", FLOWERS.astype(np.float32), "FP32", "x")


def test_text_is_added_as_numbers(client: triton.InferenceServerClient) -> None:
    numbers = np.array([[str(number).encode() for number in range(16)]], dtype=np.object_)
    inputs = []
    for name in ("INPUT0", "INPUT1"):
        inputs.append(triton.InferInput(name, [1, 16], "BYTES"))
        inputs[-1].set_data_from_numpy(numbers)
    answer = client.infer("simple_string", inputs).as_numpy("OUTPUT0")
    assert [int(text) for text in answer[0]] == list(range(0, 32, 2))


def test_every_sample_has_a_configuration_and_statistics(client: triton.InferenceServerClient) -> None:
    for row in client.get_model_repository_index().models:
        config = client.get_model_config(row.name).config
        assert config.name == row.name
        assert config.input
        assert config.output
        assert len(client.get_inference_statistics(row.name).model_stats) == 1


def test_a_configuration_can_be_given_back_with_a_load(client: triton.InferenceServerClient) -> None:
    for row in client.get_model_repository_index().models:
        config = client.get_model_config(row.name, as_json=True)["config"]
        client.load_model(row.name, config=json.dumps(config))
        again = client.get_model_config(row.name, as_json=True)["config"]
        assert again == config
        client.load_model(row.name)


def test_a_wrong_number_of_features_is_the_callers_fault(client: triton.InferenceServerClient) -> None:
    for model in ("iris-sklearn", "iris-xgboost"):
        with pytest.raises(InferenceServerException) as error:
            ask(client, model, FLOWERS[:, :3].astype(np.float32), "FP32", "x")
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 5)])
def test_identity_answers_any_shape(client: triton.InferenceServerClient, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    answer = ask(client, "identity", array, "FP32", "INPUT0").as_numpy("OUTPUT0")
    np.testing.assert_array_equal(answer, array)
