"""Answers what it was sent: one FP32 tensor of any shape."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


class Model:
    """The smallest model there is, for measuring everything around a model."""

    inputs = (("INPUT0", "FP32", ()),)  # an empty shape stands for any
    outputs = (("OUTPUT0", "FP32", ()),)

    def predict(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The input's own array, uncopied."""
        return {"OUTPUT0": inputs["INPUT0"]}
