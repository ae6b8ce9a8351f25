from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcore._ext.v2codec import decode_infer_response, encode_infer_response
from mmcore.cli import infer, main
from mmcore.config import ServeSettings, default_capacity
from mmcore.errors import LoadFailed


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ServeSettings]]:
    """The settings that ``mmcore serve`` would have started with."""
    seen: list[ServeSettings] = []

    def run(settings: ServeSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("mmcore.server.node.run", run)
    for name in ("MMCORE_CONFIG", "MMCORE_GRPC_PORT", "MMCORE_CAPACITY", "MMCORE_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    yield seen


def test_serve_alone_starts_with_the_defaults(served: list[ServeSettings]) -> None:
    assert main.run(["serve"]) == 0
    assert served == [ServeSettings(capacity_bytes=default_capacity())]


def test_every_flag_reaches_the_settings(served: list[ServeSettings], tmp_path: Path) -> None:
    flags = [
        *("--models", str(tmp_path), "--host", "0.0.0.0", "--grpc-port", "0", "--uds", str(tmp_path / "s")),
        *(
            "--capacity",
            "2GiB",
            "--max-message",
            "64MiB",
            "--preload",
            "a",
            "--preload",
            "b",
            "--server-name",
            "triton",
        ),
        *("--log-level", "DEBUG", "--grace", "5s", "--keepalive", "1m", "--max-connection-age", "10m"),
        *("--event-loop", "asyncio"),
    ]
    assert main.run(["serve", *flags]) == 0
    settings = served[0]
    assert (settings.models, settings.host, settings.grpc_port, settings.uds) == (
        tmp_path,
        "0.0.0.0",
        0,
        tmp_path / "s",
    )
    assert (settings.capacity_bytes, settings.preload, settings.server_name) == (2 * 2**30, ("a", "b"), "triton")
    assert (settings.log_level, settings.grace_s, settings.event_loop) == ("debug", 5.0, "asyncio")
    transport = settings.transport
    assert (transport.max_message_bytes, transport.keepalive_s, transport.max_connection_age_s) == (64 * 2**20, 60, 600)


def test_the_file_gives_defaults_that_environment_and_flags_override(
    served: list[ServeSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mmcore.yaml"
    file.write_text("grpc-port: 1\ncapacity: 1GB\npreload: [a, b]\ngrace: 3\nlog_level: error\n")
    monkeypatch.setenv("MMCORE_GRPC_PORT", "2")
    monkeypatch.setenv("MMCORE_CAPACITY", "2GB")
    assert main.run(["serve", "--config", str(file), "--capacity", "3GB"]) == 0
    settings = served[0]
    assert (settings.grpc_port, settings.capacity_bytes, settings.preload) == (2, 3 * 10**9, ("a", "b"))
    assert (settings.grace_s, settings.log_level) == (3.0, "error")


@pytest.mark.parametrize("content", ["- a\n- b\n", "grpc-port: [", "no-such-option: 1\n", "grpc-port: many\n"])
def test_a_wrong_file_is_a_usage_error(
    served: list[ServeSettings], tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mmcore.yaml"
    file.write_text(content)
    assert main.run(["serve", "--config", str(file)]) == 2
    assert served == []
    assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--help"], 0, ["serve", "infer", "models"]),
        (["--version"], 0, ["mmcore"]),
        (["serve", "--help"], 0, ["MMCORE_GRPC_PORT", "8033"]),
        (["no-such-command"], 2, ["no-such-command"]),
        ([], 2, ["Usage"]),
        (["infer"], 2, ["MODEL"]),
    ],
)
def test_help_and_wrong_calls(args: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(args) == code
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.out + captured.err


def test_an_error_is_one_line_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: ServeSettings) -> int:
        raise LoadFailed("the disk is full")

    monkeypatch.setattr("mmcore.server.node.run", run)
    assert main.run(["serve"]) == 1
    assert capsys.readouterr().err == "mmcore: the disk is full\n"


# Inputs of `mmcore infer`

KNOWN = {"INPUT0": "INT32"}


@pytest.mark.parametrize(
    ("text", "known", "name", "datatype", "values"),
    [
        ("[[1, 2]]", KNOWN, "INPUT0", "INT32", [[1, 2]]),
        ("INPUT0=[1]", KNOWN, "INPUT0", "INT32", [1]),
        ("INPUT0:FP32=[1]", KNOWN, "INPUT0", "FP32", [1.0]),
        ("other=[1.5]", KNOWN, "other", "FP64", [1.5]),
        ("other=[1]", KNOWN, "other", "INT64", [1]),
        ("other=[true]", KNOWN, "other", "BOOL", [True]),
        ("3", KNOWN, "INPUT0", "INT32", [3]),
        ("text=hello=world", {}, "text", "BYTES", [b"hello=world"]),
        ('text=["a", "é"]', {"text": "BYTES"}, "text", "BYTES", [b"a", "é".encode()]),
        ("text=12", {"text": "BYTES"}, "text", "BYTES", [b"12"]),
        ("x=[]", {"x": "FP32"}, "x", "FP32", []),
    ],
)
def test_inputs_are_read(text: str, known: dict[str, str], name: str, datatype: str, values: list[Any]) -> None:
    got_name, got_datatype, array = infer.read_input(text, known)
    assert (got_name, got_datatype, array.tolist()) == (name, datatype, values)


def test_inputs_come_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float64))
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    known = {"x": "FP32"}
    assert infer.read_input(f"x=@{tmp_path / 'x.npy'}", known)[2].dtype == np.float32
    assert infer.read_input(f"@{tmp_path / 'x.json'}", known)[2].tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("text", "known", "words"),
    [
        ("[1]", {}, "NAME=DATA"),
        ("[1]", {"a": "FP32", "b": "FP32"}, "a, b"),
        ("a:FLOAT=[1]", {}, "FLOAT"),
        ("a=[1", {}, "a=\\[1|\\[1"),
        ("a=[[1], [2, 3]]", {}, "\\[1\\]"),
        ("a=@/no/such/file.json", {}, "no/such/file"),
        ('a=["x"]', {"a": "FP32"}, "not FP32"),
    ],
)
def test_wrong_inputs_are_usage_errors(text: str, known: dict[str, str], words: str) -> None:
    with pytest.raises(Exception, match=words) as error:
        infer.read_input(text, known)
    assert type(error.value).__name__ == "UsageError"


def test_answers_are_written_as_json() -> None:
    body = encode_infer_response(
        "m",
        "2",
        "",
        [("t", "BYTES", np.array([[b"a", b"\xff"]], dtype=object)), ("x", "FP32", np.array([0.5], np.float32))],
        raw=True,
    )
    joined = b"".join(body) if isinstance(body, list) else body
    assert infer.to_json(decode_infer_response(joined)) == {
        "model_name": "m",
        "model_version": "2",
        "outputs": [
            {"name": "t", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "\\xff"]},
            {"name": "x", "datatype": "FP32", "shape": [1], "data": [0.5]},
        ],
    }
