"""The stored form of the registry's records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mmcore.registry.records import (
    CopyRecord,
    CorruptRecord,
    FailureRecord,
    InstanceRecord,
    LossRecord,
    ModelRecord,
    Record,
    VModelRecord,
    decode,
    encode,
)


@pytest.mark.parametrize(
    "record",
    [
        ModelRecord(),
        ModelRecord(
            "rt:sklearn",
            "a/b",
            '{"storage_key":"é"}',
            copies={"i1": CopyRecord("LOADED", 12), "i2": CopyRecord("LOADING", 13)},
            failures={"i3": FailureRecord(5, "no such object")},
            losses={"i4": LossRecord(6, loads=2), "i5": LossRecord(7)},
            references=2,
            auto_delete=True,
            last_used_ms=1764117600000,
            min_copies=1,
            max_copies=3,
        ),
        VModelRecord("ksp", active="m1", target="m2", failed=True),
        InstanceRecord("10.0.0.1:8034", labels=("gpu", "zone-a"), capacity_bytes=2**34, draining=True),
    ],
)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert decode(type(record), "x", encode(record)) == record


def test_fields_at_their_defaults_are_left_out() -> None:
    assert encode(ModelRecord()) == b"{}"
    assert (
        encode(ModelRecord("t", copies={"i": CopyRecord("LOADED")}))
        == b'{"type":"t","copies":{"i":{"state":"LOADED"}}}'
    )


def test_fields_that_a_newer_version_wrote_survive_a_change() -> None:
    stored = {"type": "t", "tier": {"deep": [1, None]}, "copies": {"i": {"state": "LOADED", "device": 3}}}
    record = decode(ModelRecord, "m", json.dumps(stored).encode())
    assert json.loads(encode(replace(record, references=1))) == {**stored, "references": 1}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"\xff{", "'m' is not JSON"),
        (b'{"tier\xed\xbb\xbf":1}', "'m' is not JSON"),
        (b'{"path":"\\udeff"}', "'m' is not JSON"),
        (b'{"type":' + b"[" * 5000, "'m' is not JSON"),
        (b'{"tier":NaN}', "'m' is not JSON: NaN"),
        (b"[]", "'m' is no JSON object"),
        (b'{"type":1}', "type is a int, not a str"),
        (b'{"references":true}', "references is a bool, not a int"),
        (b'{"copies":[]}', "copies is a list, not a dict"),
        (b'{"copies":{"i":7}}', "'m' is no JSON object"),
        (b'{"copies":{"i":{"since_ms":"x"}}}', "since_ms is a str"),
    ],
)
def test_what_is_no_record_is_told(stored: bytes, said: str) -> None:
    with pytest.raises(CorruptRecord, match=said):
        decode(ModelRecord, "m", stored)
