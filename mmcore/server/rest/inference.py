"""Inference over HTTP: the JSON request and its binary tensors become the bytes of a ModelInferRequest, which take the
way of every gRPC request; the bytes of the answer become JSON and binary tensors again.

So routing, loading, batching, priorities, shared memory, classification and tracing are the same for both, and what is
written here costs two passes over small messages. JSON and binary tensors are those of the Open Inference Protocol and
of Triton's binary tensor data extension.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from math import prod
from typing import Any, Final

from mmcore._ext.tensor import array_to_raw
from mmcore._ext.v2codec import InferResponse, Param, decode_infer_response, encode_infer_request
from mmcore.errors import InvalidRequest
from mmcore.model import NUMPY_DTYPES
from mmcore.pb import inference_pb2
from mmcore.server.calls import Body, Waiting, refuse
from mmcore.server.rest.answers import HttpAnswer, UnaryHandler, joined
from mmcore.server.rest.encodings import TooLong, decoded, encoded
from mmcore.server.rest.large import (
    LARGE_BODY_BYTES,
    LARGE_BYTES,
    LARGE_ELEMENTS,
    Numbers,
    Writing,
    without_numbers,
)
from mmcore.server.rest.request import Part, Request
from mmcore.server.rest.tensors import BASE64, check_count, elements_of, loads, raw_of
from mmcore.server.tensors import REGION

HEADER_LENGTH: Final = b"inference-header-content-length"

_OCTETS: Final = b"application/octet-stream"
_BINARY: Final = "binary_data"
_BINARY_SIZE: Final = "binary_data_size"
_ALL_BINARY: Final = "binary_data_output"
_CONTENT_TYPE: Final = "content_type"
#: A union written at its use would be made anew for each request.
_PARAM_TYPES: Final = (bool, int, float, str)
#: Field 7 of ModelInferRequest, raw_input_contents, length-delimited.
_RAW_TAG: Final = b"\x3a"

#: Which outputs are to be answered in binary, by name; under the empty name what holds for those not named.
Wanted = Mapping[str, bool]
Describe = Callable[[Request, str, str], Awaitable[inference_pb2.ModelMetadataResponse]]


class InferAnswer(HttpAnswer):
    """Where the answer to one inference goes; ``name`` is the model's as it was asked for."""

    __slots__ = ("_name", "_waiting", "wanted")

    def __init__(self, request: Request, waiting: Waiting, name: str) -> None:
        super().__init__(request)
        self._waiting = waiting
        self._name = name
        self.wanted: Wanted = {}

    def reply(self, message: Body) -> None:
        """Answer with what the encoded ModelInferResponse holds."""
        try:
            encoding = joined(message)
            response = decode_infer_response(encoding)
            if _takes_long(self._request, response, len(encoding), self.wanted):
                self._waiting.start(self, self._reply_from_thread(response), "infer")
            else:
                self._send(*document_of(self._name, response, self.wanted))
        except Exception as error:
            refuse(self, error, "infer")

    async def _reply_from_thread(self, response: InferResponse) -> None:
        document, binary = await asyncio.to_thread(document_of, self._name, response, self.wanted)
        coding = encoded(self._request)
        if coding is None:
            self._send(document, binary)
        else:
            body = await asyncio.to_thread(coding.compress, [*document, *binary])
            self._send(document, binary, [body], ((b"content-encoding", coding.name),))

    def _send(
        self,
        document: Sequence[Part],
        binary: Sequence[Part],
        body: list[Part] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        parts = [*document, *binary] if body is None else body
        if binary:
            length = (HEADER_LENGTH, b"%d" % sum(map(len, document)))
            self._request.send(parts, content_type=_OCTETS, headers=(length, *headers))
        else:
            self._request.send(parts, headers=headers)


class RestInference:
    """Serves ``/v2/models/NAME/infer``.

    ``infer`` gives the gRPC method's handler, ``describe(request, name, version)`` tells a model's metadata.
    """

    def __init__(self, infer: Callable[[], UnaryHandler], describe: Describe, waiting: Waiting, max_bytes: int) -> None:
        self._infer = infer
        self._describe = describe
        self._waiting = waiting
        self._max_bytes = max_bytes

    def serve(self, request: Request, name: str, version: str) -> None:
        """Answer one request."""
        call = InferAnswer(request, self._waiting, name)
        try:
            document_bytes, bare = _document_bytes(request, request.length)
            if (
                bare
                or document_bytes > LARGE_BYTES
                or request.length > LARGE_BODY_BYTES
                or b"content-encoding" in request.headers
            ):
                self._waiting.start(call, self._serve_later(call, request, name, version), "infer")
                return
            body = memoryview(request.body)
            message, call.wanted = message_of(name, version, loads(body[:document_bytes]), body[document_bytes:])
            answer = self._infer()(call, message)
        except Exception as error:
            refuse(call, error, "infer")
        else:
            if answer is not None:
                call.reply(answer)

    async def _serve_later(self, call: InferAnswer, request: Request, name: str, version: str) -> Body | None:
        """The way of what is compressed, large, or says nothing but its bytes."""
        try:
            request.body = await decoded(request, self._max_bytes)
        except TooLong as error:
            request.fail(413, str(error))
            return None
        body = request.body
        document_bytes, bare = _document_bytes(request, len(body))
        if bare:
            described = await self._describe(request, name, version)
            message = _bare_message(name, version, described.inputs, memoryview(body))
            call.wanted = {"": True}
        else:
            message, call.wanted = await asyncio.to_thread(_large_message, name, version, body, document_bytes)
        return self._infer()(call, message)


def message_of(
    name: str, version: str, document: object, binary: memoryview, large: Sequence[Numbers] = ()
) -> tuple[bytes, Wanted]:
    """The encoded ModelInferRequest that a JSON document and the bytes behind it stand for.

    Whether data and model agree is for the inference to say. ``large`` holds numbers that have been taken out.

    Raises:
        InvalidRequest: the document is none; names the field.
    """
    if not isinstance(document, dict):
        raise InvalidRequest("expected the request to be a JSON object")
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise InvalidRequest(f"id: expected a string, got {request_id!r}")
    inputs = _Inputs(binary, large)
    for at, entry in enumerate(_objects(document, "inputs")):
        inputs.add(entry, f"inputs[{at}]")
    if not inputs.heads:
        raise InvalidRequest("expected at least one input in 'inputs'")
    if inputs.binary:
        raise InvalidRequest(f"{len(inputs.binary)} bytes of binary data are left behind those of the inputs")
    parameters = _parameters(document, "request")
    wanted = {"": parameters.pop(_ALL_BINARY, False) is True}
    outputs, output_parameters = _requested(document, wanted)
    try:
        head = encode_infer_request(
            name, inputs.heads, model_version=version, request_id=request_id, outputs=outputs, parameters=parameters,
            input_parameters=inputs.parameters, output_parameters=output_parameters,
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(str(error)) from None
    return b"".join((head, *inputs.raws)), wanted


class _Inputs:
    """The inputs of a request as they are read.

    Attributes:
        heads: name, datatype and shape of each.
        parameters: those that are for the inference, by name.
        raws: the raw contents as they stand in the message.
        binary: the bytes behind the document that no input has taken yet.
    """

    def __init__(self, binary: memoryview, large: Sequence[Numbers]) -> None:
        self.heads: list[tuple[str, str, tuple[int, ...]]] = []
        self.parameters: dict[str, dict[str, Param]] = {}
        self.raws: list[bytes | memoryview] = []
        self.binary = binary
        self._large = large

    def add(self, entry: Mapping[str, Any], place: str) -> None:
        """Read one."""
        name, datatype, shape = _head_of(entry, place)
        self.heads.append((name, datatype, shape))
        where = f"input '{name}'"
        parameters = _parameters(entry, where)
        size = parameters.pop(_BINARY_SIZE, None)
        encoding = parameters.pop(_CONTENT_TYPE, None)
        data = entry.get("data")
        raw: bytes | memoryview | None
        if size is not None:
            if data is not None:
                raise InvalidRequest(f"{where}: expected data or {_BINARY_SIZE}, got both")
            raw = self._take(where, size)
        elif data is not None:
            raw = self._of_json(where, datatype, shape, data, encoded=encoding in BASE64)
        elif REGION in parameters:
            raw = None
        else:
            raise InvalidRequest(f"{where}: expected data, {_BINARY_SIZE} or a shared memory region")
        if raw is not None:
            self.raws += (_RAW_TAG, _varint(len(raw)), raw)
        if parameters:
            self.parameters[name] = parameters

    def _take(self, where: str, size: Param) -> memoryview:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InvalidRequest(f"{where}: {_BINARY_SIZE}: expected a number of bytes, got {size!r}")
        if size > len(self.binary):
            raise InvalidRequest(f"{where}: expected {size} bytes of binary data, got {len(self.binary)}")
        taken, self.binary = self.binary[:size], self.binary[size:]
        return taken

    def _of_json(self, where: str, datatype: str, shape: tuple[int, ...], data: object, *, encoded: bool) -> bytes:
        if isinstance(data, int) and 0 <= data < len(self._large):
            raw, count = self._large[data].raw(where, datatype)
            check_count(where, shape, count)
            return raw
        return raw_of(where, datatype, shape, data, encoded=encoded)


def _requested(document: Mapping[str, Any], wanted: dict[str, bool]) -> tuple[list[str], dict[str, dict[str, Param]]]:
    """The names of the outputs asked for and their parameters; which of them in binary is added to ``wanted``."""
    names = []
    parameters = {}
    for at, entry in enumerate(_objects(document, "outputs")):
        name = entry.get("name")
        if not isinstance(name, str):
            raise InvalidRequest(f"outputs[{at}].name: expected a string, got {name!r}")
        told = _parameters(entry, f"output '{name}'")
        if _BINARY in told:
            wanted[name] = told.pop(_BINARY) is True
        names.append(name)
        if told:
            parameters[name] = told
    return names, parameters


def document_of(asked: str, response: InferResponse, wanted: Wanted) -> tuple[list[bytes], list[Part]]:
    """The JSON document of an answer, in pieces, and its binary tensors.

    ``asked`` is the name that the model was asked for by: a vmodel's is not that of the model that answered.
    """
    writing = Writing()
    binary: list[Part] = []
    outputs = []
    for tensor in response.outputs:
        name, datatype = tensor.name, tensor.datatype
        told: dict[str, Any] = {"name": name, "datatype": datatype, "shape": tensor.shape}
        parameters = tensor.parameters
        if REGION in parameters:
            told["parameters"] = parameters
        elif wanted.get(name, wanted.get("", False)):
            raw = array_to_raw(datatype, tensor.array())
            told["parameters"] = {**parameters, _BINARY_SIZE: len(raw)}
            binary.append(raw)
        else:
            array = tensor.array()
            if array.size >= LARGE_ELEMENTS and datatype != "BYTES":
                told["data"] = writing.elements(datatype, array.reshape(-1))
            else:
                told["data"], in_base64 = elements_of(datatype, array)
                if in_base64:
                    parameters = {**parameters, _CONTENT_TYPE: "base64"}
            if parameters:
                told["parameters"] = parameters
        outputs.append(told)
    document: dict[str, Any] = {"model_name": asked, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = response.parameters
    document["outputs"] = outputs
    return writing.pieces(document), binary


def _takes_long(request: Request, response: InferResponse, size: int, wanted: Wanted) -> bool:
    """Whether an answer of ``size`` bytes is to be compressed, or has many elements to be written as JSON."""
    if encoded(request) is not None:
        return True
    if size < LARGE_ELEMENTS:
        return False  # an element takes at least one byte
    return any(
        not wanted.get(tensor.name, wanted.get("", False)) and prod(tensor.shape) >= LARGE_ELEMENTS
        for tensor in response.outputs
    )


def _document_bytes(request: Request, length: int) -> tuple[int, bool]:
    """The length of the JSON document at the front of a body of ``length`` bytes, and whether there is none at all."""
    stated = request.headers.get(HEADER_LENGTH)
    if stated is None:
        return length, False
    # Of a compressed body the length counts what it decompresses to.
    limit = length if b"content-encoding" not in request.headers else 2**62
    if not stated.isdigit() or int(stated) > limit:
        raise InvalidRequest(
            f"Inference-Header-Content-Length: expected a number up to the body's {length} bytes, got "
            f"{stated.decode('latin-1')!r}"
        )
    return int(stated), int(stated) == 0


def _large_message(name: str, version: str, body: bytes | bytearray, document_bytes: int) -> tuple[bytes, Wanted]:
    """In a thread: as :func:`message_of`."""
    whole = document_bytes == len(body)
    document, numbers = without_numbers(body if whole else bytes(memoryview(body)[:document_bytes]))
    return message_of(name, version, loads(document), memoryview(body)[document_bytes:], numbers)


def _objects(document: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    found = document.get(field)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InvalidRequest(f"{field}: expected an array of objects")
    return found


def _head_of(entry: Mapping[str, Any], where: str) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str):
        raise InvalidRequest(f"{where}.name: expected a string, got {name!r}")
    if not isinstance(datatype, str):
        raise InvalidRequest(f"{where}.datatype: expected a string, got {datatype!r}")
    if not isinstance(shape, list) or not all(type(dimension) is int and dimension >= 0 for dimension in shape):
        raise InvalidRequest(f"{where}.shape: expected an array of whole numbers from 0 on, got {shape!r}")
    return name, datatype, tuple(shape)


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Param]:
    """Parameters that are strings, numbers or booleans; null says nothing."""
    found = entry.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where}: expected parameters to be an object")
    told: dict[str, Param] = {}
    for name, value in found.items():
        if isinstance(value, _PARAM_TYPES):
            told[name] = value
        elif value is not None:
            raise InvalidRequest(f"{where}: parameter '{name}': expected a string, a number or a boolean")
    return told


def _bare_message(
    name: str, version: str, inputs: Sequence[inference_pb2.ModelMetadataResponse.TensorMetadata], body: memoryview
) -> bytes:
    """The request that raw bytes alone stand for (Triton, raw binary request): a model of one input takes them.

    A free dimension of its shape is 1 but for one, which the number of bytes tells. BYTES are one element.
    """
    if len(inputs) != 1:
        raise InvalidRequest(f"expected a request with a JSON document: model '{name}' has {len(inputs)} inputs")
    spec = inputs[0]
    shape = [1 if dimension == -1 else dimension for dimension in spec.shape]
    if spec.datatype == "BYTES":
        body = memoryview(len(body).to_bytes(4, "little") + body)
    elif -1 in spec.shape:
        item = prod(shape) * NUMPY_DTYPES[spec.datatype].itemsize // (2 if spec.datatype == "BF16" else 1)
        shape[len(shape) - 1 - list(reversed(spec.shape)).index(-1)] = len(body) // item if item else 0
    head = encode_infer_request(name, [(spec.name, spec.datatype, tuple(shape))], model_version=version)
    return b"".join((head, _RAW_TAG, _varint(len(body)), body))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
