"""``mmcore pull`` and a serving instance's own pulls, as processes."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import ADD_SUB, Serve, command, environment
from tests.stores import BUCKET, SECRET, Bucket, Proxy, moto, trickle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with moto() as address:
        made = Bucket(address)
        made.client.create_bucket(Bucket=BUCKET)
        made.put("m/1/model.onnx", b"x" * 200_000)
        made.put("m/config.pbtxt", b"c")
        yield made


@pytest.fixture
def config(tmp_path: Path, bucket: Bucket) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "store").write_text(json.dumps(bucket.entry))
    (folder / "default_s3").write_text(json.dumps(bucket.entry))
    return folder


def pull(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("pull", *args), capture_output=True, text=True, check=False, env=environment(), **options
    )  # type: ignore[call-overload]


def tree(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("place", [["--key", "store", "--path", "m"], [f"s3://{BUCKET}/m"]])
def test_model_comes_into_the_folder(config: Path, tmp_path: Path, place: list[str]) -> None:
    done = pull(*place, tmp_path / "dest", "--storage-config", config)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "dest") == {"1/model.onnx": b"x" * 200_000, "config.pbtxt": b"c"}
    assert "pulled s3://models/m/" in done.stderr
    assert "\x1b" not in done.stderr
    again = pull(*place, tmp_path / "dest", "--storage-config", config)
    assert (again.returncode, again.stderr) == (1, f"mmcore: {tmp_path / 'dest'} is there already\n")


def test_terminal_gets_a_bar(config: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    call = command("pull", f"s3://{BUCKET}/m", tmp_path / "dest", "--storage-config", config)
    with subprocess.Popen(call, stderr=theirs, env=environment(TERM="xterm", COLUMNS="120")) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0, shown
    assert "━".encode() in shown
    assert b"s3://models/m/" in shown


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (["--key", "no", "--path", "m"], "there is no storage entry 'no'; known are: default_s3, store"),
        (["--key", "store", "--path", "no"], "s3://models: no object is called 'no' and none is below 'no/'"),
        ([f"s3://none-{BUCKET}/m"], "there is no such bucket (HTTP 404, NoSuchBucket)"),
        (["ftp://x/m"], "the scheme 'ftp://' is not known"),
        (["/does/not/exist"], "/does/not/exist does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(config: Path, tmp_path: Path, place: list[str], text: str) -> None:
    done = pull(*place, tmp_path / "dest", "--storage-config", config)
    assert done.returncode == 1
    assert text in done.stderr.splitlines()[-1]
    assert SECRET not in done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config"]


@pytest.mark.parametrize("args", [["one"], ["a", "b", "c"], ["a", "b", "--path", "m"]])
def test_wrong_use_is_told(args: list[str]) -> None:
    assert pull(*args).returncode == 2


def test_file_that_cannot_be_written_leaves_nothing(config: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = pull(f"s3://{BUCKET}/m", tmp_path / "dest", "--storage-config", config, preexec_fn=limit)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config"]


def test_interrupt_ends_a_pull_and_leaves_nothing(config: Path, bucket: Bucket, tmp_path: Path) -> None:
    proxy = Proxy(bucket.endpoint.removeprefix("http://"), lambda line: "list-type" not in line)
    stuck = threading.Event()

    def hold(client: socket.socket, answer: bytes) -> None:
        stuck.set()
        trickle(0.05)(client, answer)

    proxy.faults = [hold, hold]
    (config / "slow").write_text(json.dumps({**bucket.entry, "endpoint_url": proxy.address}))
    call = command("pull", "--key", "slow", "--path", "m", tmp_path / "dest", "--storage-config", config)
    # Where the tests run in the background of a shell, they and their children pass interrupts over.
    heeding = ["env", "--default-signal=INT", *call]
    with subprocess.Popen(heeding, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert stuck.wait(30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    proxy.close()
    assert (process.returncode, errors.splitlines()[-1]) == (1, "mmcore: interrupted")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config"]


def test_pvc_and_local_paths(tmp_path: Path) -> None:
    claim = tmp_path / "mounts" / "claim"
    claim.mkdir(parents=True)
    (claim / "model.onnx").write_bytes(b"x")
    (claim / "out").symlink_to("/etc")
    mounts = ["--pvc-mounts", claim.parent]
    assert pull("pvc://claim/model.onnx", tmp_path / "a", *mounts).returncode == 0
    assert pull(claim / "model.onnx", tmp_path / "b").returncode == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == {"model.onnx": b"x"}
    for place, text in (
        ("pvc://claim/out", "a link that leaves"),
        ("pvc://claim/../../x", "is not a path inside"),
        ("pvc://no/x", "the claim 'no' is not mounted at"),
        ("pvc://claim/no", "the claim 'claim' has no 'no'"),
    ):
        done = pull(place, tmp_path / "c", *mounts)
        assert done.returncode == 1
        assert text in done.stderr


def test_registered_model_is_pulled_and_served(config: Path, bucket: Bucket, serve: Serve, tmp_path: Path) -> None:
    bucket.put("addsub/1/model.py", ADD_SUB.encode())
    instance = serve(None, "--storage-config", config, "--model-cache", tmp_path / "cache")

    def ask(*args: object) -> subprocess.CompletedProcess[str]:
        call = command(*args, "--target", instance.grpc)
        return subprocess.run(call, capture_output=True, text=True, check=False, env=environment())

    key = json.dumps({"storage_key": "store"})
    done = ask("models", "register", "sums", "--type", "mt:python", "--path", "addsub", "--key", key)
    assert done.returncode == 0, done.stderr
    numbers = json.dumps([list(range(16))])
    done = ask("infer", "sums", "--input", f"INPUT0={numbers}", "--input", f"INPUT1={numbers}")
    assert done.returncode == 0, done.stderr
    assert "30" in done.stdout
    assert "pulled s3://models/addsub/1/model.py" in instance.log_text()
    assert SECRET not in instance.log_text()
