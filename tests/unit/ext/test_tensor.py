"""Raw contents to arrays and back."""

from __future__ import annotations

import mmap
import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore._ext.tensor import array_from_raw, array_to_raw, parse_bytes_tensor, serialize_bytes_tensor
from mmcore.errors import InvalidRequest
from mmcore.model import NUMPY_DTYPES


def refused(text: str) -> Any:
    return pytest.raises(InvalidRequest, match=f"^{re.escape(text)}$")


def framed(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


@pytest.mark.parametrize("datatype", [name for name in NUMPY_DTYPES if name not in ("BYTES", "BF16", "BOOL")])
def test_numbers_are_little_endian_row_major(datatype: str) -> None:
    dtype = NUMPY_DTYPES[datatype]
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    data = array.astype(dtype.newbyteorder("<")).tobytes()
    assert array_to_raw(datatype, array) == data
    back = array_from_raw(datatype, (2, 3), data)
    assert back.dtype == dtype
    assert back.tolist() == array.tolist()


def test_bools_of_any_nonzero_byte_are_true() -> None:
    array = array_from_raw("BOOL", [4], b"\x00\x01\x02\xff")
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]
    assert not array_from_raw("BOOL", [2], b"\x00\x01").flags.owndata


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), max_size=20))
def test_bf16_is_widened_exactly(halves: list[int]) -> None:
    wide = array_from_raw("BF16", [len(halves)], np.array(halves, "<u2").tobytes())
    assert wide.dtype == np.float32
    assert wide.view(np.uint32).tolist() == [half << 16 for half in halves]


def nearest_bf16(value: np.float32) -> int:
    """Round to nearest, halves to even, by comparing the two neighbours in exact arithmetic."""
    bits = int(value.view(np.uint32))
    low = bits >> 16
    remainder = bits & 0xFFFF
    return low + (remainder > 0x8000 or (remainder == 0x8000 and low & 1))


@settings(deadline=None, max_examples=300)
@given(st.floats(width=32, allow_nan=False))
def test_bf16_is_rounded_to_nearest_even(value: float) -> None:
    array = np.array([value], np.float32)
    assert int(np.frombuffer(array_to_raw("BF16", array), "<u2")[0]) == nearest_bf16(array[0])


def test_bf16_keeps_what_is_no_number_and_rounds_up_to_infinity() -> None:
    quiet, loud = np.uint32(0x7FC00000), np.uint32(0xFF800001)  # a signalling NaN whose lower half alone tells it
    array = np.array([quiet, loud, 0x7F7FFFFF, 0x80000000, 0x00008001, 0x00018000], np.uint32).view(np.float32)
    halves = np.frombuffer(array_to_raw("BF16", array), "<u2").tolist()
    assert halves == [0x7FC0, 0xFFC0, 0x7F80, 0x8000, 1, 2]


def test_bytes_elements_are_length_prefixed() -> None:
    array = np.array([[b"", b"ab"], [b"\x00\x00", "ü"]], object)
    data = serialize_bytes_tensor(array)
    assert data == framed(b"", b"ab", b"\x00\x00", "ü".encode())
    back = parse_bytes_tensor(data, (2, 2))
    assert back.tolist() == [[b"", b"ab"], [b"\x00\x00", "ü".encode()]]


@pytest.mark.parametrize(
    ("data", "shape", "told"),
    [
        (framed(b"a")[:-1], [1], "BYTES element 0 is said to have 1 bytes, 0 are left"),
        (framed(b"a") + b"\x01\x00", [2], "BYTES element 1 needs a length of 4 bytes, 2 are left"),
        (framed(b"a", b"b"), [3], "expected 3 elements for BYTES [3], got 2"),
        (framed(b"a", b"b"), [1], "expected 1 elements for BYTES [1], got 2"),
        (b"\xff\xff\xff\xff", [1], "BYTES element 0 is said to have 4294967295 bytes, 0 are left"),
        (b"", [1 << 40], "expected 1099511627776 elements for BYTES [1099511627776], got 0"),
        (framed(b"a"), [0, 5], "expected 0 elements for BYTES [0,5], got 1"),
    ],
)
def test_wrong_bytes_framing_is_told(data: bytes, shape: list[int], told: str) -> None:
    with refused(told):
        parse_bytes_tensor(data, shape)


@settings(deadline=None)
@given(st.binary(max_size=24), st.lists(st.integers(-1, 3), max_size=3))
def test_any_bytes_are_parsed_or_refused(data: bytes, shape: list[int]) -> None:
    try:
        array = parse_bytes_tensor(data, shape)
    except InvalidRequest:
        return
    assert serialize_bytes_tensor(array) == data
    assert list(array.shape) == shape


@settings(deadline=None)
@given(
    st.sampled_from(sorted(NUMPY_DTYPES)),
    st.binary(max_size=24),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=3),
)
def test_any_shape_is_parsed_or_refused(datatype: str, data: bytes, shape: list[int]) -> None:
    try:
        array = array_from_raw(datatype, shape, data)
    except InvalidRequest:
        return
    assert list(array.shape) == shape
    assert array.dtype == NUMPY_DTYPES[datatype]


def test_shapes_that_no_memory_holds_are_refused() -> None:
    for shape in ([2**62, 2**62, 0], [0, 2**62, 2**62], [2**60], [-1], [2**63], [-(2**63) - 1]):
        with pytest.raises(InvalidRequest, match="no tensor can have the shape"):
            array_from_raw("FP64", shape, b"")
    with refused("expected at most 32 dimensions, got 33"):
        array_from_raw("FP32", [1] * 33, b"1234")
    assert array_from_raw("FP32", [1] * 32, b"1234").ndim == 32


def test_wrong_sizes_and_datatypes_are_told() -> None:
    with refused("expected 8 bytes for FP32 [2], got 7"):
        array_from_raw("FP32", [2], b"1234567")
    with pytest.raises(InvalidRequest, match=r"expected a datatype of BOOL, .*, BYTES, got 'fp32'"):
        array_from_raw("fp32", [2], b"12345678")
    with pytest.raises(TypeError, match="FP32 is made from float32, got int32"):
        array_to_raw("FP32", np.zeros(2, np.int32))
    with pytest.raises(TypeError, match="BYTES elements are bytes or str, got NoneType"):
        serialize_bytes_tensor(np.array([None], object))


def test_views_keep_their_buffer_alive_and_locked() -> None:
    """An array over a shared memory region holds the mapping, which can then not be closed under it."""
    region = mmap.mmap(-1, 4096)
    region[8:16] = struct.pack("<2f", 1.5, -2)
    with memoryview(region) as whole, whole[8:16] as part:
        array = array_from_raw("FP32", [2], part)
    region[8:12] = struct.pack("<f", 3)
    assert array.tolist() == [3.0, -2.0]
    assert not array.flags.writeable
    with pytest.raises(BufferError):
        region.close()
    del array
    region.close()


def test_misaligned_and_other_buffers_work() -> None:
    data = bytearray(b"x" + struct.pack("<3i", 1, 2, 3))
    array = array_from_raw("INT32", [3], memoryview(data)[1:])
    assert array.flags.aligned
    assert array.tolist() == [1, 2, 3]
    with refused("expected a contiguous buffer"):
        array_from_raw("UINT8", [7], memoryview(data)[::2])
    with pytest.raises(TypeError):
        array_from_raw("UINT8", [1], "a")  # type: ignore[arg-type]


def test_arrays_are_read_only_however_they_were_made() -> None:
    """A model that writes to its input fails always, not only where the data happened to be aligned."""
    for datatype, data in (
        ("FP32", b"1234"),
        ("BF16", b"12"),
        ("BOOL", b"\x02"),
        ("BYTES", framed(b"a")),
        ("INT8", b""),
    ):
        for offset in range(4):
            array = array_from_raw(datatype, [1 if data else 0], memoryview(b"." * offset + data)[offset:])
            assert not array.flags.writeable


def test_raw_of_a_fitting_array_is_its_own_memory() -> None:
    array = np.arange(5, dtype=np.int64)
    raw = array_to_raw("INT64", array)
    assert isinstance(raw, memoryview)
    assert raw.readonly
    assert np.shares_memory(np.frombuffer(raw, np.uint8), array)
    assert bytes(array_to_raw("INT64", array[::2])) == array[::2].tobytes()
    assert bytes(array_to_raw("FP32", np.array(1.0, np.float32))) == struct.pack("<f", 1)
    assert bytes(array_to_raw("INT64", array[:0])) == b""
