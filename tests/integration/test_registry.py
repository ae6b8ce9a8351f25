"""``mmcore serve --registry``: with each kind of registry, and with an etcd that is not there or goes away."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.etcds import Etcd, etcdctl, free_port
from tests.serving import ADD_SUB, Serve, command, environment, write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path / "etcd").start()
    yield etcd
    etcd.kill()


def keys(etcd: Etcd, prefix: str) -> list[str]:
    return etcdctl("--endpoints", etcd.endpoint, "get", "--prefix", "--keys-only", prefix).split()


def ask(address: str) -> None:
    tensors = [triton.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    for tensor in tensors:
        tensor.set_data_from_numpy(np.ones((1, 16), np.int32))
    with triton.InferenceServerClient(address) as client:
        assert client.infer("sum", tensors).as_numpy("OUTPUT0").sum() == 32


def test_without_its_etcd_an_instance_ends_soon_and_says_why() -> None:
    url = f"etcd://127.0.0.1:{free_port()}/p"
    started = time.monotonic()
    ended = subprocess.run(
        command("serve", "--grpc-port", "0", "--registry", url), capture_output=True, text=True, env=environment()
    )
    assert time.monotonic() - started < 15
    assert ended.returncode == 1
    assert "cannot connect to etcd" in ended.stderr
    assert f"see --registry {url}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("url", ["redis://x", "sqlite:", "etcd:", "etcd://", "etcd:/no/such/file.json"])
def test_a_wrong_address_is_a_wrong_call(url: str) -> None:
    ended = subprocess.run(command("serve", "--registry", url), capture_output=True, text=True, env=environment())
    assert ended.returncode == 2
    assert "--registry" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_stands_in_a_registry_of_one_machine(serve: Serve, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "sum", ADD_SUB)
    instance = serve(tmp_path / "models", "--registry", f"sqlite:{tmp_path}/registry.db")
    ask(instance.grpc)
    instance.signal()
    assert instance.wait() == 0


def test_inference_goes_on_while_etcd_is_away(serve: Serve, etcd: Etcd, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "sum", ADD_SUB)
    instance = serve(tmp_path / "models", "--registry", f"etcd://{etcd.endpoint}/root/mesh")
    assert {key.split("/")[2] for key in keys(etcd, "root/mesh/")} >= {"store"}
    etcd.stop()
    ask(instance.grpc)
    etcd.start()
    ask(instance.grpc)
    instance.signal()
    assert instance.wait() == 0
    assert "Traceback" not in instance.log_text()
