"""model-serving-config: defaults, merging, and what is said of what cannot be used."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import yaml

import mmcore
from mmcore.controller import serving_config
from mmcore.controller.serving_config import ConfigError, ServingConfig
from tests.serving import ROOT

SOURCE = inspect.getsource(serving_config)


def test_without_a_configuration_everything_has_its_default() -> None:
    config = ServingConfig.read()
    assert config == ServingConfig()
    assert (config.service_name, config.grpc_port, config.rest_port) == ("modelmesh-serving", 8033, 8008)
    assert (config.pods_per_runtime, config.scale_to_zero, config.grace_s) == (2, True, 60)
    assert config.image == f"mmcore:{mmcore.__version__}"


def test_keys_are_known_in_any_case_and_names_of_labels_keep_theirs() -> None:
    config = ServingConfig.read(
        "PodsPerRuntime: 3\nSCALETOZERO: {Enabled: false}\nruntimePodLabels: {example.com/Team: A.b}\n"
    )
    assert (config.pods_per_runtime, config.scale_to_zero) == (3, False)
    assert config.pod_labels == {"example.com/Team": "A.b"}


def test_a_users_file_goes_before_the_defaults() -> None:
    config = ServingConfig.read(
        "podsPerRuntime: 3\nrestProxy: {enabled: false, port: 9}", "restProxy: {enabled: true}\n"
    )
    assert (config.pods_per_runtime, config.rest_port) == (3, 9)
    assert ServingConfig.read("restProxy: {enabled: false}").rest_port is None


def test_a_tag_of_the_user_ends_a_digest_of_the_defaults() -> None:
    defaults = "mmcoreImage: {name: mine, digest: 'sha256:1'}"
    assert ServingConfig.read(defaults).image == "mine@sha256:1"
    assert ServingConfig.read(defaults, "mmcoreImage: {tag: v2}").image == "mine:v2"


def test_an_image_with_a_port_in_its_name() -> None:
    assert ServingConfig.read("mmcoreImage: {name: 'host:5000/mmcore', tag: v2}").image == "host:5000/mmcore:v2"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("podsPerRuntime: many", "podsperruntime must be a whole number"),
        ("podsPerRuntime: true", "podsperruntime must be a whole number"),
        ("podsPerRuntime: -1", "must not be negative"),
        ("inferenceServicePort: 70000", "must be a port"),
        ("metrics: {port: 8033}", "must differ"),
        ("metrics: {scheme: ftp}", "metrics.scheme must be http or https"),
        ("tls: {clientAuth: sometimes}", "must be one of optional, require"),
        ("mmcoreResources: {limits: {memory: lots}}", "mmcoreResources.limits.memory"),
        ("- a", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("internalModelMeshEnvVars: [A]", "list of name and value"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ServingConfig.read(text)


@pytest.mark.parametrize(
    ("text", "metrics"),
    [
        ("tls: {secretName: s}", True),
        ("tls: {secretName: s}\nmetrics: {scheme: https}", True),
        ("tls: {secretName: s}\nmetrics: {scheme: http}", False),
    ],
)
def test_metrics_are_over_tls_where_the_rest_is_unless_they_are_to_be_plain(text: str, metrics: bool) -> None:
    assert ServingConfig.read(text).metrics_tls is metrics


def test_tls_settings_without_a_secret_have_no_effect_and_say_so() -> None:
    config = ServingConfig.read("tls: {clientAuth: require}\nmetrics: {scheme: https}")
    assert not config.metrics_tls
    assert [one for one in config.notices if one.startswith("tls.clientAuth has no effect without tls.secretName")]


def test_what_has_no_effect_any_more_is_told() -> None:
    config = ServingConfig.read(
        "modelMeshImage: {name: kserve/modelmesh}\nrestProxy: {image: {name: x}}\nmetrics: {scheme: https}\nnope: 1\n"
    )
    told = "\n".join(config.notices)
    for name in ("modelmeshimage", "restProxy.image", "metrics.scheme", "nope has no effect: it is not known"):
        assert name in told
    assert config.image == ServingConfig().image


def test_the_documentation_names_every_key_and_its_default() -> None:
    table = re.findall(r"^\| (`[A-Za-z.`, ]+`) \| `?([^|`]+)`? \|", (ROOT / "docs/kubernetes.md").read_text(), re.M)
    keys: list[str] = []
    for named, default in table:
        for key in re.findall(r"`([A-Za-z.]+)`", named):
            whole = key if not key.startswith(".") else keys[-1].rpartition(".")[0] + key
            keys.append(whole)
            if re.fullmatch(r"[a-z-]+|[0-9]+|\[.*\]", default) and default != "none":
                value: Any = yaml.safe_load(default)
                for part in reversed(whole.split(".")):
                    value = {part: value}
                assert ServingConfig.read(yaml.safe_dump(value)) == ServingConfig(), key
    read = set(
        re.findall(r"\.(?:text|flag|whole|port|texts|mapping|choice|take)\(\"([a-z]+)\"|\bport\(\"([a-z]+)\"", SOURCE)
    )
    leaves = {key.rpartition(".")[2].lower() for key in keys}
    # Sections hold keys of their own; an image and the lists are read by names of their own.
    assert {one or other for one, other in read} - {"mmcoreresources"} <= leaves
    assert {"mmcoreresources", "imagepullsecrets", "internalmodelmeshenvvars"} <= leaves
