"""Files of settings that are read again when they change, plain ones and those behind links."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mmcore.errors import InvalidSetting
from mmcore.routing.watched_file import WatchedFile
from tests.registries import until


@asynccontextmanager
async def watched(path: Path, parse: Callable[[str], Any] = json.loads) -> AsyncIterator[WatchedFile[Any]]:
    file = WatchedFile(path, parse, interval_s=0.002)
    task = asyncio.create_task(file.watch())
    try:
        yield file
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_file_is_read_again_when_it_is_written_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("1")
    seen = []
    async with watched(path) as file:
        file.on_change = seen.append
        assert file.value == 1
        path.write_text("22")
        await until(lambda: file.value == 22)
        (tmp_path / "new.json").write_text("33")
        (tmp_path / "new.json").rename(path)
        await until(lambda: file.value == 33)
        path.unlink()
        await asyncio.sleep(0.01)
        assert file.value == 33
        path.write_text("4")
        await until(lambda: file.value == 4)
    assert seen == [22, 33, 4]


async def test_what_kubernetes_mounts_is_followed(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(name)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "settings.json").symlink_to("..data/settings.json")
    async with watched(tmp_path / "settings.json") as file:
        assert file.value == 1
        (tmp_path / "..tmp").symlink_to("2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        await until(lambda: file.value == 2)


async def test_a_bad_change_leaves_what_was_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "settings.json"
    path.write_text("1")
    async with watched(path) as file:
        path.write_text("no json")
        await until(lambda: "what it said before stays in force" in caplog.text)
        assert file.value == 1
        path.write_text("2")
        await until(lambda: file.value == 2)


@pytest.mark.parametrize("content", [None, "no json"])
def test_a_file_that_is_bad_at_first_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidSetting, match=r"settings\.json"):
        WatchedFile(path, json.loads)
