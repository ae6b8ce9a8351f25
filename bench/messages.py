"""The requests that the suites send, made with protobuf so that they owe nothing to our codec."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmcore.pb import inference_pb2


def infer_request(model: str, name: str, datatype: str, array: NDArray[np.generic], request_id: str = "") -> bytes:
    """A ModelInferRequest with one input in raw contents."""
    request = inference_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request.SerializeToString()


def small_request() -> bytes:
    """61 bytes: one FP32 tensor of four values."""
    return infer_request("identity", "INPUT0", "FP32", np.arange(4, dtype=np.float32), request_id="0123456789ab")


def large_request() -> bytes:
    """602 KB: one FP32 image of [1, 3, 224, 224]."""
    return infer_request("identity", "INPUT0", "FP32", np.ones((1, 3, 224, 224), np.float32))
