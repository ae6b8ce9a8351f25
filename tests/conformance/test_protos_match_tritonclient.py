"""Our wire contracts against the descriptors that other people's clients were built from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2 as grpc_health
from grpc_reflection.v1alpha import reflection_pb2 as grpc_reflection
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton_service

from mmcore import pb

#: Published, but not in these packages: of the Open Inference Protocol, which Triton's clients do not follow here, and
#: of a newer grpc/health.proto than grpcio-health-checking carries.
OURS_ALONE = re.compile(
    r"inference\.ModelMetadataResponse\.(properties|PropertiesEntry)|grpc\.health\.v1\.(HealthList|Health/List$)"
)


def facts(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[Any, ...]]:
    """All that decides how a file's messages look on the wire and its methods are called, by full name."""

    def of_enum(scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for value in enum.value:
            yield f"{scope}.{enum.name}.{value.name}", (value.number,)

    def of_message(scope: str, message: descriptor_pb2.DescriptorProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
        name = f"{scope}.{message.name}"
        yield name, ("map entry" if message.options.map_entry else "message",)
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            yield f"{name}.{field.name}", (field.number, field.type, field.label, field.type_name, oneof)
        for nested in message.nested_type:
            yield from of_message(name, nested)
        for enum in message.enum_type:
            yield from of_enum(name, enum)

    found = dict(pair for message in file.message_type for pair in of_message(file.package, message))
    found.update(pair for enum in file.enum_type for pair in of_enum(file.package, enum))
    for service in file.service:
        for method in service.method:
            kind = (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            found[f"{file.package}.{service.name}/{method.name}"] = kind
    return found


def of_module(module: Any) -> dict[str, tuple[Any, ...]]:
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return facts(file)


def ours(name: str) -> dict[str, tuple[Any, ...]]:
    files = map(descriptor_pb2.FileDescriptorProto.FromString, pb.descriptor_protos())
    return next(facts(file) for file in files if file.name == name)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("inference.proto", triton_service),
        ("model_config.proto", triton_config),
        ("health.proto", grpc_health),
        ("reflection_v1alpha.proto", grpc_reflection),
    ],
)
def test_messages_fields_and_methods_are_the_published_ones(name: str, theirs: Any) -> None:
    expected = of_module(theirs)
    got = ours(name)
    assert {key: value for key, value in got.items() if key in expected or not OURS_ALONE.match(key)} == expected


def test_reflection_v1_is_v1alpha_in_another_package() -> None:
    """gRPC's own reflection.proto of v1 differs from v1alpha in nothing but the package."""
    alpha = {key: str(value) for key, value in ours("reflection_v1alpha.proto").items()}
    renamed = {key.replace("v1alpha", "v1"): value.replace("v1alpha", "v1") for key, value in alpha.items()}
    assert {key: str(value) for key, value in ours("reflection.proto").items()} == renamed
