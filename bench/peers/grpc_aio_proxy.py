"""grpc.aio on uvloop passing every inference on to another server, its bytes unread.

python -m bench.peers.grpc_aio_proxy HOST:PORT
"""

from __future__ import annotations

import asyncio
import json
import sys

import grpc
import uvloop

from bench.peers.grpc_aio_echo import OPTIONS
from bench.peers.paths import MODEL_INFER, SERVICE


async def _serve(target: str) -> None:
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        infer = channel.unary_unary(MODEL_INFER)  # without (de)serialisers the bodies stay bytes

        async def forward(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            answer: bytes = await infer(request)
            return answer

        server = grpc.aio.server(options=OPTIONS)
        handler = grpc.unary_unary_rpc_method_handler(forward)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(json.dumps({"event": "ready", "grpc": f"127.0.0.1:{port}"}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
