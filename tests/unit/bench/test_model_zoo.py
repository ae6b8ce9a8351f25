"""The many small models: each is one that the runtimes load, with an answer of its own that is its framework's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.model_zoo import KINDS, SIZES, Zoo
from mmcore.runtimes import load_model
from mmcore.storage.layout import detect

pytestmark = pytest.mark.slow

MODELS = 60


def test_models_of_every_format_load_and_answer_as_their_frameworks(tmp_path: Path) -> None:
    zoo = Zoo()
    answers = set()
    zoo.write(tmp_path, range(MODELS))
    for number in range(MODELS):
        (source,) = detect(tmp_path / zoo.name(number)).values()
        assert source.format == zoo.kind(number).format
        model = load_model(source)
        asked = zoo.question(number)
        assert model.inputs[0].datatype == asked.datatype
        ((name, _, values),) = model.infer({asked.input: asked.array}, ())
        assert name == asked.output
        assert values.shape == asked.expected.shape
        np.testing.assert_allclose(values, asked.expected, rtol=1e-5, atol=1e-6)
        answers.add(float(values[0, 0]))
    assert len(answers) == MODELS
    assert {zoo.kind(number).file for number in range(MODELS)} == {kind.file for kind in KINDS}


def test_a_seed_and_a_number_tell_the_content() -> None:
    zoo, again = Zoo(), Zoo()
    contents = [zoo.content(number) for number in range(100)]
    assert len(set(contents)) == 100
    assert contents[57] == again.content(57)
    assert contents[57] != Zoo(seed=2).content(57)
    assert min(map(len, contents)) < 2 * SIZES[0] < SIZES[4] < max(map(len, contents))
