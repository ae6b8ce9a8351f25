"""Protobuf messages as bytes, by hand: what the runtime would never write but must be read.

The strategies give ModelInferRequests whose fields come in any order, repeated, packed and not, with unknown fields
and groups between them.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
TEXTS = ("", "a", "INPUT0", "FP32", "BYTES", "üüü", "\U0001f600ab", "x" * 200, "shared_memory_region")
WIDE = (0, 1, 2, 127, 128, 300, 2**31 - 1, 2**31, 2**32 + 5, 2**63, 2**64 - 3, 2**64 - 1)


def varint(value: int, *, length: int = 1) -> bytes:
    """A varint of at least ``length`` bytes: longer than needed is allowed."""
    out = bytearray()
    while value >= 0x80 or len(out) + 1 < length:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, wire: int, value: bytes | int) -> bytes:
    """Tag and value; bytes of a LENGTH field get their length."""
    tag = varint(number << 3 | wire)
    if isinstance(value, int):
        return tag + varint(value)
    return tag + (varint(len(value)) if wire == LENGTH else b"") + value


def text(number: int, value: str) -> bytes:
    return field(number, LENGTH, value.encode())


def message(number: int, *parts: bytes) -> bytes:
    return field(number, LENGTH, b"".join(parts))


texts = st.sampled_from(TEXTS)
numbers = st.sampled_from(WIDE)
small = st.binary(max_size=5)


@st.composite
def unknown_fields(draw: st.DrawFn, depth: int = 2) -> bytes:
    number = draw(st.sampled_from((9, 15, 16, 99, 2**29 - 1)))
    wire = draw(st.sampled_from((VARINT, FIXED64, LENGTH, FIXED32, START_GROUP)))
    if wire == VARINT:
        return field(number, wire, draw(numbers))
    if wire == START_GROUP:
        inner = draw(st.lists(unknown_fields(depth - 1), max_size=2)) if depth else []
        return varint(number << 3 | START_GROUP) + b"".join(inner) + varint(number << 3 | END_GROUP)
    size = {FIXED64: 8, FIXED32: 4}.get(wire)
    return field(number, wire, draw(small if size is None else st.binary(min_size=size, max_size=size)))


@st.composite
def shuffled(draw: st.DrawFn, *parts: st.SearchStrategy[bytes], most: int = 2, unknown: bool = True) -> bytes:
    """Up to ``most`` of each part and perhaps an unknown field, in any order."""
    chunks = [chunk for part in parts for chunk in draw(st.lists(part, max_size=most))]
    if unknown:
        chunks += draw(st.lists(unknown_fields(), max_size=1))
    return b"".join(draw(st.permutations(chunks)))


def sub(number: int, inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return inner.map(lambda value: field(number, LENGTH, value))


def texts_in(number: int) -> st.SearchStrategy[bytes]:
    return texts.map(lambda value: text(number, value))


def varints_in(number: int) -> st.SearchStrategy[bytes]:
    """One unpacked, or some packed."""
    packed = st.lists(numbers, max_size=3).map(lambda values: message(number, *map(varint, values)))
    return numbers.map(lambda value: field(number, VARINT, value)) | packed


def fixed_in(number: int, wire: int, size: int) -> st.SearchStrategy[bytes]:
    element = st.binary(min_size=size, max_size=size)
    packed = st.lists(element, max_size=3).map(lambda values: message(number, *values))
    return element.map(lambda value: field(number, wire, value)) | packed


parameters = shuffled(
    st.booleans().map(lambda value: field(1, VARINT, int(value))),
    numbers.map(lambda value: field(2, VARINT, value)),
    texts_in(3),
    st.binary(min_size=8, max_size=8).map(lambda value: field(4, FIXED64, value)),
    numbers.map(lambda value: field(5, VARINT, value)),
    most=1,
)
# upb, protobuf's C core in Python, drops a map entry that holds an unknown field; the other runtimes and this codec
# drop the unknown field. So there is none here.
entries = shuffled(texts_in(1), sub(2, parameters), unknown=False)
contents = shuffled(
    *(varints_in(number) for number in range(1, 6)),
    fixed_in(6, FIXED32, 4),
    fixed_in(7, FIXED64, 8),
    small.map(lambda value: field(8, LENGTH, value)),
    most=1,
)
dims = st.sampled_from((0, 1, 2, 3, 2**64 - 1))
shapes = dims.map(lambda value: field(3, VARINT, value)) | st.lists(dims, max_size=3).map(
    lambda values: message(3, *map(varint, values))
)
tensors = shuffled(texts_in(1), texts_in(2), shapes, sub(4, entries), sub(5, contents))
requested = shuffled(texts_in(1), sub(2, entries))
requests = shuffled(
    texts_in(1), texts_in(2), texts_in(3), sub(4, entries), sub(5, tensors), sub(6, requested),
    small.map(lambda value: field(7, LENGTH, value)),
)  # fmt: skip
responses = shuffled(
    texts_in(1), texts_in(2), texts_in(3), sub(4, entries), sub(5, tensors),
    small.map(lambda value: field(6, LENGTH, value)),
)  # fmt: skip

#: One change to a message: at a place (as a fraction), what to do, and a byte.
Mutation = tuple[float, str, int]
mutations = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(("set", "flip", "delete", "insert", "cut")),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def mutated(body: bytes, changes: list[Mutation]) -> bytes:
    broken = bytearray(body)
    apply: dict[str, Callable[[int, int], object]] = {
        "set": lambda at, byte: broken.__setitem__(at, byte),
        "flip": lambda at, byte: broken.__setitem__(at, broken[at] ^ 1 << byte % 8),
        "delete": lambda at, byte: broken.__delitem__(at),
        "insert": lambda at, byte: broken.insert(at, byte),
        "cut": lambda at, byte: broken.__delitem__(slice(at, None)),
    }
    for place, what, byte in changes:
        if broken:
            apply[what](int(place * len(broken)), byte)
    return bytes(broken)
