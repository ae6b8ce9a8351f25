"""Server reflection, v1 and v1alpha, so that grpcurl and its kind work without .proto files.

The two versions differ in their package name only (grpc/doc/server-reflection.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from mmcore.errors import InvalidRequest, Status
from mmcore.pb import reflection_pb2, reflection_v1alpha_pb2
from mmcore.transport.server import Server
from mmcore.transport.streams import StreamCall


class _Index:
    """Files by name and by the symbols they define."""

    def __init__(self, files: Iterable[bytes], services: Iterable[str]) -> None:
        self.services = sorted(services)
        self._raw: dict[str, bytes] = {}
        self._imports: dict[str, list[str]] = {}
        self._symbols: dict[str, str] = {}
        for raw in files:
            file = FileDescriptorProto.FromString(raw)
            self._raw[file.name] = raw
            self._imports[file.name] = list(file.dependency)
            for symbol in _symbols(file):
                self._symbols[symbol] = file.name

    def file_of(self, symbol: str) -> str:
        """Name of the file that defines a symbol, empty for an unknown one."""
        return self._symbols.get(symbol, "")

    def with_imports(self, name: str) -> list[bytes] | None:
        """A file and everything it imports, each once, the file itself first; None for an unknown one."""
        if name not in self._raw:
            return None
        found: dict[str, bytes] = {}
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current not in found and current in self._raw:
                found[current] = self._raw[current]
                waiting.extend(self._imports[current])
        return list(found.values())


def _symbols(file: FileDescriptorProto) -> Iterator[str]:
    prefix = f"{file.package}." if file.package else ""
    for message in file.message_type:
        yield from _message_symbols(prefix, message)
    for enum in file.enum_type:
        yield prefix + enum.name
    for service in file.service:
        yield prefix + service.name
        for method in service.method:
            yield f"{prefix}{service.name}.{method.name}"


def _message_symbols(prefix: str, message: DescriptorProto) -> Iterator[str]:
    name = prefix + message.name
    yield name
    for field in message.field:
        yield f"{name}.{field.name}"
    for enum in message.enum_type:
        yield f"{name}.{enum.name}"
    for nested in message.nested_type:
        yield from _message_symbols(f"{name}.", nested)


class _Reflection:
    def __init__(self, index: _Index, messages: ModuleType) -> None:
        self._index = index
        self._messages = messages

    async def serve(self, call: StreamCall) -> None:
        """``ServerReflectionInfo``: an answer to each request, in order; errors are answers too."""
        async for body in call:
            try:
                request = self._messages.ServerReflectionRequest.FromString(body)
            except Exception as error:  # protobuf's DecodeError has no stable home across its versions
                raise InvalidRequest(f"not a ServerReflectionRequest: {error}") from error
            response = self._messages.ServerReflectionResponse(valid_host=request.host, original_request=request)
            self._fill(request, response)
            await call.send(response.SerializeToString())

    def _fill(self, request: object, response: object) -> None:
        kind = request.WhichOneof("message_request")  # type: ignore[attr-defined]  # either version's message
        wanted = getattr(request, kind) if kind else None
        files: list[bytes] | None = None
        if kind == "list_services":
            for name in self._index.services:
                response.list_services_response.service.add(name=name)  # type: ignore[attr-defined]
            return
        if kind == "file_by_filename":
            files = self._index.with_imports(str(wanted))
        elif kind == "file_containing_symbol":
            files = self._index.with_imports(self._index.file_of(str(wanted)))
        if files is None:
            known = kind in ("file_by_filename", "file_containing_symbol", "file_containing_extension",
                             "all_extension_numbers_of_type")  # fmt: skip
            response.error_response.error_code = (  # type: ignore[attr-defined]
                Status.NOT_FOUND if known else Status.INVALID_ARGUMENT
            )
            response.error_response.error_message = (  # type: ignore[attr-defined]
                f"{wanted} is not known here" if known else "the request asks nothing"
            )
            return
        response.file_descriptor_response.file_descriptor_proto.extend(files)  # type: ignore[attr-defined]


def add_reflection(server: Server, files: Iterable[bytes], services: Iterable[str]) -> None:
    """Serve reflection for serialised FileDescriptorProtos; ``services`` are those that are listed."""
    versions = (("v1", reflection_pb2), ("v1alpha", reflection_v1alpha_pb2))
    names = [f"grpc.reflection.{version}.ServerReflection" for version, _ in versions]
    index = _Index(files, [*services, *names])
    for name, (_, messages) in zip(names, versions, strict=True):
        server.add_stream(f"/{name}/ServerReflectionInfo", _Reflection(index, messages).serve)
