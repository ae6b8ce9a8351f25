"""What runtimes say of loads and requests to the adapter of their server, which is the instance beside it here.

The archived release had it in a field, in annotations, and in variables of the adapter's container, which went before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mmcore.controller.objects import Object, annotations_of, at

if TYPE_CHECKING:
    from mmcore.controller.runtimes import Runtime


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    Attributes:
        variable: of the adapter's container.
        field: of ``builtInAdapter``; empty where there is an annotation.
        annotation: of the runtime; empty where there is a field.
        least: the least that it may be.
        option: the instance's variable that has it where another server holds the models; empty where none has.
        own: the one where the instance holds them itself; empty where none has.
        unit: stands behind the number in ``option``.
    """

    variable: str
    field: str = ""
    annotation: str = ""
    least: int = 1
    option: str = ""
    own: str = ""
    unit: str = ""


#: Bytes of the server's memory that are no model's.
MEMORY_BUFFER: Final = Limit("MEM_BUFFER_BYTES", field="memBufferBytes", least=0)
LIMITS: Final = (
    MEMORY_BUFFER,
    Limit("LOADTIME_TIMEOUT", field="modelLoadingTimeoutMillis", option="MMCORE_RUNTIME_LOAD_TIMEOUT", unit="ms"),
    Limit(
        "LOADING_CONCURRENCY",
        annotation="maxLoadingConcurrency",
        option="MMCORE_RUNTIME_LOADS_AT_ONCE",
        own="MMCORE_LOADER_THREADS",
    ),
    Limit(
        "LIMIT_PER_MODEL_CONCURRENCY",
        annotation="perModelConcurrencyLimit",
        least=0,
        option="MMCORE_RUNTIME_MODEL_CONCURRENCY",
    ),
)
VARIABLES: Final = frozenset(limit.variable for limit in LIMITS)


def stated(runtime: Runtime, limit: Limit) -> tuple[str, str]:
    """Where a runtime states a limit, and what it says; empty where it does not."""
    for entry in at(runtime.spec, "builtInAdapter", "env") or []:
        if entry.get("name") == limit.variable and "value" in entry:
            return f"builtInAdapter.env {limit.variable}", str(entry["value"])
    adapter: Object = runtime.spec.get("builtInAdapter") or {}
    # As where these objects come from, a field of 0 says nothing.
    if limit.field and adapter.get(limit.field):
        return f"builtInAdapter.{limit.field}", str(adapter[limit.field])
    if limit.annotation and limit.annotation in annotations_of(runtime.resource):
        return f"annotation {limit.annotation}", annotations_of(runtime.resource)[limit.annotation]
    return "", ""


def memory_buffer(runtime: Runtime) -> int:
    """Bytes of the server's memory that are no model's."""
    return int(stated(runtime, MEMORY_BUFFER)[1] or 0)


def variables(runtime: Runtime) -> dict[str, str]:
    """The instance's variables for the limits of a runtime that :func:`problems` finds nothing wrong with."""
    found = {}
    for limit in LIMITS:
        name, (_, value) = limit.option if runtime.containers else limit.own, stated(runtime, limit)
        if name and value:
            found[name] = f"{int(value)}{limit.unit}"
    return found


def problems(runtime: Runtime) -> Iterator[str]:
    """Limits that are none."""
    for limit in LIMITS:
        where, value = stated(runtime, limit)
        if where and not (value.isdecimal() and int(value) >= limit.least):
            yield f"{where} must be a whole number from {limit.least}, not '{value}'"


def without_effect(runtime: Runtime) -> Iterator[str]:
    """Limits that a runtime states and instances that hold the models themselves have not."""
    if runtime.containers:
        return
    for limit in LIMITS:
        where, _ = stated(runtime, limit)
        if where and limit is not MEMORY_BUFFER and not limit.own:
            yield where
