"""mmcore's transport with a Python handler that answers the bytes it was sent."""

from __future__ import annotations

import asyncio
import json

import uvloop

from bench.peers.paths import MODEL_INFER
from mmcore.server.allocator import keep_freed_memory
from mmcore.transport import Server, ServerCall


def _echo(call: ServerCall, message: bytes) -> bytes:
    return message


async def _serve() -> None:
    server = Server()
    server.add_unary(MODEL_INFER, _echo)
    address = await server.listen_tcp("127.0.0.1", 0)
    print(json.dumps({"event": "ready", "grpc": address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    keep_freed_memory()  # as `mmcore serve` does, and raw-c
    uvloop.run(_serve())
