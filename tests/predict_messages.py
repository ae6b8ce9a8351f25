"""The messages of TensorFlow Serving's Predict, as far as tests need them: tensors of FP32 by their bytes.

Field numbers: https://github.com/tensorflow/serving/blob/master/tensorflow_serving/apis/predict.proto and
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/framework/tensor.proto.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

METHOD: Final = "/tensorflow.serving.PredictionService/Predict"
_FLOAT: Final = 1
_PACKAGE: Final = "mmcore.tests.predict"


def _messages() -> tuple[type[Any], type[Any]]:
    file = descriptor_pb2.FileDescriptorProto(name="mmcore_tests_predict.proto", package=_PACKAGE, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any, bool]) -> descriptor_pb2.DescriptorProto:
        made = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            own = isinstance(kind, str)
            made.field.add(name=field, number=number, label=label, type=Field.TYPE_MESSAGE if own else kind)
            if own:
                made.field[-1].type_name = f".{_PACKAGE}.{kind}"
        return made

    message("Dim", ("size", 1, Field.TYPE_INT64, False))
    message("Shape", ("dim", 2, "Dim", True))
    tensor = (("dtype", 1, Field.TYPE_INT32, False), ("tensor_shape", 2, "Shape", False))
    message("Tensor", *tensor, ("tensor_content", 4, Field.TYPE_BYTES, False))
    # What a map is on the wire.
    message("Entry", ("key", 1, Field.TYPE_STRING, False), ("value", 2, "Tensor", False))
    message("Model", ("name", 1, Field.TYPE_STRING, False))
    message("Request", ("model_spec", 1, "Model", False), ("inputs", 2, "Entry", True))
    message("Response", ("outputs", 1, "Entry", True), ("model_spec", 2, "Model", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in ("Request", "Response")]
    first, second = map(message_factory.GetMessageClass, found)
    return first, second


Request, Response = _messages()


def fill(entries: Any, **tensors: Any) -> None:
    """Put arrays of FP32 into a map of tensors."""
    for name, array in tensors.items():
        value = np.ascontiguousarray(array, np.float32)
        entry = entries.add(key=name)
        entry.value.dtype, entry.value.tensor_content = _FLOAT, value.tobytes()
        for size in value.shape:
            entry.value.tensor_shape.dim.add(size=size)


def arrays(entries: Any) -> dict[str, Any]:
    """The arrays of a map of tensors."""
    return {
        one.key: np.frombuffer(one.value.tensor_content, np.float32).reshape(
            [dim.size for dim in one.value.tensor_shape.dim]
        )
        for one in entries
    }
