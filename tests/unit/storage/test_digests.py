"""Digests as stores tell them, by the check values of the catalogue of CRCs and by what hashlib says."""

from __future__ import annotations

import base64
import hashlib
import os

import pytest

from mmcore.storage.digests import ALGORITHMS, Digest, begin, joined, of_pieces

#: Of the nine digits, as https://reveng.sourceforge.io/crc-catalogue tells.
CHECKS = {"crc32": "cbf43926", "crc32c": "e3069283", "crc64nvme": "ae8b14860a799888"}


@pytest.mark.parametrize("algorithm", CHECKS)
def test_crcs_are_the_known_ones_in_one_go_in_steps_and_in_parts(algorithm: str) -> None:
    whole = begin(algorithm)
    for step in (b"1234", memoryview(b"567"), b"", b"89"):
        whole.update(step)
    assert whole.digest().hex() == CHECKS[algorithm]
    parts = []
    for part in (b"123", b"", b"456789"):
        one = begin(algorithm)
        one.update(part)
        parts.append((one, len(part)))
    assert joined(algorithm, parts) == CHECKS[algorithm]
    assert Digest(algorithm, CHECKS[algorithm]).joins


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_hashes_are_those_of_hashlib(algorithm: str) -> None:
    body = os.urandom(1000)
    one = begin(algorithm)
    one.update(body)
    assert one.digest() == hashlib.new(algorithm, body).digest()
    assert not Digest(algorithm, one.digest().hex()).joins


def test_digest_of_pieces_is_that_of_their_digests() -> None:
    pieces = [hashlib.md5(part).digest() for part in (b"a", b"b")]
    assert of_pieces("md5", pieces) == hashlib.md5(b"".join(pieces)).hexdigest() + "-2"
    told = Digest("crc32", "cbf43926-12")
    assert (told.pieces, told.joins) == (12, False)
    assert Digest("crc32", "cbf43926").pieces == 0


def test_the_cheap_come_first() -> None:
    assert ALGORITHMS.index("crc32") < ALGORITHMS.index("sha1") < ALGORITHMS.index("md5")
    # S3 tells them in base64, with the highest byte first.
    assert base64.b64encode(bytes.fromhex(CHECKS["crc32"])) == b"y/Q5Jg=="
