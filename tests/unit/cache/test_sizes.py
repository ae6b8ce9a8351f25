"""Sizes are predicted from what equal files took and kept from one start to the next; a broken file is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcore.cache.sizes import MOST, Files, Sizes
from mmcore.model import ModelSettings, ModelSource


def source(file: Path, stated: str = "onnx", **settings: int) -> ModelSource:
    return ModelSource(file.stem, "1", stated, file, ModelSettings(**settings))  # type: ignore[arg-type]


def written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def test_equal_files_are_told_by_their_content_wherever_they_are(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    one = source(written(tmp_path / "one", "m.onnx", content))
    same = source(written(tmp_path / "other", "renamed.onnx", content))
    longer = source(written(tmp_path / "longer", "m.onnx", content + b"x"))
    other_end = source(written(tmp_path / "end", "m.onnx", content[:-1] + b"y"))
    sizes = Sizes()
    sizes.learn(one, Files(one), 123_456)
    assert sizes.predict(same, Files(same)) == 123_456
    assert len({Files(one).digest, Files(longer).digest, Files(other_end).digest}) == 3
    assert Files(source(one.path, "openvino")).digest != Files(one).digest


def test_unknown_files_are_expected_to_take_as_much_more_as_others_of_their_format(tmp_path: Path) -> None:
    sizes = Sizes()
    first = source(written(tmp_path, "a.onnx", b"a" * 1000))
    assert sizes.predict(first, Files(first)) == 1000
    sizes.learn(first, Files(first), 3000)
    second = source(written(tmp_path, "b.onnx", b"b" * 2000))
    assert sizes.predict(second, Files(second)) == 4000
    sizes.learn(second, Files(second), 2000)
    third = source(written(tmp_path, "c.onnx", b"c" * 1000))
    assert 2700 < sizes.predict(third, Files(third)) < 2800
    of_another_format = source(third.path, "sklearn")
    assert sizes.predict(of_another_format, Files(of_another_format)) == 1000


def test_a_stated_size_wins_and_teaches_nothing(tmp_path: Path) -> None:
    sizes = Sizes()
    stated = source(written(tmp_path, "a.onnx", b"a" * 1000), size_bytes=77)
    sizes.learn(stated, Files(stated), 77)
    assert sizes.predict(stated, Files(stated)) == 77
    assert sizes.predict(source(stated.path), Files(stated)) == 1000


def test_weights_beside_a_model_count(tmp_path: Path) -> None:
    file = written(tmp_path, "m.xml", b"x" * 100)
    written(tmp_path, "m.bin", b"w" * 5000)
    assert Files(source(file, "openvino")).length == 5100


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    model, kept = source(written(tmp_path, "a.onnx", b"a" * 1000)), tmp_path / "sizes.json"
    sizes = Sizes(kept)
    sizes.learn(model, Files(model), 4000)
    sizes.save()
    again = Sizes(kept)
    assert again.predict(model, Files(model)) == 4000
    other = source(written(tmp_path, "b.onnx", b"b" * 500))
    assert again.predict(other, Files(other)) == 3500
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sizes": {"a": "x"}, "overhead": {}}', '{"sizes": 1}'])
def test_a_broken_file_is_passed_over(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = tmp_path / "sizes.json"
    kept.write_text(content)
    model = source(written(tmp_path, "a.onnx", b"a" * 10))
    sizes = Sizes(kept)
    assert "were not read" in caplog.text
    assert sizes.predict(model, Files(model)) == 10
    sizes.save()
    assert json.loads(kept.read_text())["sizes"] == {}


def test_a_folder_that_cannot_be_written_costs_a_word_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Sizes(tmp_path / "absent" / "sizes.json").save()
    assert "were not kept" in caplog.text


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    sizes = Sizes()
    model = source(written(tmp_path, "a.onnx", b"a"))
    files = Files(model)
    for number in range(MOST + 10):
        files.digest = str(number)
        sizes.learn(model, files, 1)
    assert len(sizes._known) == MOST
