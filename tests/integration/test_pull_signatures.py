"""Pulling from an S3 server that checks signatures (rclone's), with keys from the entry, the chain, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Puller, StorageConfig
from mmcore.storage.transfer import PullLimits
from tests.stores import BUCKET, SECRET

pytestmark = pytest.mark.slow

KEY = "AKIASIGNED"


BODY = os.urandom(17 * 2**20)


@contextlib.contextmanager
def rclone(folder: Path, *options: object) -> Iterator[int]:
    """The port of a server of the folder's buckets."""
    (folder / BUCKET / "m").mkdir(parents=True, exist_ok=True)
    (folder / BUCKET / "m" / "model.onnx").write_bytes(BODY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = ("127.0.0.1", free.getsockname()[1])
    beside = Path(sys.executable).parent / "rclone"
    call = [beside if beside.exists() else shutil.which("rclone"), "serve", "s3", "--config", "/dev/null"]
    call += ["--addr", f"127.0.0.1:{address[1]}", "--auth-key", f"{KEY},{SECRET}", *options, folder]
    with subprocess.Popen(call, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    socket.create_connection(address, 1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            yield address[1]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rclone(tmp_path_factory.mktemp("rclone")) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    limits = PullLimits(connect_s=5, silence_s=10, tries=2, pause_s=0.01)
    made = Puller(StorageConfig(None), DiskCache(tmp_path / "cache", 10**9), limits=limits)
    yield made
    made.close()


def info(endpoint: str, **params: str) -> ModelInfo:
    stated = {"type": "s3", "bucket": BUCKET, "endpoint_url": endpoint, "region": "us-east-1", **params}
    return ModelInfo("", "m", json.dumps({"storage_params": stated}))


def test_ranges_come_although_they_are_answered_200(endpoint: str, puller: Puller) -> None:
    pulled = puller.pull(info(endpoint, access_key_id=KEY, secret_access_key=SECRET))
    assert (pulled.path / "model.onnx").read_bytes() == BODY
    assert puller.received_bytes == len(BODY)


def test_signatures_hold_for_names_of_any_kind(puller: Puller, tmp_path: Path) -> None:
    names = ["a b+c=d&e.onnx", "größe~%41!'()*.onnx", "[x]{y}|^`.onnx", "$:@,;?#.onnx", "model.onnx"]
    folder = tmp_path / "served" / BUCKET / "m"
    folder.mkdir(parents=True)
    for name in names[:-1]:
        (folder / name).write_bytes(name.encode())
    with rclone(tmp_path / "served") as port:
        stated = info(f"http://127.0.0.1:{port}", access_key_id=KEY, secret_access_key=SECRET)
        pulled = puller.pull(stated)
        # The first listing is botocore's, and the others are ours.
        assert puller.pull(stated).path == pulled.path
        alone = puller.pull(replace(stated, path="m/" + names[0]))
    assert {path.name for path in alone.path.iterdir()} == {names[0]}
    assert {path.name for path in pulled.path.iterdir()} == set(names)
    assert all((pulled.path / name).read_bytes() == name.encode() for name in names[:-1])


def test_keys_come_from_the_default_chain(endpoint: str, puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert (puller.pull(info(endpoint)).path / "model.onnx").exists()


def test_without_any_keys_it_says_what_to_give(endpoint: str, puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(LoadFailed, match=r"no credentials: .* default chain finds none .* 'anonymous': 'true'"):
        puller.pull(info(endpoint))


@pytest.mark.parametrize(
    ("key", "secret", "code"),
    [(KEY, "wr0ng-secret", "SignatureDoesNotMatch"), ("AKIAOTHER", SECRET, "InvalidAccessKeyId")],
)
def test_wrong_keys_are_refused_and_not_shown(endpoint: str, puller: Puller, key: str, secret: str, code: str) -> None:
    with pytest.raises(LoadFailed, match=rf"refuses the credentials.*{code}") as raised:
        puller.pull(info(endpoint, access_key_id=key, secret_access_key=secret))
    assert secret not in repr(raised.value)
    assert key not in repr(raised.value)


def test_half_a_pair_of_keys_is_refused(endpoint: str, puller: Puller) -> None:
    with pytest.raises(LoadFailed, match="go together"):
        puller.pull(info(endpoint, access_key_id=KEY))


def test_store_with_a_ca_of_its_own_is_trusted_by_its_certificate(puller: Puller, tmp_path: Path) -> None:
    ca = trustme.CA()
    certificate = ca.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    options = ("--cert", tmp_path / "both.pem", "--key", tmp_path / "both.pem")
    keys = {"access_key_id": KEY, "secret_access_key": SECRET}
    with rclone(tmp_path / "served", *options) as port:
        store = info(f"https://localhost:{port}", **keys, certificate=ca.cert_pem.bytes().decode())
        assert (puller.pull(store).path / "model.onnx").read_bytes() == BODY
        with pytest.raises(LoadFailed, match=r"certificate is not trusted; give its CA as 'certificate'"):
            puller.pull(info(f"https://localhost:{port}", **keys))
