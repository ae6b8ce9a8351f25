"""Each fuzz target on its corpus, whole and broken a little; ``make fuzz`` goes further."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests import wire
from tests.fuzz.targets import CORPUS, NATIVE, TARGETS, target

CHANGES = ("set", "flip", "delete", "insert", "cut")


def broken(seed: bytes, chance: random.Random) -> Iterator[bytes]:
    yield seed
    for _ in range(5):
        yield wire.mutated(seed, [(chance.random(), chance.choice(CHANGES), chance.randrange(256)) for _ in range(2)])


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_corpus(name: str) -> None:
    chance = random.Random(9)
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert seeds
    fuzz = target(name)
    for seed in seeds:
        for data in broken(seed, chance):
            fuzz(data)


def test_every_target_without_python_begins_with_the_corpus_of_another() -> None:
    assert set(NATIVE.values()) <= TARGETS.keys()
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
