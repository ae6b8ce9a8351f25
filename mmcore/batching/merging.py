"""Whether requests for a model are put together, how many, and what becomes of them when that goes wrong.

Requests are merged along their first axis, run as one, and the answer is taken apart again. What a model answers to a
row must not depend on the rows beside it. That holds for the built-in formats where every input and output has a free
first dimension, but for graphs whose first dimension is something else (time, say): so one request in a while is also
run alone, the first ones in any case, and a model that answers it otherwise is not given merged requests any more.
Floats may differ in their last digits, as a matrix product's do with the number of its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from mmcore._ext.batches import merge, part
from mmcore._ext.rates import now_ns
from mmcore.model import ModelSettings, TensorSpec
from mmcore.runtimes import LoadedModel, OutputTensor
from mmcore.runtimes.interface import Array

log = logging.getLogger(__name__)

#: Merged where the settings do not say how many: requests, and rows of them together.
MOST_REQUESTS: Final = 64
MOST_ROWS: Final = 1024

#: Of others, such as a class in Python, which may do what it likes with its rows, the owner has to state a batch size.
_FORMATS: Final = frozenset({"lightgbm", "onnx", "openvino", "sklearn", "tensorflow", "torchscript", "xgboost"})
_FIRST_CHECKS: Final = 4
CHECKED_EVERY: Final = 64
#: Merged inferences in a row that failed where the requests alone did not.
_FAILURES_BORNE: Final = 3
#: How far a float may be from the one answered alone, relative to the largest.
_TOLERANCE: Final = 1e-3

Infer = Callable[[dict[str, Array], Sequence[str]], Sequence[OutputTensor]]


class Result(NamedTuple):
    """What one request got: outputs or an error, the nanoseconds its inference took, and how many rows it had.

    ``leads`` marks one result of each inference, so that inferences can be counted.
    """

    outputs: Sequence[OutputTensor] | None
    error: BaseException | None
    infer_ns: int
    rows: int
    leads: bool = True


class Merging:
    """How requests for one copy are merged.

    Attributes:
        most_requests, most_rows: of one inference.
        active: whether they are merged at all; ends when the model answers otherwise.
    """

    def __init__(self, name: str, *, most_rows: int, trusted: bool, most_requests: int = MOST_REQUESTS) -> None:
        self.name: Final = name
        self.most_requests: Final = most_requests
        self.most_rows: Final = most_rows
        self.active = True
        #: The owner has stated a batch size, and so that rows are independent.
        self._trusted = trusted
        self._checks = 0
        self._merged = 0
        self._failures = 0

    def check_due(self, first: dict[str, Array], last: dict[str, Array]) -> bool:
        """Whether the next merged inference is one that is compared; it merges these two requests at least."""
        if self._trusted:
            return False
        self._merged += 1
        if self._merged % CHECKED_EVERY == 1:
            return True
        # Equal rows tell little, so only those count that differ.
        if self._checks >= _FIRST_CHECKS or all(np.array_equal(first[name], last[name]) for name in first):
            return False
        self._checks += 1
        return True

    def run(
        self, infer: Infer, members: list[dict[str, Array]], rows: list[int], names: Sequence[str], *, check: bool
    ) -> list[Result]:
        """Run requests as one, and each alone where that fails; a result for each, in their order.

        ``members`` can be merged; ``rows`` are their numbers of rows. With ``check`` the last is compared.
        """
        if len(members) == 1:
            return [alone(infer, members[0], rows[0], names)]
        started = now_ns()
        try:
            parts = part(infer(merge(members), names), rows)
        except (Exception, SystemExit) as error:
            log.debug("model %s failed with merged requests", self.name, exc_info=error)
            parts = None
        infer_ns = now_ns() - started
        if parts is None:
            return self.each_alone(infer, members, rows, names)
        self._failures = 0
        if check:
            sample = alone(infer, members[-1], rows[-1], names)
            if sample.outputs is not None and not _alike(sample.outputs, parts[-1]):
                self._stop("answers a request otherwise when it is merged with others")
                others = [
                    alone(infer, member, count, names) for member, count in zip(members[:-1], rows[:-1], strict=True)
                ]
                return [*others, sample]
        total = sum(rows)
        return [Result(outputs, None, infer_ns, total, leads=at == 0) for at, outputs in enumerate(parts)]

    def each_alone(
        self, infer: Infer, members: list[dict[str, Array]], rows: list[int], names: Sequence[str]
    ) -> list[Result]:
        """After a merged inference that failed: the fault of one request is not its neighbours'."""
        results = [alone(infer, member, count, names) for member, count in zip(members, rows, strict=True)]
        if all(result.error is None for result in results):
            self._failures += 1
            if self._failures >= _FAILURES_BORNE:
                self._stop("fails with merged requests, and not with the same ones alone")
        else:
            self._failures = 0
        return results

    def _stop(self, why: str) -> None:
        if self.active:
            self.active = False
            log.warning("model %s %s: its requests are not merged any more", self.name, why)


def alone(infer: Infer, inputs: dict[str, Array], rows: int, names: Sequence[str]) -> Result:
    """The result of one request run by itself."""
    started = now_ns()
    try:
        outputs = infer(inputs, names)
    except (Exception, SystemExit) as error:
        return Result(None, error, now_ns() - started, rows)
    return Result(outputs, None, now_ns() - started, rows)


def merging_of(name: str, model_format: str, model: LoadedModel, settings: ModelSettings) -> Merging | None:
    """How requests for a model are merged; None where they are not."""
    if settings.merges is False or not _free_rows(model.inputs) or not _free_rows(model.outputs):
        return None
    if settings.merges:
        return Merging(name, most_rows=settings.max_batch_size, trusted=True)
    if model_format not in _FORMATS:
        return None
    return Merging(name, most_rows=MOST_ROWS, trusted=False)


def _free_rows(specs: Sequence[TensorSpec]) -> bool:
    return bool(specs) and all(spec.shape[:1] == (-1,) for spec in specs)


def _alike(one: Sequence[OutputTensor], other: Sequence[OutputTensor]) -> bool:
    return len(one) == len(other) and all(
        mine[:2] == theirs[:2] and _close(mine[2], theirs[2]) for mine, theirs in zip(one, other, strict=True)
    )


def _close(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    finite = np.abs(one[np.isfinite(one)].astype(np.float64))
    scale = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True))
