"""Large V1 requests and answers, whose numbers are taken out and read by pieces: the same as small ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest

from mmcore._ext.v2codec import decode_infer_response, encode_infer_response
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2
from mmcore.server.rest import v1
from mmcore.server.rest.large import without_numbers
from mmcore.server.rest.v1 import predictions_of, request_of

Described = inference_pb2.ModelMetadataResponse.TensorMetadata
ONE = [Described(name="x", datatype="FP32", shape=[-1, -1])]
TWO = [Described(name="a", datatype="INT64", shape=[-1]), Described(name='b"', datatype="BYTES", shape=[-1])]


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v1, "LARGE_BYTES", 0)
    monkeypatch.setattr(v1, "LARGE_ELEMENTS", 4)


def read(body: bytes, inputs: list[Any]) -> tuple[Any, bool]:
    message, rows = request_of("m", body, inputs)
    return inference_pb2.ModelInferRequest.FromString(message), rows


@pytest.mark.parametrize(
    ("document", "inputs"),
    [
        ({"instances": [[1, 2.5], [3, 0.1]]}, ONE),
        ({"instances": [1, 2, 3]}, ONE),
        ({"instances": [[[1, 2, 3], [4, 5, 6]]] * 7}, ONE),
        ({"instances": [[[1]]], "signature_name": "instances"}, ONE),
        ({"inputs": [[1, 2], [3, 4], [5, 6]]}, ONE),
        ({"inputs": {"x": [[1, None], [3, 4]]}}, ONE),
        ({"inputs": {"a": [1, 2, 3], 'b"': ["x", ': [1, 2], "a": [9]', '"a": [7]']}}, TWO),
        ({"inputs": {"a": 0, 'b"': ["x"]}}, TWO),
        ({"inputs": {'b"': ["\\"], "a": [5]}}, TWO),
        ({"instances": [{"a": 1, 'b"': "x"}, {"a": 2, 'b"': "y"}]}, TWO),
        ({"instances": [{"a": [1, 2], 'b"': ["x", "y"]}]}, TWO),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_large_request_is_read_as_a_small_one(
    document: Any, inputs: list[Any], indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(document, indent=indent).encode()
    small = read(body, inputs)
    monkeypatch.setattr(v1, "LARGE_BYTES", 0)
    assert read(body, inputs) == small


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"instances": [[1, 2], [3]]}', "arrays of one length"),
        (b'{"instances": [[1], 2]}', "arrays of one length"),
        (b'{"instances": [[[1, 2]], [[3, 4], [5, 6]]]}', "arrays of one length"),
        (b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "arrays of one length"),
        (b'{"instances": [[1, 2], [3, x]]}', "malformed JSON"),
        (b'{"instances": [[1, 2], [3, ]]}', "malformed JSON"),
        (b'{"instances": []}', "expected 1 elements"),
        (b'{"instances": {"": 0}}', "expected an array"),
        (b'{"instances": [1], "inputs": [1]}', "either 'instances' or 'inputs'"),
        (b'{"instances": [1]', "malformed JSON"),
        (b'{"instances": [1]]}', "malformed JSON"),
    ],
)
def test_what_is_wrong_with_a_large_request_is_told(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        request_of("m", body, ONE)


@pytest.mark.timeout(15)
def test_what_looks_like_numbers_again_and_again_is_looked_through_once() -> None:
    text = b'"data":[' * 200_000
    assert without_numbers(text) == (text, [])


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize(
    "values",
    [
        np.arange(30, dtype=np.float32).reshape(10, 3) / 8,
        np.array([[1, np.nan], [np.inf, -np.inf], [3, 4]], np.float64),
        np.arange(7, dtype=np.int64),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.zeros((0, 3), np.float32),
        np.array([True, False, True, True, False]),
    ],
)
def test_a_large_answer_is_written_as_a_small_one(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datatype = {"f4": "FP32", "f8": "FP64", "i8": "INT64", "u1": "UINT8", "b1": "BOOL"}[values.dtype.str[1:]]
    body = encode_infer_response("m", "", "", [("y", datatype, values)], raw=True)
    response = decode_infer_response(b"".join(body) if isinstance(body, list) else bytes(body))
    large = orjson.dumps(predictions_of(response, True))
    monkeypatch.setattr(v1, "LARGE_ELEMENTS", 10**9)
    assert large == orjson.dumps(predictions_of(response, True))


@pytest.mark.parametrize(
    ("platform", "values", "predictions"),
    [
        ("sklearn", np.array([[1], [0]]), [1, 0]),
        ("xgboost", np.array([[5]]), [5]),
        ("lightgbm", np.zeros((0, 1), np.int64), []),
        ("sklearn", np.array([[1, 0]]), [[1, 0]]),
        ("sklearn", np.zeros((1, 1, 1), np.int64), [[[0]]]),
        ("onnxruntime_onnx", np.array([[1], [0]]), [[1], [0]]),
    ],
)
def test_a_row_of_one_is_its_value_where_kserve_answers_it_so(platform: str, values: Any, predictions: Any) -> None:
    body = encode_infer_response("m", "", "", [("predict", "INT64", values)], raw=True)
    response = decode_infer_response(b"".join(body) if isinstance(body, list) else bytes(body))
    assert predictions_of(response, True, platform=platform) == predictions


def test_a_model_that_tells_no_inputs_is_to_be_asked_by_v2() -> None:
    with pytest.raises(InvalidRequest, match=r"tells no inputs.*/v2/models"):
        request_of("m", b'{"instances": [[1]]}', [])
