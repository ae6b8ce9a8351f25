"""Warm-up: requests that a model must have answered before it is called ready (Triton, ModelWarmup).

The first inference of many frameworks allocates, compiles or chooses kernels; no caller has to wait for that.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from mmcore._ext.tensor import array_from_raw
from mmcore._ext.v2codec import Signature
from mmcore.errors import LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, Warmup, WarmupInput
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import Array, LoadedModel

#: No model needs more to be warm; a mistyped dimension would take all memory.
_MOST_ELEMENTS: Final = 2**28
_SEED: Final = 0


def warm_up(source: ModelSource, model: LoadedModel, signature: Signature) -> None:
    """Run the warm-up requests that the model's settings ask for; blocks for as long as they take.

    Raises:
        LoadFailed: a request does not fit the model, its data cannot be read, or the model fails.
    """
    for warmup in source.settings.warmups:
        try:
            inputs = signature.bind_arrays(_arrays(warmup), model_name=source.name)
            for _ in range(warmup.count):
                model.infer(inputs, ())
        except (Exception, SystemExit) as error:
            raise LoadFailed(f"model {source.name!r}: warm-up {warmup.name!r} failed: {describe(error)}") from error


def _arrays(warmup: Warmup) -> dict[str, tuple[str, Array]]:
    random = np.random.default_rng(_SEED)
    return {name: (stated.datatype, _array(stated, random)) for name, stated in warmup.inputs.items()}


def _array(stated: WarmupInput, random: np.random.Generator) -> Array:
    if math.prod(stated.shape) > _MOST_ELEMENTS:
        raise ValueError(f"shape {list(stated.shape)} is too large")
    if stated.data is not None:
        return array_from_raw(stated.datatype, stated.shape, stated.data.read_bytes())
    dtype: np.dtype[Any] = NUMPY_DTYPES[stated.datatype]
    if dtype.hasobject:
        array = np.empty(stated.shape, dtype)
        array.fill(b"")
        return array
    if not stated.random:
        return np.zeros(stated.shape, dtype)
    if dtype.kind == "f":
        return random.random(stated.shape).astype(dtype)
    return random.integers(0, 2 if dtype.kind == "b" else 128, stated.shape).astype(dtype)
