"""The common inference request, from bytes to bytes in one compiled call."""

from collections.abc import Callable
from typing import Any, final

from numpy.typing import NDArray

from mmcore._ext.responses import Shelf
from mmcore._ext.v2codec import InferRequest
from mmcore.batching.merging import Merging

@final
class Gathered: ...

@final
class Prepared:
    def __init__(
        self,
        copy: Any,
        merging: Merging | None = None,
        most_rows: int = 0,
        shelf: Shelf | None = None,
        free: Callable[[], bool] | None = None,
    ) -> None: ...
    @property
    def batched(self) -> bool: ...
    def allow(self, rows: int, allowed: bool) -> None: ...
    def keep(
        self, request: InferRequest, message: bytes | bytearray | memoryview | list[bytes | memoryview]
    ) -> None: ...
    def close(self) -> None: ...

@final
class CommonPath:
    tracing: bool
    def __init__(
        self,
        lookup: Callable[..., Any],
        uncommon: Callable[[Any, InferRequest, Any, int], Any],
        measured: Callable[[Any, InferRequest, Any, dict[str, NDArray[Any]], int, int], Any],
        slow: Callable[[Any, int, int], None],
        refuse: Callable[[Any, BaseException, str], None],
    ) -> None: ...
    def turn_ended(self, prepared: Prepared) -> None: ...
    def infer(self, call: Any, body: bytes) -> Any: ...
