"""Deployments as files: what an upgrade of the controller would change in pods shows up as a difference here.

``GOLDEN=write pytest tests/unit/controller/test_golden.py`` writes them anew, to be read before they are committed.
"""

from __future__ import annotations

import json
import os

import pytest
import yaml
from kubernetes_validate import validate

from mmcore.controller.deployment import Place, deployment
from mmcore.controller.runtimes import Runtime
from mmcore.controller.serving_config import ServingConfig
from tests.serving import ROOT
from tests.unit.controller.objects import own_runtime, runtime
from tests.unit.controller.test_command_line import shipped

FOLDER = ROOT / "tests/data/deployments"
#: An image by name, so that a release of mmcore changes none of the files.
IMAGE = "mmcoreImage: {name: mmcore, tag: golden}\n"
TLS = "tls: {secretName: model-serving-tls, clientAuth: require}\n"
CUSTOM = runtime(
    "custom",
    builtInAdapter=None,
    grpcEndpoint="unix:///tmp/mm/grpc.sock",
    containers=[{"name": "server", "image": "server:1", "resources": {"limits": {"memory": "1Gi"}}}],
)

CASES: dict[str, tuple[Runtime, str, tuple[str, ...]]] = {
    **{f"shipped-{name}": (item, "", ()) for name, item in shipped().items()},
    "own": (own_runtime(), "", ()),
    "own-tls": (own_runtime(), TLS, ()),
    "custom-plain-metrics": (CUSTOM, TLS + "metrics: {scheme: http}\n", ()),
    "custom-claims": (CUSTOM, "restProxy: {enabled: false}\nmetrics: {enabled: false}\n", ("data", "more")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_deployment_is_what_it_was(name: str) -> None:
    item, config, claims = CASES[name]
    made = deployment(item, ServingConfig.read(IMAGE + config), Place("models", "model-serving-etcd", claims, "mm"), 2)
    validate(made, "1.33", strict=True)
    file = FOLDER / f"{name}.yaml"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(yaml.safe_dump(json.loads(json.dumps(made)), sort_keys=False))
    assert yaml.safe_load(file.read_text()) == made


def test_each_file_has_its_test() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(CASES)
