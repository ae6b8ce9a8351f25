"""Tensors in JSON: which elements are taken for which datatype, and how those of an answer are written."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.errors import InvalidRequest
from mmcore.server.rest import large
from mmcore.server.rest.tensors import elements_of, loads, raw_of


def raw(datatype: str, data: Any, *, encoded: bool = False) -> bytes:
    """Of a tensor with as many elements as come."""

    def count(one: Any) -> int:
        nested = isinstance(one, list) and not (datatype == "BYTES" and one and isinstance(one[0], int))
        return sum(map(count, one)) if nested else 1

    return raw_of("input 'x'", datatype, [count(data)], data, encoded=encoded)


@pytest.mark.parametrize(
    ("datatype", "data", "dtype", "expected"),
    [
        ("FP32", [1, 2.5, -0.1], "f4", [1, 2.5, -0.1]),
        ("FP32", [[1, 2], [3, 4]], "f4", [1, 2, 3, 4]),
        ("FP32", [1e300, -1e300], "f4", [np.inf, -np.inf]),
        ("FP64", ["NaN", None, "Infinity", "-Infinity", 1], "f8", [np.nan, np.nan, np.inf, -np.inf, 1]),
        ("FP16", [0.1, 65504, 1e6, "NaN"], "f2", [0.1, 65504, np.inf, np.nan]),
        ("INT8", [-128, 127], "i1", [-128, 127]),
        ("INT64", [-(2**63), 2**63 - 1], "i8", [-(2**63), 2**63 - 1]),
        ("UINT64", [0, 2**64 - 1], "u8", [0, 2**64 - 1]),
        ("BOOL", [True, False, 1, 0], "?", [True, False, True, False]),
        ("FP32", [], "f4", []),
    ],
)  # fmt: skip
def test_numbers_become_raw_contents(datatype: str, data: list[Any], dtype: str, expected: list[Any]) -> None:
    np.testing.assert_array_equal(np.frombuffer(raw(datatype, data), dtype), np.array(expected, dtype))


def test_bf16_is_rounded_to_nearest_even() -> None:
    assert raw("BF16", [1.0, 1.00390625, "Infinity"]) == b"\x80\x3f\x80\x3f\x80\x7f"


@pytest.mark.parametrize(
    ("datatype", "data", "words"),
    [
        ("INT32", [1.5], "expected numbers for INT32, got 1.5"),
        ("INT32", ["1"], "expected numbers for INT32, got '1'"),
        ("INT8", [200], "fit INT8"),
        ("UINT8", [-1], "fit UINT8"),
        ("FP32", ["one"], "got 'one'"),
        ("FP32", [True, {}], "an object"),
        ("FP32", [[1], 2], "to one depth"),
        ("FP32", [1, [2]], "got an array"),
        ("BOOL", [2], "expected true or false"),
        ("BOOL", ["true"], "expected true or false"),
        ("BYTES", [1.5], "expected strings for BYTES"),
        ("BYTES", [[1, 256]], "byte values"),
        ("FP8", [1], "expected a V2 datatype"),
        ("FP32", "text", "expected data to be an array, got 'text'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(datatype: str, data: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as error:
        raw(datatype, data)
    assert str(error.value).startswith("input 'x': ")


def test_an_integer_datatype_takes_no_words() -> None:
    with pytest.raises(InvalidRequest, match="expected numbers for INT32, got None"):
        raw("INT32", [None])


def test_shape_and_number_of_elements_must_agree() -> None:
    with pytest.raises(InvalidRequest, match=r"expected 4 elements for shape \[2, 2\], got 3"):
        raw_of("input 'x'", "FP32", [2, 2], [1, 2, 3])


@pytest.mark.parametrize(
    ("data", "encoded", "expected"),
    [
        (["a", "", "č"], False, [b"a", b"", "č".encode()]),
        ([["a"], ["b"]], False, [b"a", b"b"]),
        (["YQ==", "/w=="], True, [b"a", b"\xff"]),
        ([[77, 121], [255]], False, [b"My", b"\xff"]),
        ([[[77, 121], [255]], ["x", []]], False, [b"My", b"\xff", b"x"]),
    ],
)  # fmt: skip
def test_bytes_come_as_text_base64_or_numbers(data: list[Any], encoded: bool, expected: list[bytes]) -> None:
    framed = b"".join(len(one).to_bytes(4, "little") + one for one in expected)
    assert raw_of("x", "BYTES", [len(expected)], data, encoded=encoded) == framed


def test_text_that_is_no_base64_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="x: "):
        raw_of("x", "BYTES", [1], ["č!"], encoded=True)


def written(datatype: str, array: Any) -> tuple[Any, bool]:
    elements, encoded = elements_of(datatype, array)
    return orjson.loads(orjson.dumps(elements, option=orjson.OPT_SERIALIZE_NUMPY)), encoded


def test_elements_go_out_flat_in_their_own_precision() -> None:
    assert written("FP32", np.array([[0.1], [1e30]], np.float32)) == ([0.1, 1e30], False)
    assert written("FP16", np.array([0.1, np.nan], np.float16)) == ([pytest.approx(0.1, abs=1e-4), "NaN"], False)
    assert written("FP32", np.array([0.1, np.inf, -np.inf], np.float32)) == ([0.1, "Infinity", "-Infinity"], False)
    assert written("BOOL", np.array([[True, False]])) == ([True, False], False)
    assert written("UINT64", np.array([2**64 - 1], np.uint64)) == ([2**64 - 1], False)
    assert written("INT8", np.array([], np.int8)) == ([], False)


def test_bytes_go_out_as_text_if_all_are_text() -> None:
    assert written("BYTES", np.array([["čaj".encode()], [b""]], object)) == (["čaj", ""], False)
    assert written("BYTES", np.array([b"a", b"\xff"], object)) == (["YQ==", "/w=="], True)


def test_words_without_quotes_are_taken_for_what_python_means_by_them() -> None:
    assert str(loads(b'{"data":[NaN,-Infinity,1]}')) == "{'data': [nan, -inf, 1]}"
    for wrong in (b'{"data":[NaN,]}', b"[NaN", b"", b"[" * 100_000 + b"NaN"):
        with pytest.raises(InvalidRequest, match="malformed JSON"):
            loads(wrong)


# Large documents


def read_apart(document: Any, text: bytes) -> Any:
    """The document as it is read when its numbers are taken out first, put together again."""
    rest, numbers = large.without_numbers(text)
    found = orjson.loads(rest)

    def put(one: Any) -> Any:
        if isinstance(one, list):
            return [put(element) for element in one]
        if isinstance(one, dict):
            return {
                key: np.frombuffer(numbers[value].raw("x", "FP64")[0]).tolist()
                if key == "data" and isinstance(value, int)
                else put(value)
                for key, value in one.items()
            }
        return one

    return put(found)


def flat(one: Any) -> Any:
    return [element for part in one for element in (flat(part) if isinstance(part, list) else [part])]


def expected(one: Any) -> Any:
    """The same with what was taken out flat and as numbers."""
    if isinstance(one, list):
        return [expected(element) for element in one]
    if isinstance(one, dict):
        return {
            key: [float(number) for number in flat(value)]
            if key == "data" and isinstance(value, list) and flat(value) and not holds_text(value)
            else expected(value)
            for key, value in one.items()
        }
    return one


def holds_text(value: Any) -> bool:
    return any(not isinstance(one, int | float) or isinstance(one, bool) for one in flat(value))


texts = st.text('a"[]{}:,\\ 0', max_size=6)
values = st.recursive(
    st.floats(-1e9, 1e9) | st.integers(-(2**50), 2**50) | texts,
    lambda inner: st.lists(inner, min_size=1, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(['data":[1]', "data", 'x"data":[1,2]}', "\\", "name", "[", "}"]) | texts
entries = st.lists(
    st.fixed_dictionaries({"name": names, "data": st.lists(values, min_size=1, max_size=4), "shape": st.just([3])}),
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(entries, st.booleans())
def test_numbers_taken_out_are_those_of_the_document(inputs: list[dict[str, Any]], spaced: bool) -> None:
    document = {"id": "x", "inputs": inputs, "outputs": [{"name": "data"}]}
    text = (json.dumps(document) if spaced else json.dumps(document, separators=(",", ":"))).encode()
    assert read_apart(document, text) == expected(document)


def test_many_numbers_are_read_in_pieces() -> None:
    array = np.random.default_rng(3).standard_normal((100, 1000)).astype(np.float32)
    text = b'{"inputs":[{"data":%b},{"data":%b}]}' % (orjson.dumps(array.tolist()), b"[1,2]")
    rest, [first, second] = large.without_numbers(text)
    assert rest == b'{"inputs":[{"data":0},{"data":1}]}'
    data, count = first.raw("x", "FP32")
    assert (data, count) == (array.tobytes(), 100_000)
    assert second.raw("x", "INT32") == (np.array([1, 2], np.int32).tobytes(), 2)


@pytest.mark.parametrize("wrong", [b"[1,2,]", b"[1 2]", b"[1,[2]3]", b"[1,x]", b"[1,,2]"])
def test_malformed_numbers_are_refused(wrong: bytes) -> None:
    _, [numbers] = large.without_numbers(b'{"data":%b}' % wrong)
    with pytest.raises(InvalidRequest, match="malformed JSON"):
        numbers.raw("x", "FP32")


# Documents with large arrays


def test_a_document_in_pieces_is_the_one_in_a_whole() -> None:
    values = np.arange(3 * large.LARGE_ELEMENTS + 5, dtype=np.float32) / 8
    values[[0, large.LARGE_ELEMENTS, -1]] = [np.nan, np.inf, -np.inf]
    writing = large.Writing()
    document = {
        "a": "text \x00 in between",
        "b": [writing.elements("FP32", values)],
        "c": writing.elements("FP32", values[:0]),
    }
    read = orjson.loads(b"".join(writing.pieces(document)))
    assert (read["a"], read["c"]) == ("text \x00 in between", [])
    told = read["b"][0]
    assert (told[0], told[large.LARGE_ELEMENTS], told[-1]) == ("NaN", "Infinity", "-Infinity")
    assert told[1 : large.LARGE_ELEMENTS] == values[1 : large.LARGE_ELEMENTS].tolist()


@pytest.mark.parametrize("length", [10, large._STEP_BYTES - 1, large._STEP_BYTES, 3 * large._STEP_BYTES + 7])
def test_numbers_are_found_however_long_the_text(length: int) -> None:
    text = b'{"data":[' + b"1," * (length // 2) + b'1],"name":"x","outputs":[{"name":"y"}]}'
    rest, [numbers] = large.without_numbers(bytearray(text))
    assert rest == b'{"data":0,"name":"x","outputs":[{"name":"y"}]}'
    assert numbers.raw("input", "INT32") == (b"\x01\0\0\0" * (length // 2 + 1), length // 2 + 1)
