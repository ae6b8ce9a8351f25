"""What pods pass to ``mmcore serve`` is what it takes: every variable is an option, and together they start it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml

from mmcore.adapters import open_runtime
from mmcore.cli import main
from mmcore.cli.serve import command
from mmcore.config import ServeSettings
from mmcore.controller.deployment import CONSTRAINTS_MAP, ETCD_KEY, Place, deployment
from mmcore.controller.mesh_manifests import constraints_map
from mmcore.controller.objects import CLUSTER_SERVING_RUNTIME
from mmcore.controller.runtimes import Runtime, problems
from mmcore.controller.serving_config import ServingConfig
from tests.etcds import free_port
from tests.pods import instance_of, mounted, variables
from tests.serving import ROOT
from tests.unit.controller.objects import runtime

CONFIGS = {
    "as it comes": "",
    "nothing but gRPC": "restProxy: {enabled: false}\nmetrics: {enabled: false}\n",
    "TLS": "tls: {secretName: tls, clientAuth: require}\n",
    "everything": "tls: {secretName: tls, clientAuth: optional}\nenableAccessLogging: true\n"
    "internalModelMeshEnvVars: [{name: MMCORE_MIN_RESIDENCY, value: 5s}]\n",
}
CUSTOM = runtime("custom", builtInAdapter=None, grpcEndpoint="unix:///tmp/mm/grpc.sock")


def shipped() -> dict[str, Runtime]:
    """The runtimes of ``deploy/runtimes``, by name."""
    found = {}
    for file in sorted((ROOT / "deploy/runtimes/cluster").glob("*.yaml")):
        item = yaml.safe_load(file.read_text())
        if item["kind"] == CLUSTER_SERVING_RUNTIME.name:
            item["metadata"]["uid"] = "1"
            found[item["metadata"]["name"]] = Runtime.of(item, CLUSTER_SERVING_RUNTIME)
    return found


APART = runtime("apart", builtInAdapter=None, grpcEndpoint="port:8085", grpcDataEndpoint="port:8001")
RUNTIMES = shipped() | {"custom": CUSTOM, "apart": APART}
Start = Callable[[Runtime, str], ServeSettings]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """The settings that a runtime's instance starts with: its command line is really read, and nothing served."""
    seen: list[ServeSettings] = []

    def run(settings: ServeSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("mmcore.server.node.run", run)

    def started(item: Runtime, text: str) -> ServeSettings:
        config = ServingConfig.read(text)
        made = deployment(item, config, Place("models", "etcd", ("claim",)), 1)
        files = {
            CONSTRAINTS_MAP: dict.fromkeys(constraints_map(config, "models", [item])["data"], b"{}"),
            "etcd": {ETCD_KEY: b'{"endpoints": "http://127.0.0.1:1"}'},
            "tls": {"tls.crt": b"", "tls.key": b""},
        }
        container = instance_of(made)
        for name, value in variables(container, mounted(made, tmp_path, files), "10.0.0.1").items():
            monkeypatch.setenv(name, value)
        assert main.run(container["args"]) == 0
        return seen[-1]

    return started


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", RUNTIMES)
def test_an_instance_starts_with_what_its_pod_says(name: str, config: str, start: Start) -> None:
    item = RUNTIMES[name]
    assert problems(item, ServingConfig()) == []
    settings = start(item, CONFIGS[config])
    assert (settings.grpc_port, settings.peer_port, settings.advertise) == (8033, 8043, "10.0.0.1")
    assert item.label in settings.labels and settings.vmodel_owner == "ksp"
    assert (settings.runtime is None) == (not item.containers)
    if settings.runtime is not None:
        open_runtime(settings.runtime.address)
        assert settings.runtime.capacity_bytes
    assert (settings.tls is not None) == ("tls" in CONFIGS[config])
    assert settings.log_requests == ("AccessLogging" in CONFIGS[config])


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_variable_is_an_option(name: str) -> None:
    options = {one.envvar for one in command.params if isinstance(one, click.Option)}
    made = deployment(RUNTIMES[name], ServingConfig.read(CONFIGS["TLS"]), Place("models", "etcd"), 1)
    stated = {entry["name"] for entry in instance_of(made)["env"]}
    assert stated - options == {"POD_IP"}


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_controller_without_its_client_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.aio", None)
    assert main.run(["controller", "--probe-port", str(free_port())]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "pip install 'mmcore[controller]'" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
