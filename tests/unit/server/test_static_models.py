"""Models and vmodels that are registered from a file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mmcore.errors import AlreadyExists, LoadFailed
from mmcore.model import ModelInfo
from mmcore.registry import MemoryStore
from mmcore.routing import ModelState, Wanted
from mmcore.server.static_models import StaticModel, StaticModels, parse_static_models
from tests.unit.routing.instances_in_memory import Member, until

ENTRY = {"modelId": "m", "modelInfo": {"type": "fake", "path": "/m", "key": "{}"}}


@pytest.fixture
async def member() -> AsyncIterator[Member]:
    made = await Member("one", MemoryStore()).start()
    yield made
    await made.close()


def static_models(member: Member, file: str = "/static.json") -> StaticModels:
    return StaticModels(member.registry, member.registered, member.vmodels, file)


def test_entries_are_read() -> None:
    more = {
        "modelId": "n",
        "modelInfo": {"type": "t"},
        "vModelId": "v",
        "retainAfterTransition": True,
        "ensureLoaded": True,
    }
    assert parse_static_models(json.dumps([ENTRY, more])) == (
        StaticModel("m", ModelInfo("fake", "/m", "{}")),
        StaticModel("n", ModelInfo("t", "", ""), "v", retained=True, loaded=True),
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "expected a list of models, got dict"),
        ([1], "entry 0: expected an object"),
        ([{}], "entry 0: a modelId is needed"),
        ([{"modelId": "m"}], "m.modelInfo: expected an object"),
        ([{"modelId": "m", "modelInfo": {}}], "m.modelInfo: a type is needed"),
        ([ENTRY, {**ENTRY, "vmodel": "v"}], "entry 1: unknown field 'vmodel'"),
        ([{**ENTRY, "ensureLoaded": "yes"}], "entry 0.ensureLoaded: expected bool, got str"),
    ],
)
def test_what_the_file_cannot_say(content: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_static_models(json.dumps(content))


async def test_they_are_registered_and_loaded_as_they_say(member: Member) -> None:
    static = static_models(member)
    info = ModelInfo("fake", "/m")
    models = [StaticModel("a", info), StaticModel("b", info, loaded=True), StaticModel("c", info, "v", loaded=True)]
    await static.apply(models)
    await static.apply(models)
    assert {name: member.registered.status(name).state for name in member.registry.models} == {
        "a": ModelState.NOT_LOADED,
        "b": ModelState.LOADED,
        "c": ModelState.LOADED,
    }
    record = member.registry.models.get("c")
    assert record is not None
    assert (record.references, record.auto_delete) == (1, True)
    assert member.names.model("v") == "c"


async def test_one_that_cannot_be_registered_or_loaded_is_named(member: Member) -> None:
    static = static_models(member)
    await static.apply([StaticModel("a", ModelInfo("fake", "/a"))])
    with pytest.raises(AlreadyExists, match="static model a: Model already exists"):
        await static.apply([StaticModel("a", ModelInfo("fake", "/b"))])
    member.loader.errors["b"] = LoadFailed("b is corrupt")
    with pytest.raises(LoadFailed, match="static model b: b is corrupt"):
        await static.apply([StaticModel("b", ModelInfo("fake", "/b"), loaded=True)])


async def test_changes_of_the_file_are_registered_one_after_the_other(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    static = static_models(member)
    static.changed([StaticModel("a", ModelInfo("fake", "/a"), "v")])
    static.changed([StaticModel("v", ModelInfo("", "/a")), StaticModel("b", ModelInfo("fake", "/b"), "v")])
    await until(lambda: "v" in member.registry.vmodels and member.names.model("v") == "b")
    assert "static model v: Must provide non-empty model type string" in caplog.text
    assert "a" not in member.registry.models
    await static.close()


async def test_what_a_change_takes_out_of_the_file_goes_unless_it_is_referred_to(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    static = static_models(member)
    kept = StaticModel("kept", ModelInfo("fake", "/kept"))
    alone = StaticModel("alone", ModelInfo("fake", "/alone"))
    aliased = StaticModel("aliased", ModelInfo("fake", "/aliased"), "v", retained=True)
    used = StaticModel("used", ModelInfo("fake", "/used"))
    await static.apply([kept, alone, aliased, used])
    await member.registered.register("by hand", ModelInfo("fake", "/by-hand"))
    await member.vmodels.assign("w", Wanted("used"))
    static.changed([kept])
    await until(lambda: "static model used: Model used has referents" in caplog.text)
    assert sorted(member.registry.models) == ["by hand", "kept", "used"]
    assert list(member.registry.vmodels) == ["w"]
    # Nothing is let go of again.
    await member.registered.register("alone", ModelInfo("fake", "/alone"))
    static.changed([kept, StaticModel("new", ModelInfo("fake", "/new"))])
    await until(lambda: "new" in member.registry.models)
    static.changed([])
    await until(lambda: "kept" not in member.registry.models and "new" not in member.registry.models)
    assert "alone" in member.registry.models
    await static.close()


async def test_what_was_taken_out_while_no_instance_ran_goes_at_the_next_start_if_only_the_file_had_it(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    info = ModelInfo("fake", "/m")
    entries = [
        StaticModel("kept", info), StaticModel("gone", info), StaticModel("by both", info), StaticModel("used", info),
        StaticModel("aliased", info, "v", retained=True), StaticModel("went with it", info, "w"),
        StaticModel("moved", info, "by hand"),
    ]  # fmt: skip
    await member.registered.register("by both", info)
    await member.registered.register("by hand", info)
    await static_models(member).apply(entries)
    await static_models(member, "/another.json").apply([StaticModel("another's", info)])
    await member.registered.register("adopted", info)
    await static_models(member).apply([*entries, StaticModel("adopted later", info)])
    await member.registered.register("adopted later", info)
    await member.vmodels.assign("x", Wanted("used"))
    await member.vmodels.assign("by hand", Wanted("kept"))
    # The next start.
    await static_models(member).apply([StaticModel("kept", info)])
    assert sorted(member.registry.models) == [
        "adopted",
        "adopted later",
        "another's",
        "by both",
        "by hand",
        "kept",
        "used",
    ]
    assert sorted(member.registry.vmodels) == ["by hand", "x"]
    assert "static model used: Model used has referents" in caplog.text
    # And nothing at a start without changes.
    before = {name: member.registry.models.get(name) for name in member.registry.models}
    await static_models(member).apply([StaticModel("kept", info)])
    assert {name: member.registry.models.get(name) for name in member.registry.models} == before
