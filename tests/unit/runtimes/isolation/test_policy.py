"""Which models get a worker process, by their settings and by what the instance demands."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcore.errors import InvalidModel
from mmcore.model import ModelSettings, ModelSource
from mmcore.runtimes.isolation.policy import is_isolated
from mmcore.storage import detect


def source(model_format: str, file: str = "model", isolation: str = "none") -> ModelSource:
    return ModelSource("m", "1", model_format, Path(file), ModelSettings(isolation=isolation))


@pytest.mark.parametrize(
    ("policy", "one", "expected"),
    [
        ("none", source("python"), False),
        ("none", source("onnx", isolation="process"), True),
        ("untrusted", source("python"), True),
        ("untrusted", source("sklearn", "model.joblib"), True),
        ("untrusted", source("sklearn", "model.pkl", "none"), True),
        ("untrusted", source("sklearn", "model.skops"), False),
        ("untrusted", source("onnx"), False),
        ("untrusted", source("xgboost", isolation="process"), True),
        ("all", source("onnx"), True),
    ],
)
def test_settings_can_ask_for_more_than_the_policy_and_not_for_less(
    policy: str, one: ModelSource, expected: bool
) -> None:
    assert is_isolated(one, policy) is expected


def settings(folder: Path, name: str, text: str) -> ModelSettings:
    (folder / "model.py").write_text("")
    (folder / name).write_text(text)
    (found,) = detect(folder).values()
    return found.settings


def test_the_settings_of_a_folder_are_read(tmp_path: Path) -> None:
    read = settings(
        tmp_path, "mmcore.yaml", "isolation: process\nisolation_memory: 2GiB\nisolation_cpus: 3\ntimeout: 30s\n"
    )
    assert (read.isolation, read.isolation_memory_bytes, read.timeout_s) == ("process", 2 * 2**30, 30.0)
    assert read.isolation_cpus == 3


def test_nothing_stated_is_no_isolation_and_no_limits(tmp_path: Path) -> None:
    read = settings(tmp_path, "mmcore.yaml", "")
    assert (read.isolation, read.isolation_memory_bytes, read.timeout_s) == ("none", None, None)
    assert read.isolation_cpus is None


def test_mmcore_yaml_goes_before_the_parameter_of_another_servers_file(tmp_path: Path) -> None:
    (tmp_path / "model-settings.json").write_text('{"parameters": {"extra": {"isolation": "process"}}}')
    assert settings(tmp_path, "mmcore.yaml", "isolation: none\n").isolation == "none"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mmcore.yaml", "isolation: thread", r"mmcore.yaml: isolation: expected one of none, process, got 'thread'"),
        ("mmcore.yaml", "isolation_memory: lots", r"mmcore.yaml: isolation_memory: 'lots' is not a size"),
        ("mmcore.yaml", "isolation_cpus: 0", r"mmcore.yaml: isolation_cpus: must be at least 1, got 0"),
        ("mmcore.yaml", "timeout: soon", r"mmcore.yaml: timeout: 'soon' is not a duration"),
        ("mmcore.yaml", "timeout: 0", r"mmcore.yaml: timeout: expected a time such as 30s, got 0"),
        ("mmcore.yaml", "timeout: [1]", r"mmcore.yaml: timeout: expected a time such as 30s"),
        (
            "config.pbtxt",
            'parameters { key: "isolation" value { string_value: "yes" } }',
            r"isolation: expected one of none, process, got 'yes'",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        settings(tmp_path, name, text)
