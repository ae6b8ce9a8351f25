"""Sum and difference of two INT32 tensors, under the names that Triton's example clients send; see config.pbtxt."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


class Model:
    """Adds and subtracts; its tensors are declared in config.pbtxt."""

    def predict(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Both outputs always: what a request does not ask for is left out of the answer."""
        left, right = inputs["INPUT0"], inputs["INPUT1"]
        return {"OUTPUT0": left + right, "OUTPUT1": left - right}
