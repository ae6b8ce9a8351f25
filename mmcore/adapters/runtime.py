"""What is asked of a runtime that is a process of its own, whatever it speaks."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final, Protocol

from mmcore.errors import Status
from mmcore.pb import model_runtime_pb2 as pb

SERVICE: Final = "mmesh.ModelRuntime"


#: What gives a channel its context for TLS.
Tls = Callable[[], ssl.SSLContext]


class Runtime(Protocol):
    """A runtime. Requests for its models go to ``address`` as gRPC, whatever loads them there.

    The messages and what they mean are those of ``mmesh.ModelRuntime`` (protos/model_runtime.proto); every method
    raises :class:`mmcore.errors.RpcError` with the runtime's status.

    Attributes:
        address: ``host:port`` or ``unix:PATH``.
    """

    address: str

    def prepare(self) -> None:
        """Make what the server does not start without, where that is missing. Blocking; OSError."""

    async def status(self, timeout_s: float) -> pb.RuntimeStatusResponse:
        """Whether it is ready; by when it holds no models any more."""

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """Load a model. Cancelled or timed out, it is followed by :meth:`unload`."""

    async def unload(self, model: str, timeout_s: float) -> None:
        """Unload a model; one that is not there is no error."""

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """What a model will take, in bytes."""

    async def size(self, model: str, timeout_s: float) -> int:
        """What a loaded model takes, in bytes."""

    async def close(self) -> None:
        """Let go of connections."""


def has_forgotten(status: int, details: str) -> bool:
    """Whether an answer to a request says that its model is not loaded, in any runtime's words."""
    if status == Status.NOT_FOUND:
        return True
    if status == Status.UNAVAILABLE:  # Triton
        return details.startswith("Request for unknown model") and details.endswith(
            (" is not found", " has no available versions")
        )
    if status == Status.INTERNAL:  # TorchServe
        return details.startswith("Model not found: ") and details.endswith("ModelNotFoundException")
    # MLServer before 1.4
    return status == Status.INVALID_ARGUMENT and details.startswith("Model ") and details.endswith(" not found")
