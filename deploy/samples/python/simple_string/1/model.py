"""Sum and difference of two tensors of decimal numbers written as text; see config.pbtxt."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcore.errors import InvalidRequest


class Model:
    """Adds and subtracts what the BYTES elements spell."""

    def predict(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Both outputs, as text; an element that is no number is the caller's mistake."""
        left, right = numbers("INPUT0", inputs), numbers("INPUT1", inputs)
        return {"OUTPUT0": text(left + right), "OUTPUT1": text(left - right)}


def numbers(name: str, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The integers that one input's elements spell, in its shape."""
    try:
        return np.array([int(element) for element in inputs[name].flat]).reshape(inputs[name].shape)
    except ValueError as error:
        raise InvalidRequest(f"input {name!r}: {error}") from error


def text(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in decimal, as the object array that BYTES is."""
    return np.array([b"%d" % value for value in values.flat], dtype=np.object_).reshape(values.shape)
