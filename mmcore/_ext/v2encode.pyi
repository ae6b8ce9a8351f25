"""ModelInferRequest and ModelInferResponse from numpy arrays to wire bytes."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

Param: TypeAlias = bool | int | float | str

def encode_infer_response(
    model_name: str,
    model_version: str,
    request_id: str,
    outputs: Sequence[tuple[str, str, NDArray[Any] | tuple[int, ...]]],
    *,
    raw: bool,
    parameters: Mapping[str, Param] | None = None,
    output_parameters: Mapping[str, Mapping[str, Param]] | None = None,
) -> bytes | list[bytes | memoryview]: ...
def encode_infer_request(
    model_name: str,
    inputs: Sequence[tuple[str, str, NDArray[Any] | tuple[int, ...]]],
    *,
    model_version: str = "",
    request_id: str = "",
    outputs: Sequence[str] = (),
    raw: bool = True,
    parameters: Mapping[str, Param] | None = None,
    input_parameters: Mapping[str, Mapping[str, Param]] | None = None,
    output_parameters: Mapping[str, Mapping[str, Param]] | None = None,
) -> bytes: ...
