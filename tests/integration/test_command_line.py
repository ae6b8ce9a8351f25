"""The commands that ask a running instance, as people and scripts call them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serving import FAILING, IDENTITY, Instance, Serve, command, environment, write_model

pytestmark = pytest.mark.slow

WITHIN_S = 60.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "numbers", IDENTITY.replace("DATATYPE", "FP32"))
    write_model(folder, "picture", IDENTITY.replace("DATATYPE", "UINT8").replace("[-1, -1]", "[-1, 2, 2, 3]"))
    write_model(folder, "failing", FAILING)
    return folder


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, models: Path) -> Instance:
    return serve_for_session(models)


def call(instance: Instance | None, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    told = {"MMCORE_TARGET": instance.grpc} if instance is not None else {}
    return subprocess.run(
        command(*args), capture_output=True, text=True, check=False, timeout=WITHIN_S, env=environment(**told, **env)
    )


def told(instance: Instance, *args: object) -> Any:
    done = call(instance, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_infer_takes_files_of_several_kinds(instance: Instance, tmp_path: Path) -> None:
    rows = np.array([[1, 2, 3], [4, 5, 6]], np.float64)
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    (tmp_path / "x.json").write_text(json.dumps(rows.tolist()))
    for ending in ("npy", "csv", "json"):
        [output] = told(instance, "infer", "numbers", "--input", f"@{tmp_path}/x.{ending}")["outputs"]
        assert (output["shape"], output["data"]) == ([2, 3], [1, 2, 3, 4, 5, 6]), ending
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "x.png")
    [output] = told(instance, "infer", "picture", "--input", f"@{tmp_path}/x.png")["outputs"]
    assert (output["shape"], output["data"]) == ([1, 2, 2, 3], [1, 2, 3] * 4)


def test_bench_measures_both_ways(instance: Instance) -> None:
    result = told(instance, "bench", "numbers", "--seconds", "0.5", "--concurrency", "4", "--json")
    assert result["answered"] > 10
    assert result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["failures"] == {}
    result = told(instance, "bench", "numbers", "--seconds", "0.5", "--rate", "40", "--batch", "3", "--json")
    assert result["answered"] + result["not_sent"] == 20
    done = call(instance, "bench", "failing", "--seconds", "0.2")
    assert done.returncode == 1
    assert "failed: INTERNAL" in done.stdout
    assert "seven" in done.stderr


def interruptible() -> None:
    """In a new process: a shell's background jobs, this run may be one, hand down that interrupts are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_status_goes_on_with_watch_until_it_is_interrupted(instance: Instance) -> None:
    watching = subprocess.Popen(
        command("status", "--watch", "--every", "100ms"), stdout=subprocess.PIPE, text=True,
        env=environment(MMCORE_TARGET=instance.grpc), preexec_fn=interruptible,
    )  # fmt: skip
    # One that prints nothing is to fail the test, not to hold it up.
    timer = threading.Timer(WITHIN_S, watching.kill)
    timer.start()
    try:
        assert watching.stdout is not None
        json.loads(watching.stdout.readline())
        told(instance, "infer", "numbers", "--input", "[[1]]")
        ends_at = time.monotonic() + WITHIN_S
        while not (look := json.loads(watching.stdout.readline()))["models"]:
            assert time.monotonic() < ends_at
        assert look["models"][0]["model"] == "numbers"
        assert look["models"][0]["requests_per_s"] > 0
        assert look["instances"][0]["asked"] is True
        watching.send_signal(signal.SIGINT)
        assert watching.wait(WITHIN_S) == 0
    finally:
        timer.cancel()
        watching.kill()
        watching.communicate(timeout=WITHIN_S)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_status_with_watch_is_drawn_on_a_terminal(instance: Instance, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    env = environment(MMCORE_TARGET=instance.grpc, TERM="xterm", COLUMNS="120", LINES="40")
    watching = subprocess.Popen(
        command("status", "--watch", "--every", "100ms"), stdout=theirs, stdin=theirs, env=env,
        preexec_fn=interruptible,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        ends_at = time.monotonic() + WITHIN_S
        while b"REQUESTS/S" not in seen or instance.ready["instance"].encode() not in seen:
            assert select.select([ours], [], [], max(0.0, ends_at - time.monotonic()))[0], seen
            seen += os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        # It may be drawing: a terminal that nobody reads holds it up.
        while watching.poll() is None:
            assert time.monotonic() < ends_at
            if select.select([ours], [], [], 0.02)[0]:
                with contextlib.suppress(OSError):  # it has closed its side
                    os.read(ours, 65536)
        assert watching.returncode == 0
    finally:
        watching.kill()
        watching.wait(WITHIN_S)


def test_every_change_is_told_as_json_if_asked(instance: Instance, models: Path) -> None:
    key = json.dumps({"storage_params": {"type": "local"}})
    flags = ("--type", "python", "--path", models / "numbers", "--key", key)
    registered = told(instance, "models", "register", "r", *flags, "--sync", "--json")
    assert (registered["name"], registered["status"]) == ("r", "LOADED")
    assert told(instance, "vmodels", "set", "v", "r", "--json")["active"] == "r"
    assert told(instance, "vmodels", "--json")[0]["name"] == "v"
    assert told(instance, "vmodels", "delete", "v", "--json") == {"name": "v"}
    assert told(instance, "models", "unregister", "r", "--json") == {"name": "r"}
    assert {one["name"] for one in told(instance, "models", "--json")} >= {"numbers", "picture"}
    assert told(instance, "status", "--json")[0]["id"] == instance.ready["instance"]


def test_a_load_that_is_waited_for_is_told_on_a_terminal(
    instance: Instance, models: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    key = json.dumps({"storage_params": {"type": "local"}})
    flags = ("--type", "python", "--path", models / "numbers", "--key", key, "--sync", "--json")
    env = environment(MMCORE_TARGET=instance.grpc, TERM="xterm", COLUMNS="120", LINES="40")
    loading = subprocess.Popen(
        command("models", "register", "shown", *flags), stdout=subprocess.PIPE, stderr=theirs, text=True, env=env
    )
    os.close(theirs)
    try:
        out, _ = loading.communicate(timeout=WITHIN_S)
        seen = b""
        while select.select([ours], [], [], 0.1)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
    finally:
        loading.kill()
        loading.wait(WITHIN_S)
    assert json.loads(out)["status"] == "LOADED"
    assert b"loading shown" in seen
    told(instance, "models", "unregister", "shown", "--json")


def test_pull_tells_what_it_has_brought(models: Path, tmp_path: Path) -> None:
    done = call(None, "pull", models / "numbers", tmp_path / "here", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [
        {"path": "model.py", "bytes": (models / "numbers/model.py").stat().st_size}
    ]


def test_exit_codes_and_errors_of_one_line(instance: Instance) -> None:
    away = ("--target", "127.0.0.1:9", "--timeout", "5s")
    for args, code, words in (
        (("infer", "nope", "--input", "[1]"), 1, "NOT_FOUND"),
        (("infer", "failing", "--input", "[1]"), 1, "seven"),
        (("infer", "numbers", "--input", "@/no/such.csv"), 2, "no/such.csv"),
        (("infer", "numbers", "--no-such"), 2, "--no-such"),
        (("models", "register", "x"), 2, "--type"),
        (("models", *away), 1, "mmcore serve"),
        (("status", "--watch", *away), 1, "mmcore serve"),
        (("bench", "numbers", *away), 1, "mmcore serve"),
        (("completion", "tcsh"), 2, "tcsh"),
    ):
        done = call(instance, *args)
        assert done.returncode == code, (args, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        if code == 1:
            assert len(done.stderr.splitlines()) <= 2


def test_a_shell_completes_commands_options_and_models(instance: Instance) -> None:
    def completed(words: str, target: str = instance.grpc) -> list[str]:
        env = {"_MMCORE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        # The name of the program is what the shell calls it by.
        argv = [str(Path(sys.executable).with_name("mmcore"))]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=True, timeout=WITHIN_S,
            env=environment(MMCORE_TARGET=target, **env),
        )  # fmt: skip
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("mmcore st") == ["status"]
    assert "--watch" in completed("mmcore status --w")
    assert completed("mmcore infer num") == ["numbers"]
    assert completed("mmcore infer num", target="no address") == [""]
    for shell in ("bash", "zsh", "fish"):
        done = call(None, "completion", shell)
        assert (done.returncode, "_MMCORE_COMPLETE" in done.stdout) == (0, True), done.stderr
