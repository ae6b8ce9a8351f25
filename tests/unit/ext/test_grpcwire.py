"""gRPC's notation: timeouts, percent-encoded texts, compression and binary metadata, as properties."""

from __future__ import annotations

import gzip
import zlib
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore._ext.grpcwire import compress, decode_message, decompress, encode_message, format_timeout, parse_timeout
from mmcore.errors import MessageTooLong
from tests.sessions import Pair, methods

UNITS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 10**3, b"n": 1}


@given(st.text())
def test_a_text_survives_percent_encoding(text: str) -> None:
    encoded = encode_message(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    plain = text.encode("utf-8", "replace")
    assert unquote_to_bytes(encoded) == plain
    assert decode_message(encoded) == plain.decode()


@given(st.binary())
def test_any_bytes_decode_to_some_text(raw: bytes) -> None:
    assert decode_message(raw) == unquote_to_bytes(raw).decode("utf-8", "replace")


@given(st.integers(0, 99_999_999), st.sampled_from(list(UNITS)))
def test_a_timeout_is_its_digits_times_its_unit(value: int, unit: bytes) -> None:
    assert parse_timeout(b"%d%s" % (value, unit)) == min(value * UNITS[unit], 2**63 - 1)


@pytest.mark.parametrize(
    "text", [b"", b"1", b"S", b"1x", b"+1S", b"-1S", b" 1S", b"1S ", b"1.0S", b"123456789S", b"1\xffS", b"1\xff"]
)
def test_a_malformed_timeout_is_none(text: bytes) -> None:
    assert parse_timeout(text) is None


@given(st.floats(1e-6, 3e8))
def test_a_formatted_timeout_is_never_shorter_and_hardly_longer(seconds: float) -> None:
    text = format_timeout(seconds)
    assert len(text) <= 9
    ns = parse_timeout(text)
    assert ns is not None
    # Nanoseconds of a double are exact to one in 2**53; 100,000 microseconds are the next to 99,999,999 nanoseconds.
    assert seconds * 1e9 * (1 - 2**-50) - 1 <= ns <= seconds * 1e9 * (1 + 1.1e-5) + 1


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, b"0n"), (-1.0, b"0n"), (float("inf"), b"99999999H"), (1e20, b"99999999H"), (0.25, b"250000u"),
])  # fmt: skip
def test_the_ends_of_timeouts(seconds: float, text: bytes) -> None:
    assert format_timeout(seconds) == text


@given(st.lists(st.binary(max_size=300), max_size=5), st.sampled_from(["gzip", "deflate"]))
def test_what_is_compressed_is_what_everyone_else_reads(pieces: list[bytes], encoding: str) -> None:
    plain = b"".join(pieces)
    packed = compress(encoding, [memoryview(piece) for piece in pieces])
    assert (gzip.decompress if encoding == "gzip" else zlib.decompress)(packed) == plain
    assert decompress(encoding, packed, len(plain)) == plain
    if plain:
        with pytest.raises(MessageTooLong):
            decompress(encoding, packed, len(plain) - 1)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_compressed_data_cut_off_or_with_a_tail_are_refused(plain: bytes, data: st.DataObject) -> None:
    packed = compress("gzip", plain)
    with pytest.raises(ValueError, match=r"."):
        decompress("gzip", packed[: data.draw(st.integers(0, len(packed) - 1))], 1000)
    with pytest.raises(ValueError, match="behind"):
        decompress("gzip", packed + data.draw(st.binary(min_size=1, max_size=5)), 1000)


names = st.from_regex(r"[a-z0-9_.\-]{1,20}", fullmatch=True).filter(lambda name: name not in ("te", "connection"))
texts = st.from_regex(r"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True)
pairs = st.lists(
    st.tuples(names.filter(lambda name: not name.endswith("-bin")), texts)
    | st.tuples(names.map(lambda name: f"{name}-bin"), st.binary(max_size=50)),
    max_size=10,
)


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_metadata_of_any_kind_goes_both_ways(metadata: list[tuple[str, str | bytes]]) -> None:
    taken = {"keep-alive", "upgrade", "transfer-encoding", "proxy-connection", "content-type", "content-length", "host"}
    metadata = [pair for pair in metadata if pair[0] not in taken and not pair[0].startswith("grpc-")]
    seen: list[list[tuple[str, str | bytes]]] = []

    def handler(call: object, body: bytes) -> bytes:
        seen.append([pair for pair in call.metadata if pair[0] != "user-agent"])  # type: ignore[attr-defined]  # a call
        call.set_trailers(metadata)  # type: ignore[attr-defined]  # a call
        return body

    both = Pair(methods({"/a/B": handler}))
    call = both.call("/a/B", b"", metadata=metadata)
    both.run()
    assert call.status == 0
    assert seen == [[pair for pair in metadata if pair[0] != "user-agent"]]
    assert list(call.trailers) == metadata
    both.end()
