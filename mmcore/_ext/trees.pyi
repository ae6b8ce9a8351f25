from collections.abc import Iterable
from typing import Any, Final, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

TRANSFORMS: Final[dict[str, int]]

@final
class Forest:
    def __init__(
        self,
        width: int,
        columns: int,
        trees: Iterable[tuple[int, Any, Any, Any, Any, Any]],
        base: ArrayLike,
        transform: str,
        base_last: bool = False,
    ) -> None: ...
    @property
    def width(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def margins(self, features: ArrayLike) -> NDArray[np.float32]: ...
    def values(self, features: ArrayLike) -> NDArray[np.float32]: ...

@final
class MeanForest:
    def __init__(self, width: int, columns: int, trees: Iterable[tuple[NDArray[Any], NDArray[np.float64]]]) -> None: ...
    @property
    def width(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def means(self, features: ArrayLike) -> NDArray[np.float64]: ...
