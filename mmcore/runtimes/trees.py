"""Tree ensembles under a configuration of Triton's tree backend (FIL), for its clients.

That backend answers one output, ``output__0`` in FP32, and its parameters say what is in it (its documentation, "Model
configuration"): the model's value, a class (``output_class``, by ``threshold`` where there are two), or the probability
of each class (``predict_proba``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from mmcore.errors import LoadFailed
from mmcore.runtimes.interface import Array

INPUT: Final = "input__0"
OUTPUT: Final = "output__0"

#: The reader of config.pbtxt states it for every model of that backend, so that its presence tells one.
_MARK: Final = "output_class"
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}

Prediction = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class TreeBackend:
    """What the backend's parameters say of the answer."""

    output_class: bool
    predict_proba: bool
    threshold: float

    @classmethod
    def configured(cls, parameters: Mapping[str, str]) -> TreeBackend | None:
        """The backend's parameters, or None where the model is not configured for it.

        Raises:
            LoadFailed: a parameter is neither a boolean nor a number.
        """
        if _MARK not in parameters:
            return None
        try:
            threshold = float(parameters.get("threshold", "0.5"))
        except ValueError as error:
            raise LoadFailed(f"the parameter threshold is {parameters['threshold']!r}, which is no number") from error
        return cls(_boolean(parameters, _MARK), _boolean(parameters, "predict_proba"), threshold)

    def method(self, values: Prediction, columns: int) -> tuple[int, Prediction]:
        """Number of columns and function of the output, made of the one that gives ``values`` [n, ``columns``]."""
        if self.predict_proba:
            return (2, lambda features: _both_classes(values(features))) if columns == 1 else (columns, values)
        if not self.output_class:
            return columns, values
        if columns == 1:
            return 1, lambda features: (values(features) > self.threshold).astype(np.float32)
        return 1, lambda features: values(features).argmax(axis=1).reshape(-1, 1).astype(np.float32)


def _boolean(parameters: Mapping[str, str], name: str) -> bool:
    stated = parameters.get(name, "false")
    value = _BOOLEANS.get(stated.lower())
    if value is None:
        raise LoadFailed(f"the parameter {name} is {stated!r}, neither true nor false")
    return value


def _both_classes(positive: Array) -> Array:
    return np.hstack((1 - positive, positive))
