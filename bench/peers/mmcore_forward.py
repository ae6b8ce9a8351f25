"""An instance of mmcore's that holds nothing and passes every inference on to the one it is told of.

python -m bench.peers.mmcore_forward HOST:PORT
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

from bench.peers.paths import MODEL_INFER
from mmcore._ext.lru import Lru
from mmcore._ext.router import Table
from mmcore._ext.v2codec import decode_infer_request
from mmcore.routing.forwarding import Forwarding
from mmcore.server.allocator import keep_freed_memory
from mmcore.transport import Server, ServerCall

MODEL = "identity"


async def _serve(target: str) -> None:
    forwarding = Forwarding("front")
    forwarding.update("holder", target)
    table = Table(Lru())
    table.hold(MODEL, forwarding.holders(["holder"]))

    def infer(call: ServerCall, body: bytes) -> None:
        # As an instance does: the name is read, and the table asked for a copy here and then for those elsewhere.
        name = decode_infer_request(body).model_name
        if table.lookup(name) is None:
            forwarding.unary(call, body, name, table.holders(name))

    server = Server()
    server.add_unary(MODEL_INFER, infer)
    address = await server.listen_tcp("127.0.0.1", 0)
    print(json.dumps({"event": "ready", "grpc": address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    keep_freed_memory()  # as `mmcore serve` does
    uvloop.run(_serve(sys.argv[1]))
