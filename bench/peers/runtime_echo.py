"""A runtime on our transport that answers every inference with the request, as fast as that goes.

python -m bench.peers.runtime_echo
"""

from __future__ import annotations

import asyncio
import json

import uvloop

from bench.peers.paths import MODEL_INFER
from mmcore.adapters import SERVICE
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.server.allocator import keep_freed_memory
from mmcore.transport import Server

READY = pb.RuntimeStatusResponse(
    status=pb.RuntimeStatusResponse.READY, capacityInBytes=2**30, maxLoadingConcurrency=1, modelLoadingTimeoutMs=5000
)


async def _serve() -> None:
    server = Server()
    server.add_unary(MODEL_INFER, lambda call, message: message)
    loaded = pb.LoadModelResponse(sizeInBytes=1000).SerializeToString()
    server.add_unary(f"/{SERVICE}/runtimeStatus", lambda call, message: READY.SerializeToString())
    server.add_unary(f"/{SERVICE}/loadModel", lambda call, message: loaded)
    server.add_unary(f"/{SERVICE}/unloadModel", lambda call, message: b"")
    address = await server.listen_tcp("127.0.0.1", 0)
    print(json.dumps({"event": "ready", "grpc": address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    keep_freed_memory()  # as `mmcore serve` does
    uvloop.run(_serve())
