"""The file that says which methods are served and where their requests name the model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmcore.errors import Unimplemented
from mmcore.routing import Kind
from mmcore.server.dataplane import DataplaneConfig, RpcConfig, parse_dataplane_config


def test_a_method_has_a_path_and_a_kind_of_name() -> None:
    config = parse_dataplane_config(
        json.dumps(
            {
                "rpcConfigs": {
                    "a.B/C": {"idExtractionPath": [1, 5]},
                    "a.B/D": {"idExtractionPath": [1], "vModelId": True},
                    "a.B/E": {},
                }
            }
        )
    )
    assert config.of("a.B/C") == RpcConfig((1, 5), Kind.MODEL)
    assert config.of("a.B/D") == RpcConfig((1,), Kind.VMODEL)
    assert config.of("a.B/E") == RpcConfig((), Kind.MODEL)
    with pytest.raises(Unimplemented, match="Method not found or not permitted: "):
        config.of("a.B/F")


def test_others_may_be_allowed() -> None:
    assert parse_dataplane_config('{"allowOtherRpcs": true}').of("a.B/F") == RpcConfig()
    assert DataplaneConfig().of("a.B/F") == RpcConfig((), Kind.ANY)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "the file: expected an object"),
        ({"rpcs": {}}, "the file: unknown field 'rpcs'"),
        ({"allowOtherRpcs": 1}, "the file.allowOtherRpcs: expected bool, got int"),
        ({"rpcConfigs": {"a.B/C": {"path": [1]}}}, "unknown field 'path'"),
        ({"rpcConfigs": {"a.B/C": {"idExtractionPath": [0]}}}, "not a list of up to 8 field numbers"),
        ({"rpcConfigs": {"a.B/C": {"idExtractionPath": ["1"]}}}, "not a list of up to 8 field numbers"),
        ({"rpcConfigs": {"a.B/C": {"idExtractionPath": [1] * 9}}}, "not a list of up to 8 field numbers"),
        ({"rpcConfigs": {"/a.B/C": {}}}, "a method is written package.Service/Method"),
        ({"rpcConfigs": {"a.B": {}}}, "a method is written package.Service/Method"),
    ],
)
def test_what_the_file_cannot_say(content: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_dataplane_config(json.dumps(content))
