"""The common inference request, from bytes to bytes in one compiled call."""

from collections.abc import Callable, Mapping
from typing import Any, final

from numpy.typing import NDArray

from mmcore._ext.v2codec import InferRequest

@final
class Prepared:
    def __init__(self, copy: Any) -> None: ...
    @property
    def batched(self) -> bool: ...
    def allow(self, rows: int, allowed: bool) -> None: ...

@final
class CommonPath:
    tracing: bool
    def __init__(
        self,
        lookup: Callable[..., Any],
        uncommon: Callable[[Any, InferRequest, Any, int], Any],
        measured: Callable[[Any, InferRequest, Any, Mapping[str, NDArray[Any]], int, int], Any],
        slow: Callable[[Any, int, int], None],
    ) -> None: ...
    def infer(self, call: Any, body: bytes) -> Any: ...
