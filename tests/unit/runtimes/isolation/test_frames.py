"""Frames between the serving process and a worker: what goes through unchanged, and that nothing else is believed."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed, Overloaded
from mmcore.model import NUMPY_DTYPES, TensorSpec
from mmcore.runtimes.isolation.frames import (
    INLINE_BYTES,
    BrokenFrame,
    Described,
    Kind,
    Packed,
    description_frame,
    description_in,
    error_frame,
    error_in,
    frame,
    receive,
    unpack,
)
from mmcore.runtimes.isolation.segment import Segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create()
    yield made
    made.close()


def passed(tensors: list[tuple[int, str, NDArray[Any]]], segment: Segment) -> list[tuple[int, str, NDArray[Any]]]:
    packed = Packed(tensors)
    if packed.total > INLINE_BYTES:
        segment.grow(packed.total)
    return unpack(packed.frame(Kind.ANSWER, (), segment), segment).tensors


@pytest.mark.parametrize("datatype", [name for name in NUMPY_DTYPES if name != "BYTES"])
@pytest.mark.parametrize("size", [0, 3, 40_000])
def test_a_tensor_of_every_datatype_comes_as_it_went(segment: Segment, datatype: str, size: int) -> None:
    array = np.random.default_rng(1).integers(0, 2, size).astype(NUMPY_DTYPES[datatype])
    ((place, named, came),) = passed([(7, datatype, array)], segment)
    assert (place, named, came.dtype) == (7, datatype, array.dtype)
    np.testing.assert_array_equal(came, array)


@pytest.mark.parametrize("size", [1, 5000])
def test_bytes_come_as_they_went(segment: Segment, size: int) -> None:
    array = np.array([b"", "grün".encode(), b"\0" * 40] * size, dtype=object).reshape(3, size)
    ((_, datatype, came),) = passed([(0, "BYTES", array)], segment)
    assert datatype == "BYTES"
    assert came.tolist() == array.tolist()


@given(
    tensors=st.lists(
        arrays.arrays(
            st.sampled_from([np.dtype("f4"), np.dtype("i8"), np.dtype("u1")]),
            arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
            elements=st.integers(0, 100),
        ),
        max_size=4,
    )
)
def test_several_tensors_of_any_shape_come_aligned_and_as_they_went(tensors: list[NDArray[Any]]) -> None:
    segment = Segment.create()
    names = {np.dtype("f4"): "FP32", np.dtype("i8"): "INT64", np.dtype("u1"): "UINT8"}
    came = passed([(place, names[array.dtype], array) for place, array in enumerate(tensors)], segment)
    segment.close()
    assert [place for place, _, _ in came] == list(range(len(tensors)))
    for array, (_, _, other) in zip(tensors, came, strict=True):
        assert other.shape == array.shape
        assert other.flags.aligned
        np.testing.assert_array_equal(other, array)


def test_arrays_that_are_not_contiguous_are_handed_over(segment: Segment) -> None:
    for size in (4, 400):
        array = np.arange(size * size, dtype=np.float32).reshape(size, size).T[:, ::2]
        np.testing.assert_array_equal(passed([(0, "FP32", array)], segment)[0][2], array)


def test_an_array_from_shared_memory_is_its_owners_own(segment: Segment) -> None:
    array = np.zeros(INLINE_BYTES, np.float32)
    ((_, _, came),) = passed([(0, "FP32", array)], segment)
    segment.memory()[:] = b"\1" * segment.size
    assert not came.any()


def test_the_worker_cannot_shrink_shared_memory(segment: Segment) -> None:
    segment.grow(100)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)


def test_shared_memory_follows_its_size(segment: Segment) -> None:
    other = Segment(os.dup(segment.fd))
    segment.grow(3 * 2**20)
    segment.memory()[3 * 2**20 - 1] = 5
    other.follow()
    assert other.size == segment.size == 4 * 2**20
    assert other.memory()[3 * 2**20 - 1] == 5
    other.close()


def test_memory_of_a_large_tensor_is_given_back(segment: Segment) -> None:
    size = 32 * 2**20
    segment.grow(size)
    segment.memory()[:size] = b"\1" * size
    assert os.fstat(segment.fd).st_blocks * 512 >= size
    segment.trim(size)
    assert os.fstat(segment.fd).st_blocks == 0


# Frames that a worker should not send.

HEADER, COUNTS, TENSOR = struct.Struct("<IB3x"), struct.Struct("<BxHI"), struct.Struct("<HBB4xQ")
FP32 = list(NUMPY_DTYPES).index("FP32")
BYTES = list(NUMPY_DTYPES).index("BYTES")


def forged(code: int, shape: tuple[int, ...], size: int, data: bytes = b"", *, shared: bool = False) -> bytes:
    body = COUNTS.pack(shared, 1, 0) + TENSOR.pack(0, code, len(shape), size) + struct.pack(f"<{len(shape)}q", *shape)
    return frame(Kind.ANSWER, body + data)


@pytest.mark.parametrize(
    "data",
    [
        frame(Kind.ANSWER, b""),
        frame(Kind.ANSWER, COUNTS.pack(0, 3, 0)),
        frame(Kind.ANSWER, COUNTS.pack(0, 0, 2**32 - 1)),
        forged(FP32, (2,), 8, b"1234"),
        forged(FP32, (2,), 12, bytes(12)),
        forged(FP32, (-1,), 4, bytes(4)),
        forged(FP32, (-1, -1), 4, bytes(4)),
        forged(FP32, (2**62, 2**62, 0), 0),
        forged(FP32, (2**62, 4), 0),
        forged(FP32, (1,) * 40, 4, bytes(4)),
        forged(200, (1,), 4, bytes(4)),
        forged(FP32, (2**40,), 2**42, bytes(4)),
        forged(FP32, (2**40,), 2**42, shared=True),
        forged(BYTES, (1,), 4, struct.pack("<I", 10)),
        forged(BYTES, (2**60,), 4, struct.pack("<I", 0)),
        forged(BYTES, (2,), 4, struct.pack("<I", 0)),
    ],
)
def test_tensors_that_do_not_agree_with_their_bytes_are_refused(segment: Segment, data: bytes) -> None:
    segment.grow(100)
    with pytest.raises(BrokenFrame):
        unpack(data, segment)


@given(body=st.binary(max_size=200))
def test_any_bytes_are_tensors_or_refused(body: bytes) -> None:
    segment = Segment.create()
    segment.grow(100)
    try:
        unpack(frame(Kind.ANSWER, body), segment)
    except BrokenFrame:
        pass
    finally:
        segment.close()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (HEADER.pack(8, 99), "kind 99"),
        (HEADER.pack(2**31, Kind.ANSWER), "of 2147483648 bytes"),
        (HEADER.pack(3, Kind.ANSWER), "of 3 bytes"),
        (HEADER.pack(8, Kind.ANSWER) + b"more", "of 8 bytes"),
        (HEADER.pack(12, Kind.ANSWER) + b"12", "cut off"),
        (b"\1", "cut off"),
    ],
)
def test_streams_that_are_no_frames_are_refused(sent: bytes, message: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(sent)
        with pytest.raises(BrokenFrame, match=message):
            receive(ours)


def test_a_frame_comes_whole_however_it_is_cut() -> None:
    sent = frame(Kind.LOADED, bytes(range(256)) * 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            for start, end in ((0, 3), (3, 8), (8, 9), (9, 1000), (1000, len(sent))):
                theirs.sendall(sent[start:end])

        sender = threading.Thread(target=send)
        sender.start()
        assert receive(ours) == (Kind.LOADED, sent)
        sender.join()


def test_the_end_of_the_stream_is_none() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert receive(ours) is None


# Errors and descriptions.


@pytest.mark.parametrize("error", [InvalidRequest("no"), InferenceFailed("ValueError: grün"), Overloaded("full")])
def test_an_error_comes_with_its_status_and_text(error: Exception) -> None:
    came = error_in(error_frame(error))  # type: ignore[arg-type]
    assert type(came) is type(error)
    assert str(came) == str(error)


def test_an_error_of_an_unknown_status_is_internal() -> None:
    assert type(error_in(frame(Kind.FAILED, b"\xc8text"))) is InferenceFailed
    assert type(error_in(frame(Kind.FAILED))) is InferenceFailed
    assert type(error_in(frame(Kind.FAILED, b"\x09\xff"))) is LoadFailed


def test_an_errors_text_is_bounded() -> None:
    assert len(str(error_in(frame(Kind.FAILED, b"\x0d" + b"x" * 10**6)))) <= 4000


DESCRIBED = Described(
    platform="python",
    inputs=(TensorSpec("X", "FP32", (-1, 4)), TensorSpec("T", "BYTES", ())),
    outputs=(TensorSpec("Y", "FP32", (-1,)), TensorSpec("Z", "INT64", (1,))),
    default_outputs=("Y",),
    any_input_name=False,
    accepts={"X": ("FP64",)},
)


def test_a_description_comes_as_it_went() -> None:
    assert description_in(description_frame(DESCRIBED)) == DESCRIBED


@pytest.mark.parametrize(
    "change",
    [
        {"platform": 1},
        {"inputs": [["X", "FP32"]]},
        {"inputs": [["X", "FLOAT", [1]]]},
        {"inputs": [["X", ["FP32"], [1]]]},
        {"inputs": [["X", "FP32", [-2]]]},
        {"inputs": [["X", "FP32", [1.5]]]},
        {"inputs": [["X", "FP32", [1]], ["X", "FP32", [1]]]},
        {"outputs": []},
        {"default_outputs": []},
        {"default_outputs": ["W"]},
        {"accepts": []},
        {"accepts": {"X": ["FLOAT"]}},
    ],
)
def test_a_description_that_is_none_is_refused(change: dict[str, Any]) -> None:
    values = json.loads(description_frame(DESCRIBED)[8:])
    with pytest.raises(BrokenFrame):
        description_in(frame(Kind.LOADED, json.dumps(values | change).encode()))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff"])
def test_a_description_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(BrokenFrame):
        description_in(frame(Kind.LOADED, body))
