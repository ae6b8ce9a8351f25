"""The codec against protobuf with numpy, in pairs: ModelInferRequest in, arrays by name, ModelInferResponse out.

Both sides do what an identity model's server does: decode, find the input, check its datatype and shape, and answer
with the same tensor. ``small`` is FP32 [4] (61 bytes), ``typed`` 1,000 fp32_contents, ``large`` FP32 [1,3,224,224]
raw (602 KB), ``bytes`` 100 BYTES elements, ``ints`` 1,000 int64_contents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from mmcore._ext.v2codec import Signature, decode_infer_request, encode_infer_request, encode_infer_response
from mmcore.model import NUMPY_DTYPES, TensorSpec
from mmcore.pb import inference_pb2

#: Case: datatype, array, raw contents or typed.
CASES: Final[dict[str, tuple[str, NDArray[Any], bool]]] = {
    "small": ("FP32", np.arange(4, dtype=np.float32), True),
    "typed": ("FP32", np.arange(1000, dtype=np.float32), False),
    "ints": ("INT64", np.arange(0, 10**6, 1000, dtype=np.int64), False),
    "bytes": ("BYTES", np.array([b"element %d" % number for number in range(100)], object), True),
    "large": ("FP32", np.ones((1, 3, 224, 224), np.float32), True),
}
CONTENTS: Final = {"FP32": "fp32_contents", "INT64": "int64_contents"}
Handler = Callable[[bytes], object]


def request(case: str) -> bytes:
    """A case's request, as tritonclient would send it."""
    datatype, array, raw = CASES[case]
    return encode_infer_request("identity", [("INPUT0", datatype, array)], request_id="request-0001", raw=raw)


def mmcore(case: str) -> Handler:
    """The handler on our codec."""
    datatype, array, _ = CASES[case]
    signature = Signature([TensorSpec("INPUT0", datatype, (-1, *array.shape[1:]))])

    def handle(body: bytes) -> object:
        request = decode_infer_request(body)
        data = signature.bind(request)["INPUT0"]
        return encode_infer_response(
            request.model_name, "1", request.id, (("OUTPUT0", datatype, data),), raw=request.raw
        )

    return handle


def protobuf(case: str) -> Handler:
    """The same by the protobuf runtime and numpy."""
    wanted = CASES[case][0]
    rank = CASES[case][1].ndim
    dtype = NUMPY_DTYPES[wanted]

    def handle(body: bytes) -> bytes:
        request = inference_pb2.ModelInferRequest.FromString(body)
        tensor = next(tensor for tensor in request.inputs if tensor.name == "INPUT0")
        shape = tuple(tensor.shape)
        if tensor.datatype != wanted or len(shape) != rank:
            raise ValueError(tensor.datatype)
        raw = len(request.raw_input_contents) > 0
        if not raw:
            data = np.array(getattr(tensor.contents, CONTENTS[wanted]), dtype).reshape(shape)
        elif wanted == "BYTES":
            data = unframed(request.raw_input_contents[0]).reshape(shape)
        else:
            data = np.frombuffer(request.raw_input_contents[0], dtype).reshape(shape)
        answer = inference_pb2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        output = answer.outputs.add(name="OUTPUT0", datatype=wanted, shape=data.shape)
        if not raw:
            getattr(output.contents, CONTENTS[wanted]).extend(data.ravel().tolist())
        elif wanted == "BYTES":
            answer.raw_output_contents.append(b"".join(len(item).to_bytes(4, "little") + item for item in data.ravel()))
        else:
            answer.raw_output_contents.append(data.tobytes())
        serialized: bytes = answer.SerializeToString()
        return serialized

    return handle


def unframed(data: bytes) -> NDArray[Any]:
    """BYTES raw contents as an object array, in plain Python."""
    items, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        items.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return np.array(items, object)


@pytest.mark.parametrize("side", ["mmcore", "protobuf"])
@pytest.mark.parametrize("case", CASES)
def test_decode_bind_encode(benchmark: BenchmarkFixture, case: str, side: str) -> None:
    """One request through one side's handler."""
    benchmark.group = f"codec {case}"
    body = request(case)
    handle = {"mmcore": mmcore, "protobuf": protobuf}[side](case)
    got = benchmark(handle, body)
    joined = b"".join(got) if isinstance(got, list) else got
    assert joined == protobuf(case)(body)
