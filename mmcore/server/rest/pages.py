"""What the REST port says of itself: an OpenAPI document, and a page to try it that needs nothing from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import orjson

import mmcore
from mmcore.model import NUMPY_DTYPES

_PAGE: Final = Path(__file__).with_name("try.html")

_SUMMARIES: Final = {
    "live": "Whether the server is live",
    "ready": "Whether the server is ready",
    "server_metadata": "Name, version and extensions of the server",
    "models": "The names of all models",
    "model_ready": "Whether a request for the model would be answered",
    "model_metadata": "Names, datatypes and shapes of the model's tensors",
    "model_config": "The model's configuration, as Triton's ModelConfig",
    "model_statistics": "What was answered, and the time it took",
    "infer": "Run the model",
    "predict": "Run the model on rows (KServe V1)",
    "trace_settings": "Read or change which requests are traced",
    "log_settings": "Read or change which lines are logged",
    "index": "Every version of every model and its state",
    "load": "Load the model from its files as they are now",
    "unload": "Take the model out of service",
    "region_status": "The shared memory that has been registered",
    "register_region": "Register a region of system shared memory",
    "unregister_region": "Forget a region of shared memory, or all",
    "cuda_status": "Not served",
    "register_cuda": "Not served",
    "unregister_cuda": "Forget nothing; taken from clients that begin afresh",
}

#: Of Triton's binary tensor data extension.
_HEADER_LENGTH: Final = {
    "description": "the length of the JSON document, behind which binary tensors follow in the order of the document",
    "schema": {"type": "integer", "minimum": 0},
}
_CODING: Final = {"type": "string", "enum": ["gzip", "deflate"]}
_HEADERS: Final = [
    {"name": "Inference-Header-Content-Length", "in": "header", **_HEADER_LENGTH},
    {"name": "Content-Encoding", "in": "header", "schema": _CODING},
    {
        "name": "Accept-Encoding",
        "in": "header",
        "schema": {"type": "string"},
        "description": "gzip or deflate alone has the answer compressed; lists of codings do not",
    },
]
_BINARY: Final = {
    "application/octet-stream": {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "the JSON document, then the bytes of the tensors whose parameter binary_data_size says how "
            "many are theirs: little-endian, row-major; an element of BYTES has its length before it, in four bytes",
        }
    }
}


def _parameters(**known: dict[str, str]) -> dict[str, Any]:
    """Parameters of which some are known."""
    any_of = [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]
    return {"type": "object", "properties": known, "additionalProperties": {"oneOf": any_of}}


_TENSOR: Final = {
    "name": {"type": "string"},
    "datatype": {"type": "string", "enum": list(NUMPY_DTYPES)},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "parameters": {"$ref": "#/components/schemas/TensorParameters"},
    "data": {
        "type": "array",
        "items": {},
        "description": 'elements, flat or nested, row-major; "NaN", "Infinity" and "-Infinity" for what is not '
        "finite; absent where the tensor is binary or in shared memory",
    },
}
_SCHEMAS: Final[dict[str, Any]] = {
    "RequestParameters": _parameters(
        binary_data_output={"type": "boolean", "description": "all outputs as binary tensors"},
        timeout={"type": "integer", "description": "microseconds that the request may wait"},
        priority={"type": "integer", "description": "of config.pbtxt's levels"},
    ),
    "TensorParameters": _parameters(
        binary_data_size={"type": "integer", "description": "bytes of this tensor behind the document"},
        content_type={"type": "string", "description": "base64: so are the elements of BYTES"},
        shared_memory_region={"type": "string", "description": "where the tensor lies instead"},
        shared_memory_byte_size={"type": "integer"},
        shared_memory_offset={"type": "integer"},
    ),
    "OutputParameters": _parameters(
        binary_data={"type": "boolean", "description": "as a binary tensor"},
        classification={"type": "integer", "description": "the so many highest, as value:index:label"},
        shared_memory_region={"type": "string", "description": "where the tensor is to be put"},
        shared_memory_byte_size={"type": "integer"},
        shared_memory_offset={"type": "integer"},
    ),
    "ResponseParameters": _parameters(),
    "Tensor": {"type": "object", "required": ["name", "datatype", "shape"], "properties": _TENSOR},
    "RequestedOutput": {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "parameters": {"$ref": "#/components/schemas/OutputParameters"}},
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"$ref": "#/components/schemas/RequestParameters"},
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/RequestedOutput"}},
        },
    },
    "InferResponse": {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"$ref": "#/components/schemas/ResponseParameters"},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        },
    },
    "PredictRequest": {"type": "object", "properties": {"instances": {"type": "array", "items": {}}, "inputs": {}}},
    "PredictResponse": {"type": "object", "properties": {"predictions": {}}},
    "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}
#: What the segment behind such a one names.
_NAMES: Final = {"models": "model", "versions": "version", "region": "region", "repository": "repository"}
_BODIES: Final = {"infer": ("InferRequest", "InferResponse"), "predict": ("PredictRequest", "PredictResponse")}


@cache
def openapi(routes: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]) -> bytes:
    """The OpenAPI 3.1 document of these routes: paths with the methods by HTTP method."""
    paths: dict[str, Any] = {}
    for pattern, methods in routes:
        path, names = _template(pattern)
        paths[path] = {verb.lower(): _operation(f"{verb} {path}", verb, method, names) for verb, method in methods}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "mmcore", "version": mmcore.__version__, "summary": "KServe V2 and V1 over HTTP"},
        "paths": paths,
        # Both ways: an instance may have no tokens.
        "security": [{}, {"token": []}],
        "components": {"schemas": _SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }
    return orjson.dumps(document)


def _template(pattern: str) -> tuple[str, list[str]]:
    """A route's path as OpenAPI writes it, and the names of its parameters."""
    names: list[str] = []

    def name(match: re.Match[str]) -> str:
        names.append(_NAMES[match[1]])
        return f"{match[1]}/{{{names[-1]}}}"

    return "/" + re.sub(r"(\w+)/\*", name, pattern), names


def _operation(operation: str, verb: str, method: str, names: list[str]) -> dict[str, Any]:
    asked, told = _BODIES.get(method, (None, None))
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", operation).strip("_"),
        "summary": _SUMMARIES[method],
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names],
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": _reference(told)}}},
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": _reference("Error")}},
            },
        },
    }
    if verb == "POST":
        found["requestBody"] = {"content": {"application/json": {"schema": _reference(asked)}}}
    if method == "infer":
        found["parameters"] += _HEADERS
        found["requestBody"]["content"] |= _BINARY
        found["responses"]["200"]["content"] |= _BINARY
        found["responses"]["200"]["headers"] = {"Inference-Header-Content-Length": _HEADER_LENGTH}
    return found


def _reference(schema: str | None) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"} if schema else {}


@cache
def try_page() -> bytes:
    """The page."""
    return _PAGE.read_bytes()
