"""A KServe v2 server as one writes it by hand: grpc.aio on uvloop, protobuf messages, numpy and the framework's call.

    python -m bench.peers.grpc_aio_v2 NAME=FRAMEWORK:PATH …

Serves ModelInfer of the models named, raw contents in and out.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Final

import grpc
import numpy as np
import uvloop

from bench.peers import frameworks
from bench.peers.paths import SERVICE
from mmcore.pb import inference_pb2

DTYPES: Final = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}


class Inference:
    """The service's one method."""

    def __init__(self, models: dict[str, frameworks.Call]) -> None:
        self._models = models

    async def model_infer(
        self, request: inference_pb2.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ModelInferResponse:
        """Parse, run, answer."""
        if request.model_name not in self._models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.model_name!r}")
        tensor = request.inputs[0]
        array = np.frombuffer(request.raw_input_contents[0], DTYPES[tensor.datatype]).reshape(tensor.shape)
        response = inference_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        for name, datatype, output in self._models[request.model_name](array):
            response.outputs.add(name=name, datatype=datatype, shape=output.shape)
            response.raw_output_contents.append(output.tobytes())
        return response


async def _serve(models: dict[str, frameworks.Call]) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        Inference(models).model_infer,
        request_deserializer=inference_pb2.ModelInferRequest.FromString,
        response_serializer=inference_pb2.ModelInferResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "grpc": f"127.0.0.1:{port}"}), flush=True)
    await asyncio.Event().wait()


def main(arguments: list[str]) -> None:
    """Load the models and serve until killed."""
    models = {}
    for argument in arguments:
        name, _, location = argument.partition("=")
        framework, _, path = location.partition(":")
        models[name] = frameworks.load(framework, Path(path))
    uvloop.run(_serve(models))


if __name__ == "__main__":
    main(sys.argv[1:])
