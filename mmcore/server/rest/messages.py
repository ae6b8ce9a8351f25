"""Protobuf messages as JSON, as Triton's HTTP endpoint writes them: names as in the .proto, 64-bit integers as numbers,
fields that have no presence always there.
"""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """A message as a dictionary that orjson takes."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            continue
        found[field.name] = _plain_value(field, value)
    return found


def _plain_value(field: Any, value: Any) -> Any:
    """One value of a field, or its list or map; ``field`` is a FieldDescriptor of either implementation."""
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, bool | int | float | str):
        return value if field.enum_type is None else field.enum_type.values_by_number[value].name
    if hasattr(value, "items"):
        entry = field.message_type.fields_by_name["value"]
        return {str(key): _plain_value(entry, one) for key, one in value.items()}
    return [_plain_value(field, one) for one in value]
