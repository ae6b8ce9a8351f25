"""What a server with an adapter is told to be like when it is ready, in the SPI's words."""

from __future__ import annotations

from collections.abc import Mapping

from mmcore.adapters.server_memory import DEFAULT_BYTES, ServerMemory
from mmcore.pb import model_runtime_pb2 as pb


def ready(
    memory: ServerMemory, version: str, methods: Mapping[str, tuple[int, ...]], *, loads_at_once: int, load_s: float
) -> pb.RuntimeStatusResponse:
    """READY, with the capacity that is seen of the server's container.

    ``methods`` are those that requests for models may come by, and the fields that lead to the model's id in them. By
    no other one is the server reached: it may have some that load and unload models.
    """
    response = pb.RuntimeStatusResponse(
        status=pb.RuntimeStatusResponse.READY,
        capacityInBytes=memory.capacity_bytes,
        maxLoadingConcurrency=loads_at_once,
        modelLoadingTimeoutMs=int(load_s * 1000),
        defaultModelSizeInBytes=DEFAULT_BYTES,
        runtimeVersion=version,
    )
    for method, path in methods.items():
        response.methodInfos[method].idInjectionPath.extend(path)
    return response
