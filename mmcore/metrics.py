"""Metrics as Prometheus reads them: histograms, and the text exposition format 0.0.4.

Counters live where what they count happens, as plain numbers; they are gathered when somebody scrapes. The library
prometheus-client would take 14 MB of the 60 that an idle instance may have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

#: Upper bounds for what takes seconds and for bytes of models: those of the archived stack (mesh.md §7.2), in seconds.
SECONDS: Final = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0,
)  # fmt: skip
#: Of how long what is unloaded was not used, in seconds: half a minute to 90 days.
AGES: Final = (30.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0, 604800.0, 2592000.0, 7776000.0)
SIZES: Final = tuple(float(2**18 * 4**step) for step in range(8))

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, str]


class Histogram:
    """Counts of values by upper bound.

    Attributes:
        bounds: ascending.
        counts: for each bound the values that are above the one before and not above it; the last is for the rest.
        total: the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] | None = None, total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = list(counts) if counts is not None else [0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def scaled(self, factor: float) -> Histogram:
        """The same values in another unit."""
        return Histogram([bound * factor for bound in self.bounds], self.counts, self.total * factor)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All values of histograms, at least one, that have the same bounds."""
    first, *others = histograms
    counts = [sum(column) for column in zip(first.counts, *(other.counts for other in others), strict=True)]
    return Histogram(first.bounds, counts, first.total + sum(other.total for other in others))


class Exposition:
    """The text of one scrape, written family by family."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def value(self, name: str, kind: Kind, text: str, value: float, labels: Labels | None = None) -> None:
        """A family of one sample."""
        self.values(name, kind, text, [(labels or {}, value)])

    def values(self, name: str, kind: Kind, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A family of samples that differ in their labels."""
        self._head(name, kind, text)
        for labels, value in samples:
            self._sample(name, labels, value)

    def histogram(self, name: str, text: str, histogram: Histogram, labels: Labels | None = None) -> None:
        """A family of one histogram."""
        self.histograms(name, text, [(labels or {}, histogram)])

    def histograms(self, name: str, text: str, histograms: Iterable[tuple[Labels, Histogram]]) -> None:
        """A family of histograms that differ in their labels."""
        self._head(name, "histogram", text)
        for labels, histogram in histograms:
            seen = 0
            for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
                seen += count
                self._sample(f"{name}_bucket", {**labels, "le": "+Inf" if bound is None else f"{bound:.12g}"}, seen)
            self._sample(f"{name}_sum", labels, histogram.total)
            self._sample(f"{name}_count", labels, seen)

    def text(self) -> bytes:
        """All of it."""
        return ("\n".join(self._lines) + "\n").encode()

    def _head(self, name: str, kind: Kind, text: str) -> None:
        self._lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")

    def _sample(self, name: str, labels: Labels, value: float) -> None:
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        shown = str(value) if isinstance(value, int) else f"{value:.12g}"
        self._lines.append(f"{name}{{{told}}} {shown}" if told else f"{name} {shown}")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
