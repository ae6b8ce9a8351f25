"""The configuration of a whole installation: the ConfigMap ``model-serving-config``, key ``config.yaml``.

Keys, defaults and their merging are those of the archived controller; what its other containers needed (a router, a
puller and a REST proxy of their own) is told as :attr:`ServingConfig.notices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

import mmcore
from mmcore.controller.objects import Object
from mmcore.controller.quantities import quantity
from mmcore.errors import InvalidSetting

CONFIG_MAP_NAME: Final = "model-serving-config"
CONFIG_KEY: Final = "config.yaml"
#: The key of the map of defaults, whose name ends in ``-defaults``.
DEFAULTS_KEY: Final = "config-defaults.yaml"
#: The secret of TLS that the shipped roles let the controller read.
TLS_SECRET: Final = "model-serving-tls"  # noqa: S105  # a name

#: Keys that meant something to the archived release and have nothing left to act upon, and why.
_WITHOUT_EFFECT: Final = {
    "modelmeshimage": "instances run the image of mmcoreImage",
    "modelmeshresources": "instances are sized by mmcoreResources, or by the runtime's container 'mmcore'",
    "storagehelperimage": "instances pull models themselves",
    "storagehelperresources": "instances pull models themselves",
    "etcdsecretname": "the secret is named by --etcd-secret",
    "payloadprocessors": "say MMCORE_PAYLOAD_LOG in internalModelMeshEnvVars: a file, or where CloudEvents go",
}
_REST_WITHOUT_EFFECT: Final = {
    "image": "instances serve REST themselves",
    "resources": "instances serve REST themselves",
    "skipverify": "REST and gRPC are one process",
}


class ConfigError(InvalidSetting):
    """The configuration cannot be used; the text names the key."""


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """What the keys of the file say; attributes that are not explained are named as they are.

    Attributes:
        image: the image of instances, by digest where one is given.
        resources: ``requests`` and ``limits`` of an instance beside another server's containers.
        grpc_port, rest_port, metrics_port: ports of the Service and of its pods; None serves no REST.
        pods_per_runtime: replicas of runtimes that state none.
        scale_to_zero: whether runtimes without models are scaled to zero.
        grace_s: how long one without models keeps its pods.
        environment: more variables of instances; those that the controller sets go before.
        endpoint: asks instances for their management at this address instead of at their pods'.
        tls_secret: the secret with ``tls.crt``, ``tls.key`` and perhaps ``ca.crt``; empty: plain text.
        tls_client_auth: ``require`` takes only clients with a certificate.
        metrics_tls: whether metrics and probes are served over TLS too.
        notices: what of the file has no effect, each with the reason.
    """

    service_name: str = "modelmesh-serving"
    grpc_port: int = 8033
    rest_port: int | None = 8008
    metrics_port: int = 2112
    metrics: bool = True
    service_monitor: bool = True
    storage_secret: str = "storage-config"  # noqa: S105  # a name
    pods_per_runtime: int = 2
    headless: bool = True
    tls_secret: str = ""
    tls_client_auth: str = ""
    metrics_tls: bool = False
    access_log: bool = False
    service_account: str = ""
    scale_to_zero: bool = True
    grace_s: int = 60
    max_message_bytes: int = 16777216
    image: str = f"mmcore:{mmcore.__version__}"
    resources: Object = field(
        default_factory=lambda: {
            "requests": {"cpu": "300m", "memory": "256Mi"},
            "limits": {"cpu": "3", "memory": "1Gi"},
        }
    )
    server_types: tuple[str, ...] = ("mmcore", "triton", "mlserver", "ovms", "torchserve")
    pod_labels: Mapping[str, str] = field(default_factory=dict)
    pod_annotations: Mapping[str, str] = field(default_factory=dict)
    pull_secrets: tuple[str, ...] = ()
    allow_any_pvc: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    endpoint: str = ""
    notices: tuple[str, ...] = ()

    @classmethod
    def read(cls, *documents: str) -> ServingConfig:
        """From YAML texts, later ones before earlier ones; keys may be written in any case.

        Raises:
            ConfigError: a text is no YAML mapping, or a value is of the wrong kind.
        """
        merged: dict[str, Any] = {}
        for text in documents:
            try:
                document = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{CONFIG_KEY} is not YAML: {' '.join(str(error).split())}") from None
            if document is None:
                continue
            if not isinstance(document, dict):
                raise ConfigError(f"{CONFIG_KEY} must be a mapping of keys")
            _merge(merged, document)
        return _Reader(merged).config()


#: Keys whose values are labels, environment names and the like, which keep their case.
_VERBATIM: Final = ("runtimepodlabels", "runtimepodannotations", "mmcoreresources", "modelmeshresources")


def _merge(into: dict[str, Any], document: Mapping[Any, Any]) -> None:
    for stated, value in document.items():
        key = str(stated).lower()
        if isinstance(value, dict):
            below = into.setdefault(key, {})
            if not isinstance(below, dict):
                below = into[key] = {}
            if key in _VERBATIM:
                into[key] = _overlaid(below, value)
            else:
                if key == "mmcoreimage" and {"tag", "name"} & {str(name).lower() for name in value}:
                    # A digest goes before a tag, so one that was set for another tag must not outlive it.
                    below.pop("digest", None)
                _merge(below, value)
        else:
            into[key] = value


def _overlaid(below: dict[str, Any], above: Mapping[Any, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        before = result.get(str(key))
        result[str(key)] = _overlaid(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


class _Reader:
    """Takes the known keys out of a merged document; what is left has no effect."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.left = document
        self._notices: list[str] = []

    def config(self) -> ServingConfig:
        default = ServingConfig()
        port = self.port
        rest, metrics, tls = self.section("restproxy"), self.section("metrics"), self.section("tls")
        zero = self.section("scaletozero")
        values = {
            "service_name": self.text("inferenceservicename", default.service_name),
            "grpc_port": port("inferenceserviceport", default.grpc_port),
            "storage_secret": self.text("storagesecretname", default.storage_secret),
            "pods_per_runtime": self.whole("podsperruntime", default.pods_per_runtime),
            "headless": self.flag("headlessservice", default.headless),
            "access_log": self.flag("enableaccesslogging", default.access_log),
            "service_account": self.text("serviceaccountname", default.service_account),
            "max_message_bytes": self.whole("grpcmaxmessagesizebytes", default.max_message_bytes),
            "server_types": self.texts("builtinservertypes", default.server_types),
            "pod_labels": self.mapping("runtimepodlabels"),
            "pod_annotations": self.mapping("runtimepodannotations"),
            "pull_secrets": self.pull_secrets(),
            "allow_any_pvc": self.flag("allowanypvc", default.allow_any_pvc),
            "environment": self.environment(),
            "endpoint": self.text("modelmeshendpoint", ""),
            "image": self.image(default.image),
            "resources": self.resources(default.resources),
            "tls_secret": tls.text("secretname", ""),
            "tls_client_auth": tls.choice("clientauth", ("", "optional", "require")),
            "metrics": metrics.flag("enabled", default.metrics),
            "metrics_port": metrics.port("port", default.metrics_port),
            "service_monitor": not metrics.flag("disableprometheusoperatorsupport", False),
            "scale_to_zero": zero.flag("enabled", default.scale_to_zero),
            "grace_s": zero.whole("graceperiodseconds", default.grace_s),
        }
        rest_port = rest.port("port", 8008)
        values["rest_port"] = rest_port if rest.flag("enabled", True) else None
        scheme = metrics.text("scheme", "").lower()
        if scheme not in ("", "http", "https"):
            raise ConfigError(f"metrics.scheme must be http or https, not {scheme!r}")
        values["metrics_tls"] = bool(values["tls_secret"]) and scheme != "http"
        if not values["tls_secret"]:
            if scheme == "https":
                self._notices.append("metrics.scheme: https has no effect without tls.secretName: metrics are http")
            if values["tls_client_auth"]:
                self._notices.append("tls.clientAuth has no effect without tls.secretName")
        self.leave(rest, "restProxy.", _REST_WITHOUT_EFFECT)
        for section, prefix in ((metrics, "metrics."), (tls, "tls."), (zero, "scaleToZero.")):
            self.leave(section, prefix, {})
        self.leave(self, "", _WITHOUT_EFFECT)
        _check_ports(values)
        return ServingConfig(**values, notices=tuple(self._notices))  # type: ignore[arg-type]

    def leave(self, section: _Reader, prefix: str, reasons: Mapping[str, str]) -> None:
        for key in section.left:
            reason = reasons.get(key, "it is not known")
            self._notices.append(f"{prefix}{key} has no effect: {reason}")

    def section(self, key: str) -> _Reader:
        return _Reader(self.mapping(key))

    def take(self, key: str, default: Any, kind: type, told: str) -> Any:
        value = self.left.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{key} must be {told}, not {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self.take(key, default, str, "a text"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.take(key, default, bool, "true or false"))

    def whole(self, key: str, default: int) -> int:
        value = int(self.take(key, default, int, "a whole number"))
        if value < 0:
            raise ConfigError(f"{key} must not be negative")
        return value

    def port(self, key: str, default: int) -> int:
        value = self.whole(key, default)
        if not 0 < value < 65536:
            raise ConfigError(f"{key} must be a port, not {value}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key, choices[0])
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(filter(None, choices))}, not {value!r}")
        return value

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, self.take(key, list(default), list, "a list of names")))

    def mapping(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = self.take(key, {}, dict, "a mapping")
        return value

    def pull_secrets(self) -> tuple[str, ...]:
        entries = self.take("imagepullsecrets", [], list, "a list of names")
        return tuple(str(entry["name"] if isinstance(entry, dict) else entry) for entry in entries)

    def environment(self) -> tuple[tuple[str, str], ...]:
        entries = self.take("internalmodelmeshenvvars", [], list, "a list of name and value")
        for entry in entries:
            if not isinstance(entry, dict) or "name" not in entry:
                raise ConfigError("internalModelMeshEnvVars must be a list of name and value")
        return tuple((str(entry["name"]), str(entry.get("value", ""))) for entry in entries)

    def image(self, default: str) -> str:
        section = self.section("mmcoreimage")
        name, _, tag = default.rpartition(":")
        name, tag = section.text("name", name), section.text("tag", tag)
        digest = section.text("digest", "")
        self.leave(section, "mmcoreImage.", {})
        return f"{name}@{digest}" if digest else f"{name}:{tag}"

    def resources(self, default: Object) -> Object:
        stated = self.mapping("mmcoreresources")
        merged = _overlaid(default, stated)
        for part, entries in merged.items():
            if part not in ("requests", "limits") or not isinstance(entries, dict):
                raise ConfigError("mmcoreResources must hold requests and limits")
            for name, value in entries.items():
                try:
                    quantity(value)
                except ValueError as error:
                    raise ConfigError(f"mmcoreResources.{part}.{name}: {error}") from None
        return merged


def _check_ports(values: Mapping[str, Any]) -> None:
    ports = [values["grpc_port"], values["metrics_port"]]
    if values["rest_port"] is not None:
        ports.append(values["rest_port"])
    if len(set(ports)) != len(ports):
        raise ConfigError(f"inferenceServicePort, restProxy.port and metrics.port must differ: {ports}")
