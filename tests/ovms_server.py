"""What OpenVINO Model Server answers its config API with, as its documentation and source have it; a stand-in for it.

    python -m tests.ovms_server GRPC REST CONFIG [CERTIFICATE KEY]

With a certificate both ports speak TLS, as they do behind the proxy that its documentation puts before it for that.

There is no package of the server that could be installed here. This reads the same file, answers the same paths with
the same statuses and JSON (200 nothing changed, 201 changed, 412 something was wrong), loads one model after the other,
and answers ModelInfer of KServe v2 with the request's own tensors, and TensorFlow Serving's Predict with what OpenVINO
itself makes of them. A file called ``broken-…`` does not load, one called ``slow-…`` takes a while. ``GET /log``
answers what was read: a line for each time, the names in it.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc

from mmcore.pb import inference_pb2
from tests import predict_messages


class Ovms:
    def __init__(self, config: Path) -> None:
        self.config = config
        self.models: dict[str, dict[str, Any]] = {}
        self.bases: dict[str, str] = {}
        self.log: list[str] = []
        self.compiled: dict[str, Any] = {}
        self.reading = threading.Lock()

    def reload(self) -> tuple[int, dict[str, Any]]:
        with self.reading:
            try:
                entries = json.loads(self.config.read_text())["model_config_list"]
            except (OSError, ValueError, KeyError):
                return 412, {"error": "Reloading config file failed. Check server logs for more info."}
            wanted = {entry["config"]["name"]: entry["config"]["base_path"] for entry in entries}
            self.log.append(" ".join(wanted))
            changed = wrong = False
            for name in self.bases.keys() - wanted.keys():
                del self.bases[name]
                # Retired versions are listed as ended.
                self.models[name] = _version("1", "END")
                changed = True
            for name, base in wanted.items():
                if self.bases.get(name) != base or self.models[name]["model_version_status"][0]["state"] != "AVAILABLE":
                    changed = True
                    self.bases[name] = base
                    self.models[name] = self.load(Path(base))
                    wrong |= self.models[name]["model_version_status"][0]["state"] != "AVAILABLE"
            if wrong:
                return 412, {"error": "Reloading config file failed. Check server logs for more info."}
            return 201 if changed else 200, self.models

    def load(self, base: Path) -> dict[str, Any]:
        versions = sorted((int(one.name) for one in base.iterdir() if one.name.isdecimal()), reverse=True)
        # By the names that they have where the links lead.
        files = [file.resolve().name for file in (base / str(versions[0])).iterdir()] if versions else []
        if any(file.startswith("slow") for file in files):
            time.sleep(0.5)
        if not files or any(file.startswith("broken") for file in files):
            return _version("1", "LOADING", "UNKNOWN", "Cannot compile model into target device")
        return _version(str(versions[0]), "AVAILABLE")

    def infer(self, body: bytes, context: Any) -> bytes:
        request = inference_pb2.ModelInferRequest.FromString(body)
        listed = self.models.get(request.model_name)
        if listed is None or listed["model_version_status"][0]["state"] != "AVAILABLE":
            context.abort(grpc.StatusCode.NOT_FOUND, "Model with requested name is not found")
        response = inference_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        for tensor in request.inputs:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.extend(request.raw_input_contents)
        encoded: bytes = response.SerializeToString()
        return encoded

    def predict(self, body: bytes, context: Any) -> bytes:
        request = predict_messages.Request.FromString(body)
        base = self.bases.get(request.model_spec.name)
        if base is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "Model with requested name is not found")
        network = self.compile(base)
        given = predict_messages.arrays(request.inputs)
        for taken in network.inputs:
            if (shape := given[taken.any_name].shape) and len(shape) != taken.partial_shape.rank.get_length():
                told = f"Invalid number of shape dimensions - Expected: {taken.partial_shape}; Actual: {shape}"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, told)
        response = predict_messages.Response()
        response.model_spec.name = request.model_spec.name
        outputs = network(given)
        predict_messages.fill(response.outputs, **{one.any_name: outputs[one] for one in network.outputs})
        encoded: bytes = response.SerializeToString()
        return encoded

    def compile(self, base: str) -> Any:
        if base not in self.compiled:
            # It tells its maker of its use otherwise.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
            import openvino

            [file] = Path(base).glob("1/*.xml")
            exact = {"INFERENCE_PRECISION_HINT": "f32"}
            self.compiled[base] = openvino.Core().compile_model(file, "CPU", exact)
        return self.compiled[base]


def _version(version: str, state: str, code: str = "OK", message: str = "OK") -> dict[str, Any]:
    status = {"error_code": code, "error_message": message}
    return {"model_version_status": [{"version": version, "state": state, "status": status}]}


def handler(ovms: Ovms) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/log":
                self.answer(200, {"log": ovms.log})
            else:
                self.answer(200, ovms.models)

        def do_POST(self) -> None:
            self.answer(*ovms.reload())

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    grpc_address, rest, config, *tls = sys.argv[1:]
    ovms = Ovms(Path(config))
    if ovms.config.exists():
        ovms.reload()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(ovms.infer)}
    predict = {"Predict": grpc.unary_unary_rpc_method_handler(ovms.predict)}
    handlers = {"inference.GRPCInferenceService": methods, "tensorflow.serving.PredictionService": predict}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*one) for one in handlers.items()])
    host, _, port = rest.rpartition(":")
    listener = ThreadingHTTPServer((host, int(port)), handler(ovms))
    if tls:
        certificate, key = tls
        pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
        server.add_secure_port(grpc_address, grpc.ssl_server_credentials([pair]))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
    else:
        server.add_insecure_port(grpc_address)
    server.start()
    print("ready", flush=True)
    listener.serve_forever()
