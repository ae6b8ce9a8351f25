from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmcore._ext.v2codec import decode_infer_response, encode_infer_response
from mmcore.cli import infer, main
from mmcore.config import ServeSettings, TlsFiles, default_capacity
from mmcore.errors import LoadFailed
from tests.certificates import Authority


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
        (["models", "--target", "127.0.0.1"], 2, ["'127.0.0.1'", "HOST:PORT"]),
        (["status", "--target", "http://127.0.0.1:8033"], 2, ["gRPC address", "HOST:PORT"]),
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


@pytest.mark.parametrize(("flags", "text"), [
    (["--workers", "2", "--runtime", "unix:r.sock"], "has one process before it"),
    (["--runtime", "h:1", "--runtime-cert", "CERTIFICATE"], "--runtime-cert and --runtime-key need each other"),
    (["--runtime", "h:1", "--runtime-cert", "CERTIFICATE", "--runtime-key", "KEY"], "which --runtime-ca asks for"),
    (["--runtime-ca", "AUTHORITY"], "--runtime-ca is for a --runtime"),
    (["--runtime", "triton://h:1"], "must have repo=DIR"),
])  # fmt: skip
def test_what_does_not_fit_a_runtime_is_a_usage_error(
    served: list[ServeSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    authority = Authority(tmp_path)
    signed = authority.sign("instance")
    files = {"AUTHORITY": authority.certificate, "CERTIFICATE": signed.certificate, "KEY": signed.key}
    assert main.run(["serve", *(str(files.get(flag, flag)) for flag in flags)]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert served == []


def test_config_says_that_an_address_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["config", "--runtime", "http://host:1/x"]) == 2
    assert "unix:PATH or HOST:PORT" in " ".join(capsys.readouterr().err.split())


def test_a_runtime_is_shown_its_own_certificate_or_that_of_the_instance(
    served: list[ServeSettings], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    ours, apart = authority.sign("instance"), authority.sign("client")
    flags = [
        *("serve", "--runtime", f"triton://h:1?repo={tmp_path}", "--runtime-ca", str(authority.certificate)),
        *("--tls-cert", str(ours.certificate), "--tls-key", str(ours.key), "--tls-client-ca", str(ours.certificate)),
    ]
    assert main.run(flags) == 0
    assert main.run([*flags, "--runtime-cert", str(apart.certificate), "--runtime-key", str(apart.key)]) == 0
    shown = [settings.runtime.own for settings in served if settings.runtime is not None]
    assert shown == [TlsFiles(ours.certificate, ours.key), TlsFiles(apart.certificate, apart.key)]
