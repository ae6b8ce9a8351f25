"""The copies that a model's key asks for, and what of a key makes it another model."""

from __future__ import annotations

import json

import pytest

from mmcore.errors import InvalidRequest
from mmcore.model import ModelInfo
from mmcore.routing.copies_wanted import CopiesWanted, copies_wanted, same_model


@pytest.mark.parametrize(
    ("key", "wanted", "at_once"),
    [
        ("", CopiesWanted(), 0),
        ("no JSON", CopiesWanted(), 0),
        ("[" * 5000, CopiesWanted(), 0),
        ("[1]", CopiesWanted(), 0),
        ('{"storage_key": "copies"}', CopiesWanted(), 0),
        ('{"copies": {}}', CopiesWanted(), 0),
        ('{"copies": {"min": 2, "max": 4}}', CopiesWanted(2, 4), 2),
        ('{"copies": {"everywhere": true}}', CopiesWanted(everywhere=True), 1),
    ],
)
def test_what_a_key_asks_for(key: str, wanted: CopiesWanted, at_once: int) -> None:
    assert (copies_wanted(key), copies_wanted(key).at_once) == (wanted, at_once)


@pytest.mark.parametrize(
    ("copies", "told"),
    [
        (3, "must be an object"),
        ({"mim": 1}, "unknown field 'mim'"),
        ({"min": -1}, "'min' of the model's copies must be a number that is not negative, got -1"),
        ({"min": True}, "got True"),
        ({"everywhere": 1}, "must be a truth value, got 1"),
        ({"min": 3, "max": 2}, "3 copies at least, 2 at most"),
    ],
)
def test_what_cannot_be_asked_for(copies: object, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        copies_wanted(json.dumps({"copies": copies}))


def test_other_copies_do_not_make_another_model() -> None:
    key = '{"storage_key": "s", "copies": {"min": 2}}'
    model = ModelInfo("t", "p", key)
    assert same_model(model, ModelInfo("t", "p", '{"copies": {"max": 2}, "storage_key": "s"}'))
    assert same_model(model, ModelInfo("t", "p", '{"storage_key": "s"}'))
    assert same_model(ModelInfo("t", "p", '{"copies": {"min": 2}}'), ModelInfo("t", "p"))
    for other in (ModelInfo("t", "q", key), ModelInfo("u", "p", key), ModelInfo("t", "p", '{"storage_key": "r"}')):
        assert not same_model(model, other)
    assert not same_model(ModelInfo("t", "p", "a text"), ModelInfo("t", "p", "another"))
    assert not same_model(ModelInfo("t", "p", "a text"), ModelInfo("t", "p"))
