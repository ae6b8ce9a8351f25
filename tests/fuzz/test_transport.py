"""The transport's fuzz target on fixed, seeded, broken conversations; a fuzzer goes further, see transport.py."""

from __future__ import annotations

import random

from tests import wire
from tests.fuzz.transport import LIMITS, METHODS, STREAM, UNARY, fuzz_one
from tests.sessions import Pair, Sink

KINDS = ("set", "flip", "delete", "insert", "cut")


def recorded() -> tuple[bytes, bytes]:
    """What client and server say to each other over some calls."""
    both = Pair(METHODS, settings=LIMITS, client_settings=LIMITS)
    both.call(UNARY, b"hello", encoding="gzip", metadata=[("a", "b"), ("c-bin", b"d")])
    stream = both.call(STREAM, None, sink=Sink())
    both.call(UNARY, b"error")
    both.call(UNARY, b"wait").cancel()
    both.call("/un/known", b"x" * 3000)
    for message in (b"one", b"", b"two" * 500):
        stream.send(message)
        both.run()
    stream.end()
    both.server.ping()
    both.run()
    both.server.announce_shutdown()
    both.run()
    both.end()
    return bytes(both.to_server), bytes(both.to_client)


TO_SERVER, TO_CLIENT = recorded()


def test_every_truncation_and_many_flipped_bits_are_survived() -> None:
    chance = random.Random(1)
    for head, body in ((1, TO_SERVER), (0, TO_CLIENT)):
        for size in range(0, len(body), 2):
            fuzz_one(bytes([head]) + body[:size])
            flipped = bytes([body[size] ^ 1 << chance.randrange(8)])
            fuzz_one(bytes([head | chance.randrange(128) << 1 & 0xFC]) + body[:size] + flipped + body[size + 1 :])


def test_random_changes_are_survived() -> None:
    chance = random.Random(2)
    for _ in range(4000):
        head, body = chance.choice(((1, TO_SERVER), (0, TO_CLIENT)))
        changes = [
            (chance.random(), chance.choice(KINDS), chance.randrange(256)) for _ in range(chance.randrange(1, 6))
        ]
        fuzz_one(bytes([head]) + wire.mutated(body, changes))


def test_random_frames_are_survived() -> None:
    chance = random.Random(3)
    for _ in range(4000):
        frames = bytearray()
        for _ in range(chance.randrange(1, 12)):
            payload = chance.randbytes(chance.choice((0, 1, 4, 5, 6, 8, 20)))
            stream = chance.choice((0, 1, 1, 2, 3, 5, 2**31 - 1))
            frames += len(payload).to_bytes(3, "big") + bytes([chance.randrange(12), chance.randrange(256)])
            frames += stream.to_bytes(4, "big") + payload
        fuzz_one(bytes([chance.choice((0, 3))]) + frames)


def test_random_bytes_are_survived() -> None:
    chance = random.Random(4)
    for _ in range(4000):
        fuzz_one(chance.randbytes(chance.randrange(60)))
