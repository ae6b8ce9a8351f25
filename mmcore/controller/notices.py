"""What objects state that means nothing here: told by the checker, and in Events on the objects themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mmcore.controller import adapter_limits
from mmcore.controller.objects import Object, annotations_of, at
from mmcore.controller.runtimes import Runtime

#: The archived controller read them as little.
_OF_PREDICTORS: Final = ("gpu", "serviceAccountName")
#: An annotation of runtimes that named a ConfigMap whose content was not used.
_PRODUCT_CONFIG: Final = "productConfig"
#: Fields of a runtime's ``spec`` that mean something here, or of which it is said below that they do not.
_RUNTIME_FIELDS: Final = (
    *("affinity", "annotations", "builtInAdapter", "containers", "disabled", "grpcDataEndpoint", "grpcEndpoint"),
    *("hostIPC", "httpDataEndpoint", "imagePullSecrets", "initContainers", "labels", "multiModel", "nodeSelector"),
    *("priorityClassName", "protocolVersions", "replicas", "runtimeClassName", "securityContext", "storageHelper"),
    *("supportedModelFormats", "tolerations", "volumes"),
)


def of_predictor(item: Object) -> Iterator[str]:
    """What a Predictor states in vain."""
    for field in _OF_PREDICTORS:
        if at(item, "spec", field):
            yield f"spec.{field} has no effect, as it had none"


def of_runtime(runtime: Runtime) -> Iterator[str]:
    """What a runtime states in vain."""
    for field in ("httpDataEndpoint", "storageHelper"):
        if runtime.spec.get(field):
            yield f"{field} has no effect: instances pull models and serve REST themselves"
    if _PRODUCT_CONFIG in annotations_of(runtime.resource):
        yield f"{_PRODUCT_CONFIG} has no effect: it had none"
    for limit in adapter_limits.without_effect(runtime):
        yield f"{limit} has no effect: there is no other server that it would hold for"
    for entry in at(runtime.spec, "builtInAdapter", "env") or []:
        if not entry["name"].startswith("MMCORE_") and entry["name"] not in adapter_limits.VARIABLES:
            yield f"builtInAdapter.env {entry['name']} has no effect: an instance is in the adapter's place"
    if unknown := sorted(runtime.spec.keys() - set(_RUNTIME_FIELDS)):
        yield f"spec: {', '.join(unknown)} have no effect"
