"""Registered models in running instances: over restarts, from a store, from files, and through the commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from mmcore.cli import main
from mmcore.pb import model_mesh_pb2 as pb
from tests.management import BROKEN, SCALE, WITHIN_S, Manager, States, files, scale
from tests.serving import Instance, Serve, command, environment
from tests.stores import Bucket, Proxy, Stall, moto

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "files"


def start(serve: Serve, tmp_path: Path, *args: object) -> Instance:
    return serve(None, "--model-cache", tmp_path / "cache", *args)


def ask(instance: Instance, model: str, within_s: float = WITHIN_S) -> float:
    x = triton.InferInput("X", [1], "FP32")
    x.set_data_from_numpy(np.ones(1, np.float32))
    with triton.InferenceServerClient(instance.grpc) as client:
        answer = client.infer(model, [x], client_timeout=within_s).as_numpy("Y")
    assert answer is not None
    return float(answer[0])


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=60, env=environment(), check=False)


class Shell:
    """Runs commands in this process, which spares the start of one for each."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    def __call__(self, instance: Instance, *args: object) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        code = main.run([*map(str, args), "--target", instance.grpc])
        return code, *self._captured.readouterr()

    def listed(self, instance: Instance, *args: object) -> list[dict[str, Any]]:
        code, out, errors = self(instance, *args, "--json")
        assert code == 0, errors
        rows: list[dict[str, Any]] = json.loads(out)
        return rows


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_registrations_outlive_the_instance(
    serve: Serve, tmp_path: Path, root: Path, shell: Shell, number: signal.Signals
) -> None:
    count = 1000 if number is signal.SIGKILL else 10
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    first = start(serve, tmp_path, "--registry", registry)
    with Manager(first.grpc) as manager, ThreadPoolExecutor(16) as pool:
        info = scale(root, 2)
        for status in pool.map(lambda one: manager.register(f"model-{one}", info), range(count)):
            assert status.status == States.NOT_LOADED
        manager.set_vmodel("latest", "model-0", loadNow=True, sync=True)
    assert ask(first, "latest") == 2.0
    first.signal(number)
    first.wait()

    second = start(serve, tmp_path, "--registry", registry)
    assert second.ready["models"] == count
    rows = shell.listed(second, "models", "--limit", 0)
    assert sorted(row["name"] for row in rows) == sorted(f"model-{one}" for one in range(count))
    with Manager(second.grpc) as manager:
        # The copies of the instance that is gone are not told of.
        assert manager.status("model-0") == pb.ModelStatusInfo(status=States.NOT_LOADED)
        assert manager.vmodel_status("latest").activeModelId == "model-0"
        assert ask(second, "latest") == 2.0
        (copy,) = manager.status("model-0").modelCopyInfos
        assert (copy.location, copy.copyStatus) == (second.ready["instance"], States.LOADED)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with moto() as address:
        made = Bucket(address)
        made.client.create_bucket(Bucket=made.entry["bucket"])
        yield made


def test_a_model_in_a_bucket_is_registered_asked_and_unregistered(serve: Serve, tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("scale/model.py", SCALE.replace("FACTOR", "7").encode())
    entries = tmp_path / "storage-config"
    entries.mkdir()
    (entries / "localMinIO").write_text(json.dumps(bucket.entry))
    instance = start(serve, tmp_path, "--storage-config", entries)
    key = json.dumps({"storage_key": "localMinIO", "model_type": {"name": "python"}})
    with Manager(instance.grpc) as manager:
        assert (
            manager.register("scale", pb.ModelInfo(type="mt:python", path="scale", key=key)).status == States.NOT_LOADED
        )
        assert ask(instance, "scale") == 7.0
        absent = pb.ModelInfo(type="mt:python", path="absent", key=key)
        failed = manager.register("absent", absent, loadNow=True, sync=True)
        assert failed.status == States.LOADING_FAILED
        assert "absent" in failed.errors[0]
        manager.unregister("scale")
        with pytest.raises(InferenceServerException, match="is not found"):
            ask(instance, "scale")


def test_the_deadline_of_a_request_ends_the_download_it_waits_for(serve: Serve, tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("slow/model.py", SCALE.replace("FACTOR", "7").encode())
    bucket.put("slow/weights", os.urandom(400_000))
    proxy = Proxy(bucket.endpoint.removeprefix("http://"), lambda line: "/slow/weights" in line)
    proxy.faults = [stall := Stall(300_000)]
    entries = tmp_path / "storage-config"
    entries.mkdir()
    (entries / "slow").write_text(json.dumps({**bucket.entry, "endpoint_url": proxy.address}))
    instance = start(serve, tmp_path, "--storage-config", entries)
    with Manager(instance.grpc) as manager:
        manager.register("slow", pb.ModelInfo(type="mt:python", path="slow", key='{"storage_key": "slow"}'))
        with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
            ask(instance, "slow", within_s=3.0)
        assert stall.begun.is_set()
        # The store would say nothing for longer than a pull waits for it.
        assert stall.left.wait(20)
        deadline = time.monotonic() + WITHIN_S
        while manager.status("slow").status != States.NOT_LOADED:
            assert time.monotonic() < deadline
    # Who comes then is brought what is missing.
    assert ask(instance, "slow") == 7.0
    told = re.search(r"pulled s3://models/slow/model.py: 2 files, (\d+) bytes", instance.log_text())
    assert told is not None
    assert int(told[1]) < 200_000
    proxy.close()


def entry(name: str, info: pb.ModelInfo, **fields: Any) -> dict[str, Any]:
    return {"modelId": name, "modelInfo": {"type": info.type, "path": info.path, "key": info.key}, **fields}


def test_static_models_are_there_when_the_instance_is_and_follow_their_file(
    serve: Serve, tmp_path: Path, root: Path
) -> None:
    file = tmp_path / "static.json"
    file.write_text(
        json.dumps([entry("a", scale(root, 2), vModelId="v", ensureLoaded=True), entry("b", scale(root, 3))])
    )
    instance = start(serve, tmp_path, "--static-models", file)
    with Manager(instance.grpc) as manager:
        assert (manager.state("a"), manager.state("b")) == ("LOADED", "NOT_LOADED")
        assert (ask(instance, "v"), ask(instance, "b")) == (2.0, 3.0)
        file.write_text(json.dumps([entry("c", scale(root, 4), vModelId="v")]))
        deadline = time.monotonic() + WITHIN_S
        while manager.vmodel_status("v").activeModelId != "c":
            assert time.monotonic() < deadline
        assert ask(instance, "v") == 4.0
        # "a" went with the vmodel's transition, "b" since it is in the file no more.
        while (manager.state("a"), manager.state("b")) != ("NOT_FOUND", "NOT_FOUND"):
            assert time.monotonic() < deadline


def test_a_static_model_that_must_be_loaded_and_is_not_ends_the_start(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "static.json"
    file.write_text(json.dumps([entry("broken", files(root, "broken", BROKEN), ensureLoaded=True)]))
    ended = run(
        "serve", "--grpc-port", 0, "--rest-port", 0, "--model-cache", tmp_path / "cache", "--static-models", file
    )
    assert ended.returncode == 1
    assert "static model broken: " in ended.stderr
    assert "the weights are missing" in ended.stderr


@pytest.mark.parametrize(
    ("flag", "content", "text"),
    [
        ("--static-models", "{}", "expected a list of models"),
        ("--dataplane-config", '{"rpcs": {}}', "unknown field 'rpcs'"),
        ("--type-constraints", "[]", "must be an object of types"),
    ],
)
def test_files_that_say_what_cannot_be_end_the_start(tmp_path: Path, flag: str, content: str, text: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(content)
    ended = run("serve", "--grpc-port", 0, "--rest-port", 0, flag, file)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert text in ended.stderr
    assert "settings.json" in ended.stderr


def test_a_registry_that_is_none_is_wrong_usage() -> None:
    ended = run("serve", "--grpc-port", 0, "--rest-port", 0, "--registry", "file:x")
    assert ended.returncode == 2
    assert "'file:x' is not a registry" in ended.stderr


def test_the_commands(serve: Serve, tmp_path: Path, root: Path, shell: Shell) -> None:
    instance = start(serve, tmp_path)
    two, broken = scale(root, 2), files(root, "broken", BROKEN)

    def stated(info: pb.ModelInfo) -> tuple[str, ...]:
        return ("--type", info.type, "--path", info.path, "--key", info.key)

    def output(*args: object) -> str:
        code, out, errors = shell(instance, *args)
        assert (code, errors) == (0, "")
        return out

    def refused(*args: object) -> str:
        code, _, errors = shell(instance, *args)
        assert code == 1
        return errors

    assert "serves no models" in output("models")
    assert "knows no vmodels" in output("vmodels")
    assert output("models", "register", "a", *stated(two)) == "a: NOT_LOADED\n"
    assert output("models", "register", "b", *stated(two), "--sync") == "b: LOADED\n"
    assert "the weights are missing" in refused("models", "register", "c", *stated(broken), "--sync")
    assert shell(instance, "models", "register", "d")[0] == 2

    rows = {row["name"]: row for row in shell.listed(instance, "models")}
    assert [(name, rows[name]["status"]) for name in sorted(rows)] == [
        ("a", "NOT_LOADED"), ("b", "LOADED"), ("c", "LOADING_FAILED"),
    ]  # fmt: skip
    (copy,) = rows["b"]["copies"]
    assert (copy["instance"], copy["state"]) == (instance.ready["instance"], "LOADED")
    assert (rows["b"]["type"], rows["b"]["state"], rows["c"]["state"]) == ("python", "READY", "UNAVAILABLE")
    table = output("models")
    assert "COPIES" in table
    assert f"{instance.ready['instance']} LOADED" in table
    assert "the weights are missing" in table
    assert "and 2 more" in shell(instance, "models", "--limit", 1)[2]
    assert [row["name"] for row in shell.listed(instance, "models", "--prefix", "c")] == ["c"]

    assert output("vmodels", "set", "v", "b", "--owner", "me") == "v: DEFINED, stands for b\n"
    assert output("vmodels", "set", "v", "e", *stated(two), "--sync") == "v: DEFINED, stands for e\n"
    (row,) = shell.listed(instance, "vmodels")
    assert (row["name"], row["active"], row["target"], row["owner"]) == ("v", "e", "e", "me")
    assert "different owner 'me' (ALREADY_EXISTS)" in refused("vmodels", "set", "v", "b", "--owner", "you")
    assert "the weights are missing" in refused("vmodels", "set", "v", "c", "--sync")
    shown = output("vmodels")
    assert "TRANSITION_FAILED" in shown
    assert "the weights are missing" in shown
    assert shell(instance, "vmodels", "set", "v", "b", "--path", "/x")[0] == 2
    assert "Model e has referents (FAILED_PRECONDITION)" in refused("models", "unregister", "e")
    output("vmodels", "delete", "v")
    output("models", "unregister", "e")
    assert shell.listed(instance, "vmodels") == []

    (here,) = shell.listed(instance, "status")
    assert (here["id"], here["models"], here["leader"], here["asked"]) == (instance.ready["instance"], 1, True, True)
    assert 0 < here["used_bytes"] < here["capacity_bytes"]
    assert "leader" in output("status")
