"""Fuzz targets for what an instance reads itself: requests of REST, its operator's files."""

from __future__ import annotations

from mmcore.errors import InvalidRequest
from mmcore.server.dataplane import parse_dataplane_config
from mmcore.server.rest.inference import message_of
from mmcore.server.rest.tensors import loads
from mmcore.server.static_models import parse_static_models


def server_files(data: bytes) -> None:
    """The files of an instance: methods passed through and static models."""
    text = data.decode(errors="replace")
    for read in (parse_dataplane_config, parse_static_models):
        try:
            read(text)
        except ValueError:
            continue


def rest_infer(data: bytes) -> None:
    """A V2 request of REST: a JSON document, a line feed, binary tensors."""
    document, _, binary = data.partition(b"\n")
    try:
        message_of("model", "1", loads(memoryview(document)), memoryview(binary))
    except InvalidRequest:
        return
