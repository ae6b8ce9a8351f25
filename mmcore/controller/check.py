"""What will happen to manifests that exist already: nothing is asked for, the files alone are looked at."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from mmcore.controller import notices
from mmcore.controller.deployment import ETCD_KEY
from mmcore.controller.mesh_manifests import etcd_secret, storage_entries
from mmcore.controller.objects import (
    CLUSTER_SERVING_RUNTIME,
    INFERENCE_SERVICE,
    PREDICTOR,
    SERVING_RUNTIME,
    Kind,
    Object,
    at,
)
from mmcore.controller.runtimes import Runtime, effective_runtimes, problems
from mmcore.controller.selection import Unfit, select
from mmcore.controller.serving_config import CONFIG_KEY, CONFIG_MAP_NAME, TLS_SECRET, ConfigError, ServingConfig
from mmcore.controller.wanted import DEPLOYMENT_MODE, InvalidSpec, is_served, of_inference_service, of_predictor

#: Fields of an InferenceService's predictor that say something of its model; the others are of pods of its own.
_MODEL_FIELDS: Final = (
    *("model", "xgboost", "lightgbm", "sklearn", "tensorflow", "onnx", "pytorch", "triton", "pmml", "paddle"),
)
#: The archived controller's webhook: its server is gone with that controller.
_OLD_WEBHOOK: Final = "modelmesh-servingruntime.serving.kserve.io"
_RUNTIME_KINDS: Final = (SERVING_RUNTIME, CLUSTER_SERVING_RUNTIME)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one object: ``level`` is ok, note (works, and differs) or error (will not work)."""

    name: str
    level: str
    text: str


def read(texts: Iterable[str]) -> list[Object]:
    """The objects of files, lists among them taken apart; yaml.YAMLError where a text is no YAML."""
    items: list[Object] = []
    for text in texts:
        for document in yaml.safe_load_all(text):
            if isinstance(document, dict) and str(document.get("kind")).endswith("List"):
                listed = document.get("items")
                items += listed if isinstance(listed, list) else []
            elif isinstance(document, dict):
                items.append(document)
    return items


def check(items: Iterable[Object]) -> list[Finding]:
    """What the controller will make of these objects, by what they themselves say."""
    found = [item for item in items if isinstance(item, dict) and isinstance(at(item, "metadata", "name"), str)]
    findings: list[Finding] = []
    config = ServingConfig()
    for item in found:
        if item.get("kind") == "ConfigMap" and item["metadata"]["name"] == CONFIG_MAP_NAME:
            config = _configuration(item, findings)
    runtimes = [item for item in found if item.get("kind") in {kind.name for kind in _RUNTIME_KINDS}]
    for item in found:
        looks: Callable[..., Iterator[tuple[str, str]]] | None = _LOOKS.get(str(item.get("kind")))
        if looks is not None:
            name = f"{item['kind']} {item['metadata']['name']}"
            try:
                findings += [Finding(name, level, text) for level, text in looks(item, runtimes, config)]
            except (AttributeError, TypeError) as error:
                # An API server has compared manifests with their definitions before a controller sees them.
                findings.append(Finding(name, "error", f"a field is not of the type that its definition says: {error}"))
    return findings


def _configuration(item: Object, findings: list[Finding]) -> ServingConfig:
    name = f"ConfigMap {CONFIG_MAP_NAME}"
    try:
        config = ServingConfig.read(str(at(item, "data", CONFIG_KEY) or ""))
    except ConfigError as error:
        findings.append(Finding(name, "error", f"it will not be used: {error}"))
        return ServingConfig()
    findings += [Finding(name, "note", notice) for notice in config.notices]
    if config.tls_secret:
        told = f"tls: the secret {config.tls_secret} must be in every namespace that is served"
        if config.tls_secret != TLS_SECRET:
            told += f"; let the controller's role get it, which names {TLS_SECRET}"
        findings.append(Finding(name, "note", told))
    if not config.notices:
        findings.append(Finding(name, "ok", "all of it is honoured"))
    return config


def _runtime(item: Object, runtimes: list[Object], config: ServingConfig) -> Iterator[tuple[str, str]]:
    kind = next(one for one in _RUNTIME_KINDS if one.name == item["kind"])
    runtime = Runtime.of(item, kind)
    if not runtime.multi_model:
        yield "note", "it is not a multi-model runtime: this controller leaves it alone"
        return
    if runtime.disabled:
        yield "note", "it is disabled"
    wrong = problems(runtime, config)
    for problem in wrong:
        yield "error", problem
    for notice in notices.of_runtime(runtime):
        yield "note", notice
    if not wrong:
        names = ", ".join(f"'{one['name']}'" for one in runtime.containers)
        beside = f"{names} and one instance beside it" if names else "one instance and nothing else"
        yield "ok", f"its pods run {beside}"


def _predictor(item: Object, runtimes: list[Object], config: ServingConfig) -> Iterator[tuple[str, str]]:
    for notice in notices.of_predictor(item):
        yield "note", notice
    yield from _model(item, PREDICTOR, runtimes)


def _inference_service(item: Object, runtimes: list[Object], config: ServingConfig) -> Iterator[tuple[str, str]]:
    if not is_served(item):
        yield "note", f"it has no annotation {DEPLOYMENT_MODE}: ModelMesh, and is left to KServe's controller"
        return
    if extra := sorted((at(item, "spec", "predictor") or {}).keys() - set(_MODEL_FIELDS)):
        yield "note", f"spec.predictor: {', '.join(extra)} have no effect: models share the runtime's pods"
    yield from _model(item, INFERENCE_SERVICE, runtimes)


def _model(item: Object, kind: Kind, runtimes: list[Object]) -> Iterator[tuple[str, str]]:
    try:
        model = of_predictor(item) if kind is PREDICTOR else of_inference_service(item)
    except InvalidSpec as error:
        yield "error", str(error)
        return
    if not runtimes:
        yield "ok", f"a model of the format {model.format}; give the runtimes' files too to see which one it goes to"
        return
    namespace = item["metadata"].get("namespace", "")
    own = [
        one
        for one in runtimes
        if one["kind"] == SERVING_RUNTIME.name and one["metadata"].get("namespace", "") == namespace
    ]
    chosen = select(model, effective_runtimes(own, [one for one in runtimes if one["kind"] != SERVING_RUNTIME.name]))
    if isinstance(chosen, Unfit):
        yield "error", f"{chosen.message}: {chosen.detail}"
    else:
        yield "ok", f"it goes to the runtime '{chosen.name}'"


def _secret(item: Object, runtimes: list[Object], config: ServingConfig) -> Iterator[tuple[str, str]]:
    data: dict[str, Any] = dict(item.get("data") or {})
    for key, text in (item.get("stringData") or {}).items():
        data[key] = base64.b64encode(str(text).encode()).decode()
    if ETCD_KEY in data:
        yield from _etcd({**item, "data": data})
    if item["metadata"]["name"] != config.storage_secret:
        return
    entries, broken = storage_entries({"data": data})
    for key in broken:
        yield "error", f"the entry '{key}' is no JSON object"
    yield "ok", f"{len(entries)} entries are read as before"


def _etcd(item: Object) -> Iterator[tuple[str, str]]:
    try:
        etcd_secret(item, "namespace")
    except ValueError as error:
        yield "error", str(error)
    else:
        yield (
            "note",
            "models are registered anew below its root_prefix; what the archived release has there is not read",
        )


def _webhook(item: Object, runtimes: list[Object], config: ServingConfig) -> Iterator[tuple[str, str]]:
    if item["metadata"]["name"] == _OLD_WEBHOOK:
        yield "note", "delete it: without the archived controller it lets nobody change a runtime"


_LOOKS: Final[dict[str, Callable[..., Iterator[tuple[str, str]]]]] = {
    SERVING_RUNTIME.name: _runtime,
    CLUSTER_SERVING_RUNTIME.name: _runtime,
    PREDICTOR.name: _predictor,
    INFERENCE_SERVICE.name: _inference_service,
    "Secret": _secret,
    "ValidatingWebhookConfiguration": _webhook,
}
