"""An instance before OpenVINO Model Server: here before what stands in for it, see tests/ovms_server.py."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from bench.peers.served import free_ports
from mmcore.pb import model_mesh_pb2 as pb
from tests.certificates import Authority
from tests.serving import Serve
from tests.toy_processes import Front, StandIn, refused, request

pytestmark = pytest.mark.slow

INFER = "/inference.GRPCInferenceService/ModelInfer"


class Ovms(StandIn):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        ports = free_ports(2)
        self.grpc, self.rest = (f"127.0.0.1:{port}" for port in ports)
        self.repository = folder / "models"
        self.config = folder / "config.json"
        self.address = f"ovms://{self.grpc}?repo={self.repository}&rest={ports[1]}&config={self.config}"

    def start(self, *tls: object) -> None:
        self.run("tests.ovms_server", self.grpc, self.rest, str(self.config), *map(str, tls))

    @property
    def readings(self) -> list[str]:
        """The names in the file each time that it was read."""
        with urllib.request.urlopen(f"http://{self.rest}/log", timeout=10) as answer:
            found: list[str] = json.load(answer)["log"]
            return found

    @property
    def names(self) -> list[str]:
        entries = json.loads(self.config.read_text())["model_config_list"]
        return [entry["config"]["name"] for entry in entries]


@pytest.fixture
def ovms(tmp_path: Path) -> Iterator[Ovms]:
    ovms = Ovms(tmp_path)
    ovms.start()
    yield ovms
    ovms.kill()


Start = Callable[..., Front]


@pytest.fixture
def front(serve: Serve, ovms: Ovms, tmp_path: Path) -> Iterator[Start]:
    fronts: list[Front] = []

    def start(*args: object) -> Front:
        (tmp_path / "files").mkdir(exist_ok=True)
        fronts.append(Front(serve(None, "--runtime", ovms.address, *args), tmp_path / "files"))
        return fronts[-1]

    yield start
    for one in fronts:
        one.close()


def test_a_model_is_answered_for_when_the_server_says_that_it_is_there(front: Start, ovms: Ovms) -> None:
    mesh = front()
    mesh.register("m", "net.onnx", load=True)
    # It was there before the load was acknowledged.
    assert ovms.readings[-1] == "m"
    assert mesh.infer("m").model_name == "m"
    assert [str(one.relative_to(ovms.repository)) for one in sorted(ovms.repository.rglob("*"))] == [
        "m", "m/1", "m/1/model.onnx",
    ]  # fmt: skip
    mesh.client.set_vmodel("alias", "m")
    assert mesh.infer("alias").model_name == "m"


def test_a_server_that_does_not_start_without_its_file_is_given_one_and_is_reached_over_tls(
    serve: Serve, tmp_path: Path
) -> None:
    ovms = Ovms(tmp_path)
    authority = Authority(tmp_path)
    signed = authority.sign("ovms", "IP:127.0.0.1")
    with futures.ThreadPoolExecutor() as threads:
        instance = threads.submit(serve, None, "--runtime", ovms.address, "--runtime-ca", authority.certificate)
        try:
            ends_at = time.monotonic() + 20
            while not ovms.config.exists():
                assert time.monotonic() < ends_at and not instance.done()
                time.sleep(0.01)
            assert ovms.names == []
            ovms.start(signed.certificate, signed.key)
            mesh = Front(instance.result(30), tmp_path)
            mesh.register("m", "net.onnx", load=True)
            assert mesh.infer("m").model_name == "m"
            mesh.close()
        finally:
            ovms.kill()


def test_loads_that_come_together_are_read_together_and_one_that_fails_harms_no_other(front: Start, ovms: Ovms) -> None:
    mesh = front()
    names = [f"m{number}" for number in range(6)]
    before = len(ovms.readings)
    for name in names:
        mesh.register(name, f"slow-{name}.xml")
    mesh.register("bad", "broken-net.xml")
    infer = mesh.channel.unary_unary(INFER)
    calls = [infer.future(request(name), timeout=30) for name in names]
    code, text = refused(lambda: mesh.infer("bad"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "Cannot compile model into target device" in text
    assert all(call.result() for call in calls)
    # One that they began with, one for those that came meanwhile, and what takes the failed one out.
    assert len(ovms.readings) - before <= 4
    assert set(ovms.names) == set(names)
    assert not (ovms.repository / "bad").exists()


def test_an_evicted_model_has_left_the_server_before_its_folder_goes(front: Start, ovms: Ovms) -> None:
    mesh = front("--capacity", "2500000", "--min-residency", "0", "--eviction", "lru")
    for name in ("a", "b", "c", "a"):
        if name not in ovms.names:
            (mesh.files / f"{name}.onnx").write_bytes(b"weights")
            info = pb.ModelInfo(type="onnx", path=str(mesh.files / f"{name}.onnx"))
            mesh.client.register(name, info)
        assert mesh.infer(name).model_name == name
    assert [mesh.client.state(name) for name in ("a", "b", "c")] == ["LOADED", "NOT_LOADED", "LOADED"]
    assert sorted(entry.name for entry in ovms.repository.iterdir()) == ["a", "c"]


def test_a_killed_server_that_comes_back_with_an_old_file_is_emptied_and_refilled(front: Start, ovms: Ovms) -> None:
    mesh = front()
    for name in ("m", "n"):
        mesh.register(name, f"{name}.onnx", load=True)
    ovms.kill()
    ovms.start()
    assert mesh.infer("m").model_name == "m"
    assert mesh.infer("n").model_name == "n"
    # What it found in the file at its start, then nothing, then what it is to have.
    assert ovms.readings[:2] == ["m n", ""]
