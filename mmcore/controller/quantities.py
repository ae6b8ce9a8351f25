"""Kubernetes quantities (``500m``, ``1Gi``, ``2e9``) as numbers.

The grammar is that of k8s.io/apimachinery's resource.Quantity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

_SUFFIXES: Final = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30),
    "Ti": Decimal(2**40), "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_QUANTITY: Final = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)")


def quantity(value: object) -> Decimal:
    """The number that a quantity states; ValueError where it is none."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity such as 500m, 2 or 1Gi")
    number, exponent, suffix = match.groups()
    if exponent:
        return Decimal(number).scaleb(int(exponent))
    return Decimal(number) * _SUFFIXES[suffix or ""]


def memory_bytes(value: object) -> int:
    """A quantity of memory in whole bytes."""
    return math.ceil(quantity(value))


def total_memory_limit(containers: Iterable[dict[str, object]]) -> int:
    """What the containers may take together by their limits, in bytes; 0 where one of them has none."""
    total = 0
    for container in containers:
        resources = container.get("resources")
        limits = resources.get("limits") if isinstance(resources, dict) else None
        limit = limits.get("memory") if isinstance(limits, dict) else None
        if limit is None:
            return 0
        total += memory_bytes(limit)
    return total
