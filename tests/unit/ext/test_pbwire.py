"""Finding and replacing strings in messages that are not decoded."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcore._ext.pbwire import find_field, find_string, replace_string
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2
from tests import wire

many = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def test_a_string_is_found_at_a_path() -> None:
    body = wire.text(1, "outer") + wire.message(2, wire.text(3, "inner"))
    assert find_string(body, (1,)) == "outer"
    assert find_string(body, (2, 3)) == "inner"
    assert find_string(body, (2, 4)) == ""
    assert find_string(body, (5, 6)) == ""
    start, end = find_field(body, (2, 3)) or (0, 0)
    assert body[start:end] == b"inner"
    assert find_field(body, (7,)) is None


def test_the_last_occurrence_counts_across_all_submessages() -> None:
    body = (
        wire.text(1, "first") + wire.message(2, wire.text(1, "a"), wire.text(1, "b")) + wire.text(1, "second")
        + wire.message(2, wire.text(9, "other"))
    )  # fmt: skip
    assert find_string(body, (1,)) == "second"
    assert find_string(body, (2, 1)) == "b"


@many
@given(wire.requests)
def test_the_model_name_is_the_one_protobuf_sees(body: bytes) -> None:
    assert find_string(body, (1,)) == inference_pb2.ModelInferRequest.FromString(body).model_name


@many
@given(wire.requests, wire.texts)
def test_replacing_changes_that_string_and_nothing_else(body: bytes, name: str) -> None:
    expected = inference_pb2.ModelInferRequest.FromString(body)
    expected.model_name = name
    got = inference_pb2.ModelInferRequest.FromString(replace_string(body, (1,), name))
    assert got.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


streams = wire.shuffled(wire.texts_in(1), wire.sub(2, wire.responses))


@many
@given(streams, wire.texts)
def test_replacing_in_a_submessage_corrects_the_lengths_around_it(body: bytes, name: str) -> None:
    expected = inference_pb2.ModelStreamInferResponse.FromString(body)
    expected.infer_response.model_name = name
    spliced = replace_string(body, (2, 1), name)
    got = inference_pb2.ModelStreamInferResponse.FromString(spliced)
    assert find_string(spliced, (2, 1)) == name
    assert got.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_missing_submessages_are_made() -> None:
    assert replace_string(b"", (2, 1, 3), "x") == wire.message(2, wire.message(1, wire.text(3, "x")))
    body = wire.message(2, wire.field(7, wire.VARINT, 1)) + wire.text(1, "kept")
    assert replace_string(body, (2, 1), "x") == (
        wire.message(2, wire.field(7, wire.VARINT, 1), wire.text(1, "x")) + wire.text(1, "kept")
    )


def test_lengths_may_grow_by_bytes_and_be_overlong() -> None:
    overlong = wire.varint(2 << 3 | wire.LENGTH) + wire.varint(3, length=4) + wire.text(1, "a")
    body = overlong + wire.text(9, "tail")
    name = "x" * 300
    assert replace_string(body, (2, 1), name) == wire.message(2, wire.text(1, name)) + wire.text(9, "tail")


def test_high_field_numbers_work() -> None:
    highest = 2**29 - 1
    assert find_string(replace_string(b"", (highest, 100), "deep"), (highest, 100)) == "deep"


@many
@given(wire.requests, wire.mutations)
def test_broken_messages_are_refused_or_read(body: bytes, changes: list[wire.Mutation]) -> None:
    """Only the path is looked into, so less is refused than by the whole message's decoder; never more."""
    broken = wire.mutated(body, changes)
    try:
        found = find_string(broken, (1,))
        replace_string(broken, (1,), "name")
        find_field(broken, (5, 4, 2))
    except InvalidRequest:
        with pytest.raises(DecodeError):
            inference_pb2.ModelInferRequest.FromString(broken)
    else:
        assert isinstance(found, str)


def test_malformed_messages_are_told() -> None:
    for body in (
        b"\x0a\x05ab",
        b"\x00",
        b"\x0c",
        b"\x0b\x14",
        b"\x0a",
        b"\x80" * 11,
        b"\x09\x00",
        b"\x0d\x00",
        b"\x0e",
    ):
        with pytest.raises(InvalidRequest, match=f"malformed protobuf message of {len(body)} bytes"):
            find_string(body, (1,))
    with pytest.raises(InvalidRequest, match=r"the string at field 2\.1 is not valid UTF-8"):
        find_string(wire.message(2, wire.field(1, wire.LENGTH, b"\xff")), (2, 1))
    nested = wire.varint(3 << 3 | wire.START_GROUP) * 200 + wire.varint(3 << 3 | wire.END_GROUP) * 200
    with pytest.raises(InvalidRequest):
        find_string(nested, (1,))


def test_messages_above_what_protobuf_can_hold_are_refused() -> None:
    """The memory is reserved and never touched."""
    with pytest.raises(InvalidRequest, match="at most 2147483647 bytes, got 2147483648"):
        find_field(bytes(2**31), (1,))


@pytest.mark.parametrize("path", [(), (0,), (2**29,), (1,) * 9, (-1,)])
def test_paths_that_cannot_be_are_refused(path: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"path|field numbers"):
        find_field(b"", path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12) | st.text(max_size=6).map(str.encode))
def test_utf8_is_judged_as_python_judges_it(data: bytes) -> None:
    body = wire.field(1, wire.LENGTH, data)
    try:
        expected = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(InvalidRequest, match="UTF-8"):
            find_string(body, (1,))
    else:
        assert find_string(body, (1,)) == expected


def test_utf8_at_the_edges_of_its_ranges() -> None:
    leads = bytes(range(0x80, 0x100))
    seconds = (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0)
    for lead in leads:
        for second in seconds:
            for rest in (b"", b"\x80", b"\x80\x80", b"\x80\xc0", b"\x80\x80a"):
                data = b"abcdefgh" + bytes([lead, second]) + rest
                body = wire.field(1, wire.LENGTH, data)
                try:
                    expected = data.decode()
                except UnicodeDecodeError:
                    with pytest.raises(InvalidRequest):
                        find_string(body, (1,))
                else:
                    assert find_string(body, (1,)) == expected
