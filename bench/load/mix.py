"""Requests to many models in an order drawn beforehand, handed to the generator in a file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bench.load.rounding import rounded


@dataclass(frozen=True, slots=True)
class Mix:
    """Request bodies with their answers, and the order of calls.

    The last so many floats of an answer, of struct's code ``f`` or ``d``, may be rounded otherwise.

    ``order`` holds positions in ``parts``; it is gone through again and again.
    """

    parts: Sequence[tuple[bytes, bytes, int, str]]
    order: NDArray[np.int32]

    def write(self, path: Path) -> None:
        """Leave it in a file of this machine's, for :meth:`read`."""
        path.write_bytes(pickle.dumps((self.parts, self.order)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What was written; only files of this suite's own are read."""
        return cls(*pickle.loads(path.read_bytes()))

    def exchanges(self) -> Iterator[tuple[bytes, bytes]]:
        """Body and answer of each call, without end."""
        found = [(body, rounded(answer, values, code)) for body, answer, values, code in self.parts]
        return map(found.__getitem__, cycle(self.order.tolist()))


def zipf_order(models: int, calls: int, seed: int, exponent: float = 1.0) -> NDArray[np.int32]:
    """Models of ``calls`` requests: popularity falls with rank to the power of ``exponent``, ranks dealt at random."""
    random = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, models + 1) ** exponent
    ranks = np.searchsorted(np.cumsum(popularity / popularity.sum()), random.random(calls))
    dealt: NDArray[np.int32] = random.permutation(models).astype(np.int32)[np.minimum(ranks, models - 1)]
    return dealt
