"""Answers and requests written from arrays."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcore._ext.v2codec import (
    decode_infer_request,
    decode_infer_response,
    encode_infer_request,
    encode_infer_response,
)
from mmcore.errors import InferenceFailed, InvalidRequest
from mmcore.pb import inference_pb2

ONE = np.arange(4, dtype=np.float32).reshape(1, 4)


def answer(
    outputs: list[tuple[str, str, NDArray[Any] | tuple[int, ...]]], *, raw: bool = True, **options: Any
) -> bytes:
    """An answer small enough to be one piece."""
    message = encode_infer_response("m", "1", "", outputs, raw=raw, **options)
    assert isinstance(message, bytes)
    return message


def int32(*shape: int) -> NDArray[np.int32]:
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


def refused(text: str) -> Any:
    return pytest.raises(InvalidRequest, match=f"^{re.escape(text)}$")


def test_large_outputs_leave_without_a_copy_and_stay_alive() -> None:
    large, small, other = np.ones((1, 3, 64, 64), np.float32), ONE, np.full(5000, 7, np.int32)
    pieces = encode_infer_response(
        "m", "1", "id", [("l", "FP32", large), ("s", "FP32", small), ("o", "INT32", other)], raw=True
    )
    assert isinstance(pieces, list)
    assert [type(piece) for piece in pieces] == [bytes, memoryview, bytes, memoryview]
    assert np.shares_memory(np.frombuffer(pieces[1], np.uint8), large)
    gone = weakref.ref(other)
    expected = [large.tobytes(), small.tobytes(), other.tobytes()]
    del large, other
    gc.collect()
    assert gone() is not None
    message = inference_pb2.ModelInferResponse.FromString(b"".join(pieces))
    assert list(message.raw_output_contents) == expected
    del pieces
    assert gone() is None


def test_small_outputs_after_a_large_one_come_in_a_last_piece() -> None:
    large = np.ones(5000, np.float32)
    pieces = encode_infer_response("m", "", "", [("l", "FP32", large), ("s", "FP32", ONE)], raw=True)
    assert [type(piece) for piece in pieces] == [bytes, memoryview, bytes]
    message = inference_pb2.ModelInferResponse.FromString(b"".join(pieces))  # type: ignore[arg-type]  # a list
    assert list(message.raw_output_contents) == [large.tobytes(), ONE.tobytes()]


def test_messages_above_what_protobuf_can_hold_are_refused() -> None:
    """The memory is reserved and never touched."""
    huge = bytes(2**31)
    with refused("expected a message of at most 2147483647 bytes, got 2147483648"):
        decode_infer_request(huge)
    array = np.zeros(2**31, np.uint8)
    with pytest.raises(
        InferenceFailed, match=r"a message has at most 2147483647 bytes, this one would have 21474836\d\d"
    ):
        encode_infer_response("m", "", "", [("x", "UINT8", array)], raw=True)


def test_large_outputs_of_made_contents_come_as_bytes() -> None:
    """BF16 and BYTES have to be written; a list is for arrays that are sent from where they lie."""
    big = np.ones(20_000, np.float32)
    assert isinstance(encode_infer_response("m", "", "", [("x", "BF16", big)], raw=True), bytes)
    assert isinstance(encode_infer_response("m", "", "", [("x", "FP32", big)], raw=False), bytes)


def test_a_typed_answer_with_a_raw_only_datatype_is_raw() -> None:
    body = answer([("a", "FP16", np.ones(2, np.float16)), ("b", "FP32", ONE)], raw=False)
    message = inference_pb2.ModelInferResponse.FromString(body)
    assert len(message.raw_output_contents) == 2
    assert not message.outputs[1].HasField("contents")


def test_strings_and_fixed_width_bytes_are_bytes_tensors() -> None:
    for array in (np.array(["a", "ü"], object), np.array(["a", "ü"]), np.array([b"a", "ü".encode()])):
        body = answer([("x", "BYTES", array)])
        assert decode_infer_response(body).outputs[0].array().tolist() == [b"a", "ü".encode()]
        body = answer([("x", "BYTES", array)], raw=False)
        assert list(inference_pb2.ModelInferResponse.FromString(body).outputs[0].contents.bytes_contents) == [
            b"a",
            "ü".encode(),
        ]


def test_arrays_of_any_layout_and_byte_order_are_written_right() -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (base.T, base[::2, ::-1], np.asfortranarray(base), base.astype(">i4"), base[1:1], base[0, 0:1]):
        body = answer([("x", "INT32", array)])
        assert decode_infer_response(body).outputs[0].array().tolist() == array.tolist()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (("x", "FP32", np.ones(2)), "output 'x': FP32 is made from float32, got float64"),
        (("x", "INT32", [1, 2]), "output 'x': INT32 is made from a numpy array, got list"),
        (("x", "FP99", ONE), "output 'x': unknown datatype 'FP99'"),
        (("x", "FP32", (1,) * 33), "output 'x': more than 32 dimensions"),
        (("x", "BYTES", np.array([b"a", 5], object)), "output 'x': BYTES elements are bytes or str, got int"),
    ],
)
def test_an_answer_that_cannot_be_sent_names_the_output(output: Any, told: str) -> None:
    with pytest.raises(InferenceFailed, match=f"^model 'm' gave an answer that cannot be sent: {re.escape(told)}$"):
        encode_infer_response("m", "", "", [("first", "FP32", ONE), output], raw=True)


def test_parameters_of_no_kind_are_refused() -> None:
    with pytest.raises(InferenceFailed, match="parameter 'p' is bool, int, float or str, got bytes"):
        encode_infer_response("m", "", "", [], raw=True, parameters={"p": b""})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="parameter 'p' needs more than 64 bits"):
        encode_infer_request("m", [], parameters={"p": 2**64})
    with pytest.raises(InferenceFailed, match="output 'x': parameter 'p' needs more than 64 bits"):
        encode_infer_response("m", "", "", [("x", "FP32", ONE)], raw=True, output_parameters={"x": {"p": -(2**63) - 1}})


def test_ten_outputs_are_written_in_order() -> None:
    outputs: list[Any] = [(f"o{number}", "INT32", int32(number)) for number in range(10)]
    body = answer(outputs)
    assert [tensor.array().tolist() for tensor in decode_infer_response(body).outputs] == [
        list(range(number)) for number in range(10)
    ]
