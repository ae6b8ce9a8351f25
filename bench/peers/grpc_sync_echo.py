"""grpcio's synchronous server on a thread pool answering the bytes it was sent."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.peers.paths import SERVICE

OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20))
THREADS = 10  # as in grpcio's own examples; on one core more threads only add switches


def _echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


def main() -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"event": "ready", "grpc": f"127.0.0.1:{port}"}), flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
