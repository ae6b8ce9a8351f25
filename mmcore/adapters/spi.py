"""A runtime that speaks ``mmesh.ModelRuntime`` itself."""

from __future__ import annotations

from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from mmcore.adapters.runtime import SERVICE, Tls
from mmcore.errors import RpcError, Status
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.transport import Channel

#: The service's name before ModelMesh; the messages are the same.
_OLD_SERVICE: Final = "com.ibm.watson.tas.internal.proto.ModelServer"

ResponseT = TypeVar("ResponseT", bound=Message)


class SpiRuntime:
    """A runtime that is managed at ``managed`` and answers requests at ``address``, which may be the same.

    Satisfies :class:`mmcore.adapters.runtime.Runtime`.
    """

    def __init__(self, managed: str, address: str, tls: Tls | None = None) -> None:
        self.address: str = address
        self._channel = Channel(managed, ssl=tls)
        self._service = SERVICE

    def prepare(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`: nothing is known of it."""

    async def status(self, timeout_s: float) -> pb.RuntimeStatusResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`; asked by the old name where it has the new one not."""
        request = pb.RuntimeStatusRequest()
        try:
            return await self._call("runtimeStatus", request, pb.RuntimeStatusResponse, timeout_s)
        except RpcError as error:
            if error.status is not Status.UNIMPLEMENTED or self._service != SERVICE:
                raise
            self._service = _OLD_SERVICE
            try:
                return await self._call("runtimeStatus", request, pb.RuntimeStatusResponse, timeout_s)
            except RpcError:
                self._service = SERVICE
                raise error from None

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        return await self._call("loadModel", request, pb.LoadModelResponse, timeout_s)

    async def unload(self, model: str, timeout_s: float) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        request = pb.UnloadModelRequest(modelId=model)
        try:
            await self._call("unloadModel", request, pb.UnloadModelResponse, timeout_s)
        except RpcError as error:
            if error.status is not Status.NOT_FOUND:
                raise

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        return (await self._call("predictModelSize", request, pb.PredictModelSizeResponse, timeout_s)).sizeInBytes

    async def size(self, model: str, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        request = pb.ModelSizeRequest(modelId=model)
        return (await self._call("modelSize", request, pb.ModelSizeResponse, timeout_s)).sizeInBytes

    async def close(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        await self._channel.close()

    async def _call(self, method: str, request: Message, answer: type[ResponseT], timeout_s: float) -> ResponseT:
        path = f"/{self._service}/{method}"
        message = await self._channel.unary(path, request.SerializeToString(), timeout_s=timeout_s)
        try:
            return answer.FromString(message)
        except DecodeError as error:
            raise RpcError(Status.INTERNAL, f"{method} answers what is no {answer.DESCRIPTOR.name}: {error}") from None
