"""A runtime that speaks mmesh.ModelRuntime, over other people's gRPC server: slow, failing, lying or hanging on demand.

    python -m tests.toy_runtime ADDRESS [JSON]

JSON holds what it says of itself: ``capacity``, ``limit`` (requests at once per model), ``methods`` (method to
injection path), ``any`` (allowAnyMethod), ``data`` (where requests go, if not to ADDRESS), ``load_ms``, ``starting``
(answers STARTING so often), ``status`` FAILING,
``loads`` (at once), ``predicts`` (MiB that each model is said to take beforehand; "never": it is not answered).
What a model does is told by words in its path: see :meth:`Toy.load`. Every model answers ModelInfer with the request's
own tensors, its id as the model's name. ``/toy.Toy/Journal`` answers what was asked of it, one line each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from mmcore.pb import inference_pb2
from mmcore.pb import model_runtime_pb2 as pb

MIB = 2**20
SIZES = {"huge": 200 * MIB, "unsized": 0, "unknown": 0, "boundless": 2**64 - 1, "tiny": 1}
Context = Any


class Toy:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.models: dict[str, set[str]] = {}
        self.journal: list[str] = []
        self.starting = int(settings.get("starting", 0))
        self.unloads_refused: dict[str, int] = {}
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.loading = self.most_loading = 0
        self.refused: grpc.StatusCode | None = None

    def status(self, request: pb.RuntimeStatusRequest, context: Context) -> pb.RuntimeStatusResponse:
        self.journal.append("status")
        if self.settings.get("status") == "FAILING":
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.FAILING)
        if self.starting > 0:
            self.starting -= 1
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        self.models.clear()
        response = pb.RuntimeStatusResponse(
            status=pb.RuntimeStatusResponse.READY,
            capacityInBytes=self.settings.get("capacity", 100 * MIB),
            maxLoadingConcurrency=self.settings.get("loads", 2),
            modelLoadingTimeoutMs=self.settings.get("load_ms", 5000),
            defaultModelSizeInBytes=MIB,
            runtimeVersion="toy",
            limitModelConcurrency="limit" in self.settings,
            allowAnyMethod=self.settings.get("any", False),
        )
        for method, path in self.settings.get("methods", {}).items():
            response.methodInfos[method].idInjectionPath.extend(path)
        return response

    def load(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        self.journal.append(f"load {request.modelId}")
        self.journal.append(f"request {request.modelType} {request.modelPath} {request.modelKey}")
        words = set(Path(request.modelPath).stem.split("-"))
        if "refused" in words:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "I do not take such models")
        if "broken" in words:
            self.models[request.modelId] = words  # of which something may be left
            context.abort(grpc.StatusCode.INTERNAL, "it is broken")
        if "waits" in words:
            while context.is_active():  # given up by who asked for it
                time.sleep(0.01)
            self.journal.append(f"cancelled {request.modelId}")
        if "stuck" in words:
            time.sleep(self.settings.get("load_ms", 5000) / 1000 + 1)
        if "slow" in words:
            with self.lock:
                self.loading += 1
                self.most_loading = max(self.most_loading, self.loading)
            time.sleep(0.3)
            with self.lock:
                self.loading -= 1
        if "crash" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        self.models[request.modelId] = words
        size = next((size for word, size in SIZES.items() if word in words), 10 * MIB)
        return pb.LoadModelResponse(sizeInBytes=size, maxConcurrency=self.settings.get("limit", 0))

    def unload(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        self.journal.append(f"unload {request.modelId}")
        if "stays" in self.models.get(request.modelId, ()) and not self.unloads_refused.get(request.modelId):
            self.unloads_refused[request.modelId] = 1
            context.abort(grpc.StatusCode.INTERNAL, "not now")
        if self.models.pop(request.modelId, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        return pb.UnloadModelResponse()

    def size(self, request: pb.ModelSizeRequest, context: Context) -> pb.ModelSizeResponse:
        self.journal.append(f"size {request.modelId}")
        if "unknown" in self.models[request.modelId]:
            context.abort(grpc.StatusCode.INTERNAL, "who knows")
        return pb.ModelSizeResponse(sizeInBytes=7 * MIB)

    def predict(self, request: pb.PredictModelSizeRequest, context: Context) -> pb.PredictModelSizeResponse:
        self.journal.append(f"predict {request.modelId}")
        predicted = self.settings.get("predicts")
        if predicted is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no idea")
        if predicted == "never":
            time.sleep(60)
        return pb.PredictModelSizeResponse(sizeInBytes=int(predicted) * MIB)

    def infer(self, body: bytes, context: Context) -> bytes:
        request = inference_pb2.ModelInferRequest.FromString(body)
        words = self.models.get(request.model_name, set())
        if request.model_name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_name}")
        headers = dict(context.invocation_metadata())
        if "traceparent" in headers:
            self.journal.append(f"traced {headers['traceparent']}")
        self.journal.append(f"infer {request.model_name} {headers.get('mm-model-id')} {headers.get('mm-vmodel-id')}")
        if self.refused is not None:
            context.abort(self.refused, "not now")
        with self.lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if "sleepy" in words:
                time.sleep(0.05)
            if "raising" in words:
                context.set_trailing_metadata((("why", "because"),))
                context.abort(grpc.StatusCode.OUT_OF_RANGE, "seven is not a number I like")
            return _answer(request, request.model_name)
        finally:
            with self.lock:
                self.running -= 1

    def forget(self, body: bytes, context: Context) -> bytes:
        self.models.clear()
        return b""

    def refuse(self, body: bytes, context: Context) -> bytes:
        """Answer requests for models with this status from now on."""
        self.refused = grpc.StatusCode[body.decode()]
        return b""

    def sleep(self, body: bytes, context: Context) -> bytes:
        time.sleep(float(body))
        return b""

    def journal_text(self, body: bytes, context: Context) -> bytes:
        most = [f"most loading {self.most_loading}", f"most {self.most_running}"]
        return "\n".join([*self.journal, *most]).encode()

    def stream(self, bodies: Any, context: Context) -> Any:
        self.journal.append(f"stream {dict(context.invocation_metadata()).get('traceparent')}")
        for body in bodies:
            request = inference_pb2.ModelInferRequest.FromString(body)
            found = request.model_name in self.models
            for number in range(2):
                response = inference_pb2.ModelStreamInferResponse()
                if found:
                    response.infer_response.ParseFromString(_answer(request, request.model_name))
                    response.infer_response.id = f"{request.id}.{number}"
                else:
                    response.error_message = f"no model {request.model_name}"
                yield response.SerializeToString()

    def ask(self, body: bytes, context: Context) -> bytes:
        """A service of its own: the message is the answer, behind the id that the metadata tells."""
        name: str = dict(context.invocation_metadata())["mm-model-id"]
        if name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {name}")
        return name.encode() + b" " + body


def _encoded(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


def _answer(request: inference_pb2.ModelInferRequest, name: str) -> bytes:
    response = inference_pb2.ModelInferResponse(model_name=name, id=request.id)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.extend(request.raw_input_contents)
    return response.SerializeToString()


def serve(address: str, settings: dict[str, Any]) -> list[grpc.Server]:
    """Start at ``address``; at ``data`` of the settings, where they have that, what is not the SPI."""
    toy = Toy(settings)
    server = grpc.server(futures.ThreadPoolExecutor(16))

    def typed(method: Any, request: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            method, request.FromString, lambda answer: answer.SerializeToString()
        )

    spi = {
        "loadModel": typed(toy.load, pb.LoadModelRequest),
        "unloadModel": typed(toy.unload, pb.UnloadModelRequest),
        "modelSize": typed(toy.size, pb.ModelSizeRequest),
        "runtimeStatus": typed(toy.status, pb.RuntimeStatusRequest),
        "predictModelSize": typed(toy.predict, pb.PredictModelSizeRequest),
    }
    raw = grpc.unary_unary_rpc_method_handler
    services = {
        settings.get("service", "mmesh.ModelRuntime"): spi,
        "inference.GRPCInferenceService": {
            "ModelInfer": raw(toy.infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(toy.stream),
        },
        "toy.Toy": {
            "Forget": raw(toy.forget),
            "Journal": raw(toy.journal_text),
            "Ask": raw(toy.ask),
            "Refuse": raw(toy.refuse),
            "Sleep": raw(toy.sleep),
        },
    }
    servers = [(server, address, services)]
    if "data" in settings:
        managed = {name: methods for name, methods in services.items() if methods is spi}
        asked = {name: methods for name, methods in services.items() if methods is not spi}
        servers = [(server, address, managed), (grpc.server(futures.ThreadPoolExecutor(16)), settings["data"], asked)]
    for one, where, offered in servers:
        for service, methods in offered.items():
            one.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        if "tls" in settings:  # files: its certificate, its key, the authority of its clients
            certificate, key, authority = (Path(file).read_bytes() for file in settings["tls"])
            assert one.add_secure_port(where, grpc.ssl_server_credentials([(key, certificate)], authority, True)), where
        else:
            assert one.add_insecure_port(where), where
        one.start()
    return [one for one, _, _ in servers]


if __name__ == "__main__":
    running = serve(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    print("ready", flush=True)
    running[0].wait_for_termination()
