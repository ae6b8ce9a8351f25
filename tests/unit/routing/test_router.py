"""From names to copies: loads, explicit loads and unloads, overrides, and a folder that changes underneath."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mmcore.errors import InvalidModel, InvalidRequest, LoadFailed, NotFound, Overloaded, Unavailable
from mmcore.model import ModelSource
from mmcore.routing import IndexRow, Router
from mmcore.storage import ModelFolder
from tests.unit.models_in_memory import Clock, FakeModel, FakeOrigin


class Frameworks:
    """Stands for ``load_model``: a model whose file says ``bad`` fails, others answer with their file's text."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str, str]] = []
        self.models: list[FakeModel] = []
        self.sources: list[ModelSource] = []

    def __call__(self, source: ModelSource) -> FakeModel:
        text = source.path.read_text()
        self.loaded.append((source.name, source.version, text))
        self.sources.append(source)
        if text == "bad":
            raise LoadFailed(f"{source.path.name} is corrupt")
        model = FakeModel(source.settings.size_bytes or 10)
        self.models.append(model)
        return model


class Instance:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = Clock()
        self.frameworks = Frameworks()
        self.folder = ModelFolder(root, interval_s=3600.0)
        self.router = Router(
            capacity_bytes=100,
            folder=self.folder,
            load=self.frameworks,
            bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
            clock=self.clock,
        )

    def put(self, name: str, content: str = "one") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    async def look(self) -> None:
        """Take what has changed in the folder."""
        self.router.apply(await self.folder.scan_now())

    def rows(self, name: str) -> list[tuple[str, str, str]]:
        return [(row.version, row.state, row.reason) for row in self.router.index() if row.name == name]

    def text(self, name: str, version: str = "") -> str | None:
        """The file's text that the serving copy was loaded from, as the frameworks saw it."""
        copy = self.router.lookup(name, version)
        if copy is None:
            return None
        (index,) = [number for number, source in enumerate(self.frameworks.sources) if source is copy.source]
        return self.frameworks.loaded[index][2]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    root = tmp_path / "models"
    root.mkdir()
    made = Instance(root)
    yield made
    await made.router.close()


async def test_a_model_is_loaded_when_it_is_asked_for(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    instance.put("m/2/model.onnx")
    await instance.router.start()
    router = instance.router
    assert router.names() == ["m"]
    assert router.versions("m") == ("1", "2")
    assert router.lookup("m") is None
    copy = await router.load("m")
    assert (copy.name, copy.version) == ("m", "2")
    assert router.lookup("m") is router.lookup("m", "2") is copy
    assert router.lookup("m", "1") is None
    assert await router.load("m", "2") is copy
    one = await router.load("m", "1")
    assert router.lookup("m", "1") is one
    assert router.lookup("m") is copy
    assert router.copies("m") == [one, copy]
    assert set(router.copies()) == {copy, one}
    assert (await router.source("m", "1")).path == instance.root / "m/1/model.onnx"


async def test_what_is_not_known_is_refused_at_once_in_tritons_words(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    await instance.router.start()
    for refused in (instance.router.load, instance.router.check):
        with pytest.raises(NotFound, match=r"^Request for unknown model: 'x' is not found$"):
            refused("x")
        with pytest.raises(NotFound, match=r"^Request for unknown model: 'm' version 3 is not found$"):
            refused("m", "3")
    assert instance.router.versions("x") == ()
    assert instance.router.copies("x") == []
    instance.router.check("m", "1")


async def test_a_version_may_have_a_name_that_is_no_number(instance: Instance) -> None:
    instance.put("m/clf.pkl")
    instance.put("m/model-settings.json", '{"name": "iris", "parameters": {"version": "v0.1.0"}}')
    await instance.router.start()
    assert instance.router.versions("iris") == ("v0.1.0",)
    copy = await instance.router.load("iris", "v0.1.0")
    assert instance.router.lookup("iris") is copy
    assert instance.router.copies("iris") == [copy]


async def test_a_version_that_the_policy_forbids_is_not_known(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    instance.put("m/2/model.onnx")
    instance.put("m/config.pbtxt", "version_policy { latest { num_versions: 1 } }")
    await instance.router.start()
    with pytest.raises(NotFound):
        instance.router.load("m", "1")
    assert (await instance.router.load("m")).version == "2"


async def test_the_index_tells_every_state(instance: Instance) -> None:
    for name in ("idle", "ready", "failed", "leaving"):
        instance.put(f"{name}/model.onnx", "bad" if name == "failed" else "one")
    instance.put("broken/readme.md")
    instance.put("half/1/model.onnx")
    instance.put("half/2/readme.md")
    await instance.router.start()
    router = instance.router
    await router.load("ready")
    with pytest.raises(LoadFailed):
        await router.load("failed")
    with pytest.raises(LoadFailed, match="no model file in broken"):
        await router.load("broken")
    with pytest.raises(LoadFailed, match="version 2: no model file"):
        await router.load("half", "2")
    leaving = await router.load("leaving")
    leaving.acquire()
    await router.unload("leaving")
    not_loaded = "not loaded; the first request loads it"
    assert sorted(router.index()) == [
        IndexRow("broken", "", "UNAVAILABLE", "no model file in broken; it holds readme.md"),
        IndexRow("failed", "1", "UNAVAILABLE", "model.onnx is corrupt"),
        IndexRow("half", "1", "UNAVAILABLE", not_loaded),
        IndexRow("half", "2", "UNAVAILABLE", "version 2: no model file in 2; it holds readme.md"),
        IndexRow("idle", "1", "UNAVAILABLE", not_loaded),
        IndexRow("leaving", "1", "UNLOADING", ""),
        IndexRow("ready", "1", "READY", ""),
    ]
    leaving.release()
    await until(lambda: instance.rows("leaving") == [("1", "UNAVAILABLE", "unloaded")])


async def test_a_load_under_way_is_in_the_index(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    waiter = instance.router.load("m")
    assert instance.rows("m") == [("1", "LOADING", "")]
    await waiter
    assert instance.rows("m") == [("1", "READY", "")]


async def test_a_broken_model_is_answered_from_memory_until_it_expires_or_changes(instance: Instance) -> None:
    instance.put("m/model.onnx", "bad")
    await instance.router.start()
    for _ in range(3):
        with pytest.raises(LoadFailed, match="corrupt"):
            await instance.router.load("m")
    assert len(instance.frameworks.loaded) == 1
    instance.clock.now += 11
    with pytest.raises(LoadFailed):
        await instance.router.load("m")
    assert len(instance.frameworks.loaded) == 2
    instance.put("m/model.onnx", "fixed")
    await instance.look()
    assert instance.rows("m") == [("1", "UNAVAILABLE", "not loaded; the first request loads it")]
    await instance.router.load("m")
    assert instance.text("m") == "fixed"


async def test_new_files_are_served_once_they_are_loaded(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    old = await instance.router.load("m")
    old.acquire()
    instance.put("m/model.onnx", "other")
    await instance.look()
    assert instance.router.lookup("m") is old
    await until(lambda: instance.router.lookup("m") is not old)
    assert instance.text("m") == "other"
    assert not instance.frameworks.models[0].closed.is_set()
    old.release()
    await until(instance.frameworks.models[0].closed.is_set)


@pytest.mark.parametrize(
    ("file", "reason"),
    [("m/model.onnx", "new files were not taken: model.onnx is corrupt"), ("m/config.pbtxt", "config.pbtxt: 1:1")],
)
async def test_bad_new_files_leave_the_old_copy_serving(instance: Instance, file: str, reason: str) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    old = await instance.router.load("m")
    instance.put(file, "bad")
    await instance.look()
    await until(lambda: instance.rows("m")[0][2])
    ((version, state, why),) = instance.rows("m")
    assert (version, state) == ("1", "READY")
    assert why.startswith(reason)
    assert instance.router.lookup("m") is old
    assert await instance.router.load("m") is old
    if file.endswith("pbtxt"):
        (instance.root / file).unlink()
    else:
        instance.put(file, "good")
    await instance.look()
    await until(lambda: instance.router.lookup("m") is not old)
    assert instance.rows("m") == [("1", "READY", "")]


async def test_a_new_version_takes_over_when_it_is_loaded(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    await instance.router.start()
    await instance.router.load("m")
    instance.put("m/2/model.onnx", "two")
    await instance.look()
    copy = instance.router.lookup("m")
    assert copy is not None
    assert copy.version == "1"
    await until(lambda: instance.text("m") == "two")
    assert instance.text("m", "1") == "one"
    assert [loaded[1] for loaded in instance.frameworks.loaded] == ["1", "2"], "an untouched version was loaded again"


async def test_a_bad_new_version_leaves_the_old_one_the_default(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    await instance.router.start()
    await instance.router.load("m")
    instance.put("m/2/model.onnx", "bad")
    await instance.look()
    await until(lambda: any("not taken" in row[2] for row in instance.rows("m")))
    assert instance.text("m") == "one"
    rows = {row[0]: row[1:] for row in instance.rows("m")}
    assert rows["1"][0] == "READY"
    assert rows["2"] == ("UNAVAILABLE", "new files were not taken: model.onnx is corrupt")


async def test_a_version_replaced_by_another_serves_until_that_is_loaded(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    await instance.router.start()
    old = await instance.router.load("m")
    shutil.rmtree(instance.root / "m/1")
    instance.put("m/2/model.onnx", "two")
    await instance.look()
    assert instance.router.lookup("m") is old
    await until(lambda: instance.text("m") == "two")
    assert instance.router.lookup("m", "1") is None
    with pytest.raises(NotFound):
        instance.router.load("m", "1")
    await until(instance.frameworks.models[0].closed.is_set)


async def test_a_removed_model_finishes_what_it_is_at(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    copy = await instance.router.load("m")
    copy.acquire()
    shutil.rmtree(instance.root / "m")
    await instance.look()
    assert instance.router.lookup("m") is None
    with pytest.raises(NotFound):
        instance.router.load("m")
    assert instance.router.index() == []
    await asyncio.sleep(0.06)
    assert not instance.frameworks.models[0].closed.is_set()
    copy.release()
    await until(instance.frameworks.models[0].closed.is_set)


async def test_a_model_removed_while_it_is_loaded_is_not_found(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    waiter = instance.router.load("m")
    instance.router.remove("m")
    with pytest.raises(NotFound):
        await waiter
    await until(lambda: instance.router.cache.used_bytes == 0)
    assert instance.router.copies() == []


async def test_files_being_changed_are_not_loaded(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    instance.put("m/model.onnx", "half of the ")
    with pytest.raises(Unavailable, match="being changed"):
        await instance.router.load("m")
    await instance.look()
    await instance.router.load("m")
    assert instance.text("m") == "half of the "


async def test_an_unloaded_model_stays_away_until_it_is_loaded_explicitly(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    await instance.router.load("m")
    await instance.router.unload("m")
    assert instance.router.lookup("m") is None
    for refused in (instance.router.load, instance.router.check):
        with pytest.raises(NotFound, match="'m' has no available versions"):
            refused("m")
    await instance.look()
    with pytest.raises(NotFound):
        instance.router.load("m")
    copy = await instance.router.load_explicit("m")
    assert instance.router.lookup("m") is copy
    assert await instance.router.load_explicit("m") is copy
    with pytest.raises(NotFound, match="'x' is not found"):
        await instance.router.unload("x")


async def test_an_unloaded_model_comes_back_when_its_folder_changes(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    await instance.router.unload("m")
    instance.put("m/model.onnx", "other")
    await instance.look()
    await instance.router.load("m")
    assert instance.text("m") == "other"


async def test_an_unload_ends_the_wait_for_a_load(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    waiter = instance.router.load("m")
    await instance.router.unload("m")
    with pytest.raises(NotFound):
        await waiter
    await until(lambda: instance.router.cache.used_bytes == 0)
    assert instance.router.copies() == []


async def test_a_model_unloaded_while_new_files_are_taken_stays_unloaded(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    await instance.router.load("m")
    instance.put("m/model.onnx", "other")
    await instance.look()
    await instance.router.unload("m")
    await until(lambda: not instance.router._replacing)
    await until(lambda: instance.router.cache.used_bytes == 0)
    assert instance.router.copies() == []
    assert instance.rows("m") == [("1", "UNAVAILABLE", "unloaded")]


async def test_an_explicit_load_takes_new_files_and_tries_failures_again(instance: Instance) -> None:
    await instance.router.start()
    with pytest.raises(NotFound, match="failed to load 'm', failed to poll from model repository"):
        await instance.router.load_explicit("m")
    instance.put("m/model.onnx", "bad")
    for count in (1, 2):
        with pytest.raises(LoadFailed, match="corrupt"):
            await instance.router.load_explicit("m")
        assert len(instance.frameworks.loaded) == count
    instance.put("m/model.onnx", "good")
    await instance.router.load_explicit("m")
    instance.put("m/model.onnx", "better")
    await instance.router.load_explicit("m")
    assert instance.text("m") == "better"
    instance.put("b/readme.md")
    with pytest.raises(LoadFailed, match="failed to load 'b', no model file in b"):
        await instance.router.load_explicit("b")


async def test_a_configuration_overrides_the_folders(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    instance.put("m/2/model.onnx", "two")
    instance.put("m/config.pbtxt", "max_batch_size: 2")
    await instance.router.start()
    old = await instance.router.load("m")
    config = {"max_batch_size": 16, "version_policy": {"specific": {"versions": [1]}}}
    copy = await instance.router.load_override("m", json.dumps(config))
    assert copy.source.settings.max_batch_size == 16
    assert instance.router.versions("m") == ("1",)
    assert instance.router.lookup("m") is copy
    assert instance.router.lookup("m", "2") is None
    assert old.source.settings.max_batch_size == 2
    again = await instance.router.load_explicit("m")
    assert (again.version, again.source.settings.max_batch_size) == ("2", 2)
    assert instance.router.versions("m") == ("1", "2")


async def test_files_override_the_folder_and_go_when_it_is_loaded_again(instance: Instance) -> None:
    instance.put("m/1/model.onnx")
    await instance.router.start()
    await instance.router.load("m")
    files = {"file:3/model.onnx": b"sent", "file:3/deep/weights.bin": b""}
    copy = await instance.router.load_override("m", "{}", files)
    assert (copy.version, instance.text("m")) == ("3", "sent")
    private = copy.source.path.parent
    assert private.exists()
    assert instance.root not in private.parents
    assert private.parent.stat().st_mode & 0o077 == 0
    await instance.router.load_explicit("m")
    assert instance.text("m") == "one"
    await until(lambda: not private.exists())


async def test_a_model_may_come_by_files_alone_and_goes_with_the_instance(instance: Instance) -> None:
    await instance.router.start()
    copy = await instance.router.load_override("new", '{"backend": "onnxruntime"}', {"1/model.onnx": b"sent"})
    assert instance.router.lookup("new") is copy
    assert instance.rows("new") == [("1", "READY", "")]
    await instance.router.unload("new")
    assert instance.router.lookup("new") is None
    again = await instance.router.load_explicit("new")
    private = again.source.path.parent
    await instance.router.close()
    assert not private.exists()


@pytest.mark.parametrize(
    ("config", "files", "error", "text"),
    [
        (None, {"1/model.onnx": b""}, InvalidRequest, "needs parameter 'config'"),
        ("{}", {}, InvalidRequest, "failed to poll from model repository"),
        ("{}", {"../model.onnx": b""}, InvalidRequest, "not a path inside"),
        ("{}", {"/etc/x": b""}, InvalidRequest, "not a path inside"),
        ("{}", {"1": b"", "1/model.onnx": b""}, InvalidRequest, "failed to load 'new'"),
        ("not json", {"1/model.onnx": b""}, InvalidModel, "failed to load 'new', config: "),
        ("{}", {"1/readme.md": b""}, LoadFailed, "failed to load 'new', version 1: no model file"),
        ("{}", {"1/model.onnx": b"bad"}, LoadFailed, "failed to load 'new', model.onnx is corrupt"),
    ],
)
async def test_a_refused_override_leaves_nothing_behind(
    instance: Instance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str | None,
    files: dict[str, bytes],
    error: type[Exception],
    text: str,
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    await instance.router.start()
    with pytest.raises(error, match=text):
        await instance.router.load_override("new", config, files)
    assert instance.router.index() == []
    assert list(private.iterdir()) == []


async def test_an_override_that_fails_leaves_what_served(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    old = await instance.router.load("m")
    with pytest.raises(LoadFailed):
        await instance.router.load_override("m", "{}", {"2/model.onnx": b"bad"})
    with pytest.raises(InvalidModel):
        await instance.router.load_override("m", '{"backend": "python"}')
    assert instance.router.lookup("m") is old
    assert instance.router.versions("m") == ("1",)


async def test_a_changed_folder_ends_an_override(instance: Instance) -> None:
    instance.put("m/model.onnx")
    await instance.router.start()
    await instance.router.load_override("m", "{}", {"7/model.onnx": b"sent"})
    instance.put("m/model.onnx", "changed")
    await instance.look()
    await until(lambda: instance.text("m") == "changed")
    assert instance.router.versions("m") == ("1",)
    assert instance.router.lookup("m", "7") is None


async def test_an_evicted_model_is_loaded_again(instance: Instance) -> None:
    for name in "abc":
        instance.put(f"{name}/model.onnx")
        instance.put(f"{name}/mmcore.yaml", "size_bytes: 40")
    await instance.router.start()
    # The first has been idle so much longer than the second that it goes whatever their loads took.
    for name, then_idle_s in (("a", 1e6), ("b", 1.0), ("c", 1.0)):
        await instance.router.load(name)
        instance.clock.now += then_idle_s
    assert instance.router.lookup("a") is None
    await until(lambda: not any(copy.resident for copy in instance.router.copies()))
    assert instance.router.lookup("b") is not None
    await instance.router.load("a")
    assert instance.router.lookup("a") is not None
    assert [instance.router.lookup(name) is None for name in "bc"].count(True) == 1
    instance.put("d/model.onnx")
    instance.put("d/mmcore.yaml", "size_bytes: 101")
    await instance.look()
    with pytest.raises(Overloaded, match="101 bytes, which is more than the capacity of 100 bytes"):
        await instance.router.load("d")


async def test_preloading_loads_what_is_named_or_all(instance: Instance) -> None:
    instance.put("a/model.onnx")
    instance.put("b/model.onnx", "bad")
    await instance.router.start()
    errors = await instance.router.preload(["a", "x"])
    assert list(errors) == ["x"]
    assert instance.router.lookup("a") is not None
    errors = await instance.router.preload(("all",))
    assert {name: str(error) for name, error in errors.items()} == {"b": "model.onnx is corrupt"}


async def test_an_end_while_models_are_preloaded_leaves_no_error_behind(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    entered, opened = threading.Event(), threading.Event()

    def slow(self: Frameworks, source: ModelSource) -> FakeModel:
        entered.set()
        assert opened.wait(10)
        raise LoadFailed("too late")

    monkeypatch.setattr(Frameworks, "__call__", slow)
    for name in "abcdefgh":
        instance.put(f"{name}/model.onnx")
    await instance.router.start()
    preloading = asyncio.create_task(instance.router.preload(("all",)))
    assert await asyncio.to_thread(entered.wait, 10)
    preloading.cancel()
    stopping = asyncio.create_task(instance.router.close())
    with pytest.raises(asyncio.CancelledError):
        await preloading
    opened.set()
    await stopping
    del preloading, stopping
    gc.collect()
    assert [context["message"] for context in told] == []


async def test_models_can_be_registered_without_a_folder() -> None:
    router = Router(
        capacity_bytes=10_000,
        load=lambda source: FakeModel(),
        bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
    )
    await router.start()
    router.register("m", ["1", "2"], FakeOrigin())
    copy = await router.load("m")
    assert copy.version == "2"
    router.register("m", ["3"], FakeOrigin())
    assert router.lookup("m") is None
    assert (await router.load("m")).version == "3"
    await router.close()


async def test_the_folder_is_followed_while_running(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.onnx").write_text("one")
    frameworks = Frameworks()
    router = Router(
        capacity_bytes=100,
        folder=ModelFolder(tmp_path, interval_s=0.01),
        load=frameworks,
        bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
    )
    await router.start()
    assert router.names() == ["m"]
    (tmp_path / "n.onnx").write_text("two")
    await until(lambda: router.names() == ["m", "n"])
    shutil.rmtree(tmp_path / "m")
    await until(lambda: router.names() == ["n"])
    await router.close()
