"""What a ``Predictor`` or an ``InferenceService`` asks for: one model, and how it is registered.

The names of models, the key and the parameters are those of the archived controller, so that its users find the same
names with ``mmcore models`` and its mounted secrets are read as before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Final

from mmcore.controller.objects import Object, annotations_of, at
from mmcore.errors import InvalidSetting, LoadFailed
from mmcore.storage.places import parse_uri

#: Owners of vmodels, by the kind of object that stands behind them.
PREDICTOR_OWNER: Final = "ksp"
INFERENCE_SERVICE_OWNER: Final = "isvc"

DEPLOYMENT_MODE: Final = "serving.kserve.io/deploymentMode"
_SECRET_KEY: Final = "serving.kserve.io/secretKey"  # noqa: S105  # an annotation's name
_SCHEMA_PATH: Final = "serving.kserve.io/schemaPath"
_RUNTIME: Final = "serving.kserve.io/servingRuntime"

#: Blocks of an InferenceService that name the format by their own name, as they were looked for.
_FRAMEWORKS: Final = ("xgboost", "lightgbm", "sklearn", "tensorflow", "onnx", "pytorch", "triton", "pmml", "paddle")


class InvalidSpec(InvalidSetting):
    """The object cannot be served as it is; the text says what to change."""


@dataclass(frozen=True, slots=True)
class WantedModel:
    """The model that an object asks for.

    Attributes:
        owner: who owns its vmodel, by the object's kind.
        name: of the object, and of the vmodel.
        format, version: the model's format; the version may be empty.
        runtime: the runtime it names, empty for one that fits.
        protocol: what the runtime must speak, empty for anything.
    """

    owner: str
    name: str
    format: str
    version: str = ""
    runtime: str = ""
    protocol: str = ""
    path: str = ""
    schema_path: str = ""
    storage_key: str = ""
    storage_params: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key that it is registered with, JSON."""
        content: dict[str, Any] = {}
        if self.storage_key:
            content["storage_key"] = self.storage_key
        if self.storage_params:
            content["storage_params"] = self.storage_params
        content["model_type"] = {"name": self.format, **({"version": self.version} if self.version else {})}
        if self.schema_path:
            content["schema_path"] = self.schema_path
        return json.dumps(content, sort_keys=True)

    @property
    def claim(self) -> str:
        """The volume claim that its parameters name; empty where they name none."""
        params = self.storage_params
        return str(params.get("name") or "") if params.get("type") == "pvc" else ""

    def model_id(self, model_type: str) -> str:
        """The name that it is registered by, another one for everything else that would be loaded or elsewhere."""
        content = json.dumps([model_type, self.path, self.key])
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.name}__{self.owner}-{digest}"


def of_predictor(resource: Object) -> WantedModel:
    """What a Predictor asks for.

    Raises:
        InvalidSpec: fields contradict each other.
    """
    spec = resource.get("spec") or {}
    storage = spec.get("storage") or {}
    model_type = spec.get("modelType") or {}
    if not model_type.get("name"):
        raise InvalidSpec("spec.modelType.name is missing")
    for name in ("path", "schemaPath"):
        if spec.get(name) and storage.get(name):
            raise InvalidSpec(f"Only one of spec.{name} and spec.storage.{name} can be specified")
    if storage.get("persistentVolumeClaim"):
        raise InvalidSpec(
            "spec.storage.persistentVolumeClaim is not supported; use spec.storage.parameters with type pvc"
        )
    key, params = str(storage.get("key") or ""), dict(storage.get("parameters") or {})
    if legacy := storage.get("s3"):
        if [name for name in ("path", "schemaPath", "parameters", "key") if storage.get(name)]:
            raise InvalidSpec("spec.storage.s3 cannot be used together with the other fields of spec.storage")
        key = legacy["secretKey"]
        params = {"bucket": legacy["bucket"]} if legacy.get("bucket") else {}
    _check_params(params)
    return WantedModel(
        owner=PREDICTOR_OWNER,
        name=resource["metadata"]["name"],
        format=model_type["name"],
        version=str(model_type.get("version") or ""),
        runtime=str(at(spec, "runtime", "name") or ""),
        protocol=str(spec.get("protocolVersion") or ""),
        path=str(storage.get("path") or spec.get("path") or ""),
        schema_path=str(storage.get("schemaPath") or spec.get("schemaPath") or ""),
        storage_key=key,
        storage_params=params,
    )


def is_served(resource: Object) -> bool:
    """Whether an InferenceService asks for this controller."""
    return annotations_of(resource).get(DEPLOYMENT_MODE) == "ModelMesh"


def of_inference_service(resource: Object) -> WantedModel:
    """What an InferenceService asks for; its transformer is the business of KServe's controller.

    Raises:
        InvalidSpec: it has no model, two, or fields that contradict each other.
    """
    predictor = at(resource, "spec", "predictor") or {}
    stated = annotations_of(resource)
    block, framework = predictor.get("model"), next((name for name in _FRAMEWORKS if predictor.get(name)), "")
    if block and framework:
        raise InvalidSpec(f"spec.predictor has both model and {framework}; keep one of them")
    if block:
        if stated.get(_RUNTIME):
            raise InvalidSpec(f"annotation {_RUNTIME} cannot be used with spec.predictor.model; set its runtime field")
        name = str(at(block, "modelFormat", "name") or "")
        version, runtime = str(at(block, "modelFormat", "version") or ""), str(block.get("runtime") or "")
    elif framework:
        block, name, version, runtime = predictor[framework], framework, "", stated.get(_RUNTIME, "")
    else:
        raise InvalidSpec("spec.predictor has no model")
    if not name:
        raise InvalidSpec("spec.predictor.model.modelFormat.name is missing")
    path, params = _location(block)
    storage = block.get("storage") or {}
    return WantedModel(
        owner=INFERENCE_SERVICE_OWNER,
        name=resource["metadata"]["name"],
        format=name,
        version=version,
        runtime=runtime,
        protocol=str(block.get("protocolVersion") or ""),
        path=path,
        schema_path=str(storage.get("schemaPath") or stated.get(_SCHEMA_PATH) or ""),
        storage_key=str(storage.get("key") or stated.get(_SECRET_KEY) or ""),
        storage_params=params,
    )


def _location(block: Object) -> tuple[str, dict[str, Any]]:
    storage = block.get("storage") or {}
    path, params = str(storage.get("path") or ""), dict(storage.get("parameters") or {})
    uri = block.get("storageUri")
    if uri and path:
        raise InvalidSpec("storageUri and storage.path cannot both be specified")
    if uri:
        try:
            found, path = parse_uri(uri)
        except LoadFailed as error:
            raise InvalidSpec(f"storageUri: {error}") from None
        params |= found
    elif not path:
        raise InvalidSpec("the model's place is missing: set storageUri or storage.path")
    _check_params(params)
    return path, params


def _check_params(params: dict[str, Any]) -> None:
    if params.get("type") == "local":
        # The files of the pods themselves, their credentials among them, are nobody's models.
        raise InvalidSpec("storage.parameters: the type local is not served")
