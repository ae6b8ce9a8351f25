"""The life of a model as the dashboard tells it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mmcore.errors import LoadFailed
from mmcore.registry import ModelRecord, open_registry
from mmcore.server.dashboard import events as module
from mmcore.server.dashboard.events import Events
from tests.unit.cache.test_cache import Fixture, settled


def following(fixture: Fixture, models: Any = None) -> Events:
    events = Events(fixture.cache, clock_ms=lambda: 1234)
    events.follow(models or open_registry("memory:", "me").models)
    return events


def life(events: Events, model: str) -> list[str]:
    return [event.what for event in reversed(events.latest(100, model))]


async def test_a_copy_is_loaded_and_evicted_for_another() -> None:
    fixture = Fixture(capacity_bytes=10)
    events = following(fixture)
    await fixture.loaded("a")
    assert life(events, "a") == ["queued", "pulling", "loading", "loaded"]
    await fixture.loaded("b")
    await settled(lambda: life(events, "a")[-1] == "unloaded")
    assert life(events, "a")[4:] == ["evicted", "unloading", "unloaded"]
    newest = events.latest(1, "b")[0]
    assert (newest.what, newest.at_ms, newest.version) == ("loaded", 1234, "1")
    assert newest.detail.startswith("10 bytes in 0.")
    await fixture.cache.close()


async def test_a_failure_is_told_once_with_its_reason() -> None:
    fixture = Fixture()
    events = following(fixture)
    fixture.loader.errors["a"] = LoadFailed("no such column")
    with pytest.raises(LoadFailed):
        await fixture.load("a")
    assert life(events, "a") == ["queued", "pulling", "loading", "failed"]
    assert events.latest(1)[0].detail == "no such column"
    await fixture.cache.close()


async def test_a_copy_that_takes_anothers_place_is_loaded_once() -> None:
    fixture = Fixture()
    events = following(fixture)
    await fixture.loaded("a")
    await fixture.cache.replace("a", "1", fixture.origin)
    await settled(lambda: fixture.cache.unloading("a") == [])
    await fixture.cache.close()
    assert life(events, "a")[:5] == ["queued", "pulling", "loading", "loaded", "reloaded"]


async def test_what_comes_into_the_registry_and_goes_is_told() -> None:
    registry = open_registry("memory:", "me")
    await registry.start()
    await registry.models.update("early", lambda _: ModelRecord(type="sklearn"))
    events = following(Fixture(), registry.models)
    await registry.models.update("a", lambda _: ModelRecord(type="sklearn"))
    await registry.models.update("a", lambda _: ModelRecord(type="sklearn", size_bytes=1))
    await registry.models.update("a", lambda _: None)
    assert [(event.model, event.what) for event in events.latest(10)] == [("a", "unregistered"), ("a", "registered")]
    await registry.close()


async def test_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    fixture = Fixture()
    events = following(fixture)
    await fixture.loaded("a")
    assert [event.number for event in events.latest(10)] == [4, 3, 2]
    assert len(events) == 3
    await fixture.cache.close()


@pytest.mark.parametrize(
    "name",
    [
        "m", "männchen/ü",
        # Named, as a test's id has to be UTF-8 for another process.
        pytest.param("nul\0", id="nul"), pytest.param("\udcff", id="surrogate"), pytest.param("x" * 20_000, id="long"),
    ],
)  # fmt: skip
async def test_names_and_reasons_come_as_they_were(name: str, caplog: pytest.LogCaptureFixture) -> None:
    # Nor can what was logged be told to it.
    caplog.set_level(logging.CRITICAL, "mmcore")
    fixture = Fixture()
    events = following(fixture)
    fixture.loader.errors[name] = LoadFailed("no such column: größe\0")
    with pytest.raises(LoadFailed):
        await fixture.load(name)
    newest = events.latest(1)[0]
    assert (newest.model, newest.version, newest.what) == (name[: 2**14 - 1], "1", "failed")
    assert newest.detail == "no such column: größe\0"
    await fixture.cache.close()
