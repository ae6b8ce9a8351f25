"""A model of Triton's Python backend: the framework's call on all requests that Triton hands over, as one batch.

Runs in a stub process of Triton's environment, from the model's folder of its repository.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's stub brings it

from bench.peers import frameworks


class TritonPythonModel:
    """What the stub makes one of and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the file that the configuration names."""
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self._input = config["input"][0]["name"]
        self._call = frameworks.load(parameters["framework"]["string_value"], Path(parameters["path"]["string_value"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Merge the inputs, call once, split the outputs."""
        arrays = [pb_utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        merged = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        outputs = [(name, output.reshape(len(merged), -1)) for name, _, output in self._call(merged)]
        responses = []
        start = 0
        for array in arrays:
            end = start + len(array)
            tensors = [pb_utils.Tensor(name, output[start:end]) for name, output in outputs]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = end
        return responses
