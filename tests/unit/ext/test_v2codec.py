"""Decoding and binding as a server's handler uses them; writing is in test_v2encode.py."""

from __future__ import annotations

import gc
import re
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcore._ext.v2codec import (
    InferRequest,
    InferTensor,
    RequestedOutput,
    Signature,
    decode_infer_request,
    decode_infer_response,
    encode_infer_request,
    encode_infer_response,
)
from mmcore.errors import InvalidRequest
from mmcore.model import NUMPY_DTYPES, TensorSpec
from mmcore.pb import inference_pb2
from tests import wire

ONE = np.arange(4, dtype=np.float32).reshape(1, 4)
ADD_SUB = Signature([TensorSpec("INPUT0", "INT32", (-1, 16)), TensorSpec("INPUT1", "INT32", (-1, 16))])


def request(
    *inputs: tuple[str, str, NDArray[Any] | tuple[int, ...]], name: str = "simple", **options: Any
) -> InferRequest:
    return decode_infer_request(encode_infer_request(name, inputs, **options))


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


# ---- arrays over the body


def test_raw_contents_are_read_only_views_that_keep_the_body_alive() -> None:
    body = encode_infer_request("m", [("x", "UINT8", np.arange(200, dtype=np.uint8))])
    before = sys.getrefcount(body)
    array = decode_infer_request(body).inputs[0].array()
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert sys.getrefcount(body) == before + 1  # the array's; the request is gone
    del body
    gc.collect()
    assert array.tolist() == list(range(200))


def test_misaligned_raw_contents_are_copied_and_aligned() -> None:
    for size in range(9):  # some of the names put the data where a double may not lie
        array = request(("n" * size, "FP64", np.array([1.5, -2.5]))).inputs[0].array()
        assert array.flags.aligned
        assert not array.flags.writeable
        assert array.tolist() == [1.5, -2.5]


def test_large_misaligned_contents_survive_the_copy() -> None:
    data = np.random.default_rng(0).random(1 << 18)
    for size in range(3):
        assert np.array_equal(request(("n" * size, "FP64", data)).inputs[0].array(), data)


@pytest.mark.parametrize("datatype", NUMPY_DTYPES)
def test_every_datatype_makes_the_round_trip(datatype: str) -> None:
    values: list[Any] = [b"", b"\x00ab"] if datatype == "BYTES" else [0, 1]
    array = np.array(values, NUMPY_DTYPES[datatype]).reshape(2, 1)
    tensor = request(("x", datatype, array)).inputs[0]
    assert tensor.array().dtype == NUMPY_DTYPES[datatype]
    assert tensor.array().tolist() == array.tolist()
    body = answer([("x", datatype, array)])
    assert decode_infer_response(body).outputs[0].array().tolist() == array.tolist()


def test_an_array_of_no_dimension_and_one_without_elements_are_kept_apart() -> None:
    scalar = request(("x", "FP32", np.array(2.5, np.float32))).inputs[0]
    assert (scalar.shape, scalar.array().shape, float(scalar.array())) == ((), (), 2.5)
    empty = request(("x", "INT64", np.empty((0, 3), np.int64))).inputs[0]
    assert (empty.shape, empty.array().shape) == ((0, 3), (0, 3))


# ---- what a request tells


def test_a_request_tells_names_parameters_and_outputs() -> None:
    decoded = request(
        ("x", "FP32", ONE), name="mödel", model_version="3", request_id="id-1", outputs=["a", "b"],
        parameters={"flag": True, "count": -5, "huge": 2**64 - 1, "ratio": 0.5, "text": "ü"},
        input_parameters={"x": {"scale": 2}}, output_parameters={"b": {"classification": 3}},
    )  # fmt: skip
    assert (decoded.model_name, decoded.model_version, decoded.id) == ("mödel", "3", "id-1")
    assert decoded.parameters == {"flag": True, "count": -5, "huge": 2**64 - 1, "ratio": 0.5, "text": "ü"}
    assert decoded.parameters["flag"] is True
    assert decoded.inputs[0].parameters == {"scale": 2}
    assert [(output.name, output.parameters) for output in decoded.outputs] == [("a", {}), ("b", {"classification": 3})]
    assert decoded.output_names == ("a", "b")
    assert not decoded.plain
    assert repr(decoded.inputs[0]) == "InferTensor(name='x', datatype='FP32', shape=(1, 4))"
    assert repr(decoded.outputs[0]) == "RequestedOutput(name='a', parameters={})"


def test_an_empty_message_is_a_request_of_nothing() -> None:
    empty = decode_infer_request(b"")
    assert (empty.model_name, empty.model_version, empty.id, empty.parameters) == ("", "", "", {})
    assert (empty.inputs, empty.outputs, empty.output_names, empty.raw, empty.plain) == ((), (), (), True, True)
    assert not empty.shared_memory


def test_raw_and_plain_say_how_to_answer() -> None:
    assert request(("x", "FP32", ONE)).raw
    assert request(("x", "FP32", ONE)).plain
    assert not request(("x", "FP32", ONE), raw=False).raw
    assert request(("x", "FP32", ONE), parameters={"request": "level"}).plain
    assert not request(("x", "FP32", ONE), input_parameters={"x": {"k": 1}}).plain


def test_a_parameter_without_a_value_is_left_out_and_the_last_of_a_name_counts() -> None:
    def entry(value: bytes) -> bytes:
        return wire.message(4, wire.text(1, "k"), wire.field(2, wire.LENGTH, value))

    five, empty = wire.field(2, wire.VARINT, 5), b""
    assert decode_infer_request(entry(five) + entry(empty)).parameters == {}
    assert decode_infer_request(entry(empty) + entry(five)).parameters == {"k": 5}


def test_names_seen_again_are_the_same_object() -> None:
    body = encode_infer_request("a-model-of-that-name", [("x", "FP32", ONE)])
    assert decode_infer_request(body).model_name is decode_infer_request(body).model_name


def test_many_names_of_all_lengths_come_out_right() -> None:
    """More than the cache of names holds, with equal ends."""
    for number in range(3000):
        name = f"prefix--{number}--suffix--" + "y" * (number % 70)
        assert decode_infer_request(wire.text(1, name)).model_name == name


def test_tensors_outlive_their_request() -> None:
    (tensor,) = request(("x", "FP32", ONE)).inputs
    gc.collect()
    assert tensor.name == "x"
    assert np.array_equal(tensor.array(), ONE)


def test_more_tensors_and_dimensions_than_fit_the_object() -> None:
    names = [f"t{number}" for number in range(50)]
    decoded = request(*((name, "INT32", int32(1, 2, 1, 1, 1, 2)) for name in names))
    assert [tensor.name for tensor in decoded.inputs] == names
    assert all(np.array_equal(tensor.array(), int32(1, 2, 1, 1, 1, 2)) for tensor in decoded.inputs)


def test_the_classes_cannot_be_made_by_hand() -> None:
    for made in (InferRequest, InferTensor, RequestedOutput):
        with pytest.raises(TypeError, match="made by decode_infer_request"):
            made()


# ---- bad messages


def test_invalid_utf8_is_told() -> None:
    with refused("malformed ModelInferRequest of 4 bytes: model_name, model_version or id is not valid UTF-8"):
        decode_infer_request(b"\n\x02\xc3\x28")
    with pytest.raises(InvalidRequest, match="a tensor's name or datatype is not valid UTF-8"):
        decode_infer_request(wire.message(5, wire.field(1, wire.LENGTH, b"\xff")))
    with pytest.raises(InvalidRequest, match="a parameter's name is not valid UTF-8"):
        decode_infer_request(wire.message(4, wire.field(1, wire.LENGTH, b"\xed\xa0\x80")))
    with pytest.raises(InvalidRequest, match="a requested output's name is not valid UTF-8"):
        decode_infer_request(wire.message(6, wire.field(1, wire.LENGTH, b"\xf5\x80\x80\x80")))


def test_limits_keep_a_small_message_from_taking_much_memory() -> None:
    with pytest.raises(InvalidRequest, match="more than 16384 tensors"):
        decode_infer_request(wire.message(5) * 20_000)
    with pytest.raises(InvalidRequest, match="more than 16384 raw contents"):
        decode_infer_request(wire.message(7) * 20_000)
    with pytest.raises(InvalidRequest, match="a tensor has more than 32 dimensions"):
        decode_infer_request(wire.message(5, wire.message(3, b"\x01" * 33)))
    with refused("input 'x' for model '': no tensor can have the shape [4611686018427387904,4]"):
        decode_infer_request(
            wire.message(5, wire.text(1, "x"), wire.text(2, "FP32"), wire.message(3, wire.varint(2**62), b"\x04"))
        ).inputs[0].array()


def test_an_answers_contents_without_elements_are_none() -> None:
    tensor = wire.message(5, wire.text(1, "x"), wire.text(2, "INT32"), wire.message(3, b"\x02"), wire.message(5))
    [output] = decode_infer_response(tensor + wire.message(6, b"\x01\0\0\0\x02\0\0\0")).outputs
    assert output.array().tolist() == [1, 2]
    request = decode_infer_request(tensor + wire.message(7, b"\x01\0\0\0\x02\0\0\0"))
    with pytest.raises(InvalidRequest, match="contents field must not be specified"):
        request.inputs[0].array()


def test_mixed_raw_and_typed_contents_get_tritons_words() -> None:
    body = encode_infer_request("simple", [("INPUT0", "INT32", int32(1, 16))], raw=False)
    decoded = decode_infer_request(body + wire.message(7, b"\x00" * 64))
    text = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
    with refused(text):
        ADD_SUB.bind(decoded)
    with refused(text):
        decoded.inputs[0].array()


def test_raw_contents_in_the_wrong_number_are_told() -> None:
    body = encode_infer_request("m", [("x", "FP32", ONE)]) + wire.message(7, b"1234")
    with refused("expected 1 raw contents, one for each tensor with its data in the message, got 2 for model 'm'"):
        decode_infer_request(body).inputs[0].array()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"datatype": "FP99"}, "expected a V2 datatype, got 'FP99'"),
        ({"shape": [2, 4]}, "expected 32 bytes for FP32 [2,4], got 16"),
        ({"shape": [-1, 4]}, "no tensor can have the shape [-1,4]"),
        ({"datatype": "BYTES"}, "BYTES element 1 is said to have 1065353216 bytes, 8 are left"),
    ],
)
def test_raw_contents_that_contradict_their_tensor_are_told(change: dict[str, Any], told: str) -> None:
    message = inference_pb2.ModelInferRequest.FromString(encode_infer_request("m", [("x", "FP32", ONE)]))
    message.inputs[0].ClearField("shape")
    message.inputs[0].MergeFrom(inference_pb2.ModelInferRequest.InferInputTensor(**{"shape": [1, 4], **change}))
    with refused(f"input 'x' for model 'm': {told}"):
        decode_infer_request(message.SerializeToString()).inputs[0].array()


@pytest.mark.parametrize(
    ("datatype", "contents", "told"),
    [
        ("INT32", {"fp32_contents": [1, 2]}, "expected int_contents for INT32, got fp32_contents"),
        ("INT32", {"int_contents": [1, 2], "bool_contents": [True]}, "got bool_contents, int_contents"),
        ("INT32", {"int_contents": [1, 2, 3]}, "expected 2 elements for INT32 [2], got 3"),
        ("INT32", {}, "expected 2 elements for INT32 [2], got 0"),
        ("INT8", {"int_contents": [1, 200]}, "expected elements that fit INT8, got a wider one at index 1"),
        ("UINT16", {"uint_contents": [70000, 1]}, "expected elements that fit UINT16, got a wider one at index 0"),
        ("FP16", {"fp32_contents": [1, 2]}, "expected raw contents, as FP16 has no typed ones"),
        ("BF16", {"fp32_contents": [1, 2]}, "expected raw contents, as BF16 has no typed ones"),
        ("BYTES", {"bytes_contents": [b"a"]}, "expected 2 elements for BYTES [2], got 1"),
    ],
)
def test_typed_contents_that_contradict_their_tensor_are_told(
    datatype: str, contents: dict[str, Any], told: str
) -> None:
    message = inference_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype=datatype, shape=[2], contents=inference_pb2.InferTensorContents(**contents))
    with pytest.raises(InvalidRequest, match=f"^input 'x' for model 'm': .*{re.escape(told)}$"):
        decode_infer_request(message.SerializeToString()).inputs[0].array()


def test_single_elements_are_checked_and_fields_of_another_wire_type_skipped() -> None:
    def ints(*fields: bytes) -> InferTensor:
        tensor = (wire.text(1, "x"), wire.text(2, "INT8"), wire.message(3, b"\x02"), wire.message(5, *fields))
        return decode_infer_request(wire.message(5, *tensor)).inputs[0]

    one, wide = wire.field(2, wire.VARINT, 1), wire.field(2, wire.VARINT, 128)
    assert ints(one, wire.field(2, wire.FIXED32, b"abcd"), one).array().tolist() == [1, 1]
    with refused("input 'x' for model '': expected elements that fit INT8, got a wider one at index 1"):
        ints(one, wide).array()


# ---- shared memory


def test_shared_memory_inputs_take_no_raw_contents() -> None:
    decoded = request(
        ("a", "FP32", (1, 4)), ("b", "INT32", int32(2)),
        input_parameters={"a": {"shared_memory_region": "r", "shared_memory_byte_size": 16}},
    )  # fmt: skip
    assert decoded.shared_memory
    assert decoded.raw
    a, b = decoded.inputs
    assert a.parameters["shared_memory_region"] == "r"
    assert a.shape == (1, 4)
    assert b.array().tolist() == [0, 1]
    with refused("input 'a' for model 'simple': expected data in the message, got a shared memory region"):
        a.array()


def test_a_response_can_leave_its_data_in_shared_memory() -> None:
    body = answer(
        [("a", "FP32", (1, 4)), ("b", "INT32", int32(2))], output_parameters={"a": {"shared_memory_region": "r"}}
    )
    message = inference_pb2.ModelInferResponse.FromString(body)
    assert list(message.outputs[0].shape) == [1, 4]
    assert list(message.raw_output_contents) == [b"", int32(2).tobytes()]
    assert decode_infer_response(body).outputs[1].array().tolist() == [0, 1]


# ---- binding


def test_bind_gives_arrays_by_name_in_any_order() -> None:
    bound = ADD_SUB.bind(request(("INPUT1", "INT32", int32(2, 16)), ("INPUT0", "INT32", int32(1, 16))))
    assert bound["INPUT0"].shape == (1, 16)
    assert bound["INPUT1"].shape == (2, 16)


def test_any_name_binds_under_the_models_own() -> None:
    signature = Signature([TensorSpec("predict", "FP32", (-1, 4))], any_name=True)
    assert np.array_equal(signature.bind(request(("whatever", "FP32", ONE)))["predict"], ONE)
    assert signature.bind_arrays({"else": ("FP32", ONE)})["predict"] is ONE
    with refused("input 'whatever' for model 'simple': expected datatype FP32, got INT32"):
        signature.bind(request(("whatever", "INT32", int32(1, 4))))


def test_a_row_of_one_value_may_have_an_axis_of_its_own_where_any_name_is_taken() -> None:
    texts = np.array([b"a", b"b"], object)
    column = request(("x", "BYTES", texts.reshape(2, 1)))
    signature = Signature([TensorSpec("predict", "BYTES", (-1,))], any_name=True)
    assert signature.bind(column)["predict"].shape == (2, 1)
    assert signature.bind(request(("x", "BYTES", texts)))["predict"].shape == (2,)
    for wrong in (texts.reshape(1, 2), texts.reshape(2, 1, 1), texts[:1].reshape(())):
        with pytest.raises(InvalidRequest, match=r"input 'x' for model 'simple': expected shape \[-1\], got"):
            signature.bind(request(("x", "BYTES", wrong)))
    with refused("input 'x' for model 'simple': expected shape [-1], got [2,1]"):
        Signature([TensorSpec("x", "BYTES", (-1,))]).bind(column)


INPUT0, INPUT1 = ("INPUT0", "INT32", int32(1, 16)), ("INPUT1", "INT32", int32(1, 16))


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([INPUT0], "expected 2 inputs ['INPUT0', 'INPUT1'] for model 'simple', got 1 inputs ['INPUT0']"),
        (
            [INPUT0, INPUT0],
            "expected 2 inputs ['INPUT0', 'INPUT1'] for model 'simple', got 2 inputs ['INPUT0', 'INPUT0']",
        ),
        (
            [INPUT0, ("x", "INT32", int32(1, 16))],
            "expected 2 inputs ['INPUT0', 'INPUT1'] for model 'simple', got 2 inputs ['INPUT0', 'x']",
        ),
        ([INPUT0, ("INPUT1", "FP32", ONE)], "input 'INPUT1' for model 'simple': expected datatype INT32, got FP32"),
        (
            [INPUT0, ("INPUT1", "INT32", int32(1, 15))],
            "input 'INPUT1' for model 'simple': expected shape [-1,16], got [1,15]",
        ),
        (
            [INPUT0, ("INPUT1", "INT32", int32(16))],
            "input 'INPUT1' for model 'simple': expected shape [-1,16], got [16]",
        ),
    ],
)
def test_inputs_that_do_not_fit_the_model_are_told(inputs: list[tuple[str, str, NDArray[Any]]], told: str) -> None:
    with refused(told):
        ADD_SUB.bind(request(*inputs))
    if len({name for name, _, _ in inputs}) == len(inputs):
        with refused(told):
            ADD_SUB.bind_arrays({name: (kind, array) for name, kind, array in inputs}, model_name="simple")


def test_a_negative_dimension_fits_nothing() -> None:
    message = inference_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b""])
    message.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
    with refused("input 'x' for model 'm': no tensor can have the shape [-1,4]"):
        Signature([TensorSpec("x", "FP32", (-1, 4))]).bind(decode_infer_request(message.SerializeToString()))


def test_bind_arrays_makes_arrays_contiguous_and_checks_their_dtype() -> None:
    signature = Signature([TensorSpec("x", "FP32", (2, 4))])
    given = np.asfortranarray(np.arange(8, dtype=np.float32).reshape(2, 4))
    bound = signature.bind_arrays({"x": ("FP32", given)})["x"]
    assert bound.flags.c_contiguous
    assert np.array_equal(bound, given)
    with refused("input 'x' for model 'm': FP32 is made from float32, got float64"):
        signature.bind_arrays({"x": ("FP32", given.astype(np.float64))}, model_name="m")


def test_bind_arrays_takes_arrays_alone() -> None:
    with pytest.raises(TypeError, match="input 'x' must be a numpy array, got list"):
        Signature([TensorSpec("x", "FP32", (2,))]).bind_arrays({"x": ("FP32", [1.0, 2.0])})  # type: ignore[dict-item]


def test_a_signature_refuses_what_no_model_has() -> None:
    with pytest.raises(ValueError, match="unknown datatype 'FP99'"):
        Signature([TensorSpec("x", "FP99", ())])
    with pytest.raises(ValueError, match="names must differ"):
        Signature([TensorSpec("x", "FP32", ()), TensorSpec("x", "FP32", ())])
    with pytest.raises(ValueError, match="any_name is for models of one input"):
        Signature([], any_name=True)
    with pytest.raises(ValueError, match="more than 32 dimensions"):
        Signature([TensorSpec("x", "FP32", (1,) * 33)])
    assert Signature([]).bind(request()) == {}
    assert ADD_SUB.inputs[1].name == "INPUT1"


def test_an_input_may_take_further_datatypes_as_they_come() -> None:
    signature = Signature([TensorSpec("x", "FP32", (-1, 2))], any_name=True, accepts={"x": ("FP64", "INT32", "BF16")})
    for datatype, dtype in (("FP32", np.float32), ("FP64", np.float64), ("INT32", np.int32), ("BF16", np.float32)):
        array = np.arange(4, dtype=dtype).reshape(2, 2)
        bound = signature.bind(request(("name", datatype, array)))
        assert bound["x"].dtype == dtype
        assert bound["x"].tolist() == array.tolist()
        assert signature.bind_arrays({"name": (datatype, array)})["x"].dtype == dtype
    with refused("input 'name' for model 'simple': expected datatype FP32, got INT64"):
        signature.bind(request(("name", "INT64", np.zeros((2, 2), np.int64))))
    with pytest.raises(ValueError, match="FLOAT"):
        Signature([TensorSpec("x", "FP32", (-1, 2))], accepts={"x": ("FLOAT",)})


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (1, 2, 3, 4)])
def test_an_input_without_a_shape_takes_any(shape: tuple[int, ...]) -> None:
    signature = Signature([TensorSpec("x", "FP32", ())])
    assert signature.bind(request(("x", "FP32", np.zeros(shape, np.float32))))["x"].shape == shape
    assert signature.bind_arrays({"x": ("FP32", np.zeros(shape, np.float32))})["x"].shape == shape


# ---- together


def test_nothing_is_leaked_over_many_calls() -> None:
    body = encode_infer_request("simple", [INPUT0, INPUT1], parameters={"k": "v"}, outputs=["a"])
    words = np.array([b"some", b"words"], object)

    def work() -> None:
        for _ in range(2000):
            decoded = decode_infer_request(body)
            bound = ADD_SUB.bind(decoded)
            encode_infer_response("m", "", decoded.id, [("o", "INT32", bound["INPUT0"])], raw=True)
            encode_infer_response("m", "", "", [("o", "BYTES", words)], raw=False, parameters=decoded.parameters)
            assert decoded.outputs[0].name == "a"

    work()
    gc.collect()
    before, blocks = sys.getrefcount(body), sys.getallocatedblocks()
    work()
    gc.collect()
    assert sys.getrefcount(body) == before
    assert sys.getallocatedblocks() - blocks < 200
