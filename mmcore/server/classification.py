"""The classification extension: the k largest values of an output as ``value:index[:label]`` text.

Form and order follow the Triton documentation's classification extension: values as C's ``%f``, integers without a
point, largest first, the label only where the model has one for that index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmcore.errors import InvalidRequest


def classify(
    name: str, datatype: str, array: NDArray[np.generic], count: int, labels: Sequence[str]
) -> NDArray[np.object_]:
    """The ``count`` largest values of each row of ``array``, as BYTES.

    The first dimension is the batch and the others together are the classes; a vector is one row. The answer is of
    shape [batch, min(count, classes)], or [min(count, classes)] for a vector.

    Raises:
        InvalidRequest: the datatype has no order, or the count is below one.
    """
    if count < 1:
        raise InvalidRequest(f"output '{name}': parameter classification must be at least 1, got {count}")
    if array.dtype.kind not in "iuf":
        raise InvalidRequest(f"class result not available for output '{name}' of datatype {datatype}")
    batch = array.shape[0] if array.ndim > 1 else 1
    rows = array.reshape(batch, -1) if array.size else np.empty((batch, 0), array.dtype)
    taken = min(count, rows.shape[1])
    # Stable on the reversed rows keeps equal values in the order of their indices, and NaN comes last.
    keys = np.where(np.isnan(rows), -np.inf, rows) if rows.dtype.kind == "f" else rows
    order = rows.shape[1] - 1 - np.argsort(keys[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :taken]
    result = np.empty((batch, taken), dtype=np.object_)
    for row in range(batch):
        for column, index in enumerate(order[row].tolist()):
            result[row, column] = _entry(rows[row, index], index, labels)
    return result if array.ndim > 1 else result[0]


def _entry(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    text = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
    return f"{text}:{index}{label}".encode()
