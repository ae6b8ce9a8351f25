"""Which runtimes objects go to, from all that is known of a namespace."""

from __future__ import annotations

from typing import Any

from mmcore.controller.api import ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.known import Installation, Known
from mmcore.controller.objects import Kind, Object, Ref
from mmcore.controller.runtimes import Runtime
from tests.unit.controller.objects import serving_runtime

NAMESPACE = "models"


def known(*objects: Object, cluster: tuple[Object, ...] = ()) -> Known:
    """What is known once these have been told; nothing is asked for."""
    api: Any = None
    found = Known(api, Installation(NAMESPACE), lambda kind, before, after: None)
    for number, item in enumerate(objects):
        item["metadata"] |= {"namespace": NAMESPACE, "resourceVersion": "1", "uid": str(number), "generation": 1}
    for item in cluster:
        item["metadata"] |= {"namespace": "", "resourceVersion": "1", "uid": "c"}
    for informer in (found.predictors, found.inference_services, found.runtimes):
        tell(informer, *(one for one in objects if one["kind"] == informer.kind.name))
    tell(found.cluster_runtimes, *cluster)
    return found


def tell(informer: Informer, *items: Object) -> None:
    """As the API server lists them."""
    informer._take(list(items))


def used(found: Known) -> set[str]:
    """The runtimes that stay up."""
    return {one.runtime.name for one in found.users(NAMESPACE) if isinstance(one.runtime, Runtime)}


def predictor(name: str = "p", **spec: Any) -> Object:
    return {"kind": "Predictor", "metadata": {"name": name}, "spec": {"modelType": {"name": "onnx"}, **spec}}


def service(predictor: Object, mode: str = "ModelMesh") -> Object:
    annotations = {"serving.kserve.io/deploymentMode": mode}
    return {
        "kind": "InferenceService",
        "metadata": {"name": "i", "annotations": annotations},
        "spec": {"predictor": predictor},
    }


def test_a_model_keeps_up_the_one_runtime_that_it_goes_to_and_no_other_that_would_do() -> None:
    both = serving_runtime("first"), serving_runtime("second")
    assert len(used(known(*both, predictor()))) == 1
    assert used(known(*both, predictor(runtime={"name": "second"}))) == {"second"}


def test_an_object_that_cannot_be_served_keeps_no_runtime_up() -> None:
    broken = service({"model": {"modelFormat": {"name": "onnx"}, "storageUri": "ftp://nowhere"}})
    assert used(known(serving_runtime(), broken)) == set()
    assert used(known(serving_runtime(), predictor(path="a", storage={"path": "b"}))) == set()


def test_an_inference_service_of_another_mode_keeps_no_runtime_up() -> None:
    model = {"model": {"modelFormat": {"name": "onnx"}, "storageUri": "s3://bucket/m"}}
    assert used(known(serving_runtime(), service(model, "Serverless"))) == set()
    assert used(known(serving_runtime(), service(model))) == {"triton-2.x"}


def test_a_runtime_that_changes_is_looked_at_anew() -> None:
    found = known(serving_runtime(), predictor())
    assert used(found) == {"triton-2.x"}
    changed = serving_runtime(disabled=True)
    changed["metadata"] |= {"namespace": NAMESPACE, "resourceVersion": "2", "uid": "0", "generation": 2}
    tell(found.runtimes, changed)
    assert used(found) == set()


def test_a_namespaces_disabled_runtime_hides_the_clusters_of_its_name() -> None:
    cluster = (serving_runtime("triton-2.x"),)
    assert used(known(predictor(), cluster=cluster)) == {"triton-2.x"}
    assert used(known(serving_runtime("triton-2.x", disabled=True), predictor(), cluster=cluster)) == set()


class Maps:
    """An API server that has these ConfigMaps, and none of the kinds that a server may lack."""

    def __init__(self, **data: dict[str, str]) -> None:
        self.data = data

    async def get(self, kind: Kind, where: Ref) -> Object:
        name = where.name.replace("-", "_")
        if name not in self.data:
            raise ApiError(404, "not found")
        return {"data": self.data[name]}

    async def served(self, kinds: tuple[Kind, ...]) -> None:
        return None


async def test_the_secret_of_stores_that_is_followed_is_the_one_that_the_configuration_names() -> None:
    async def followed(**data: dict[str, str]) -> str:
        api: Any = Maps(**data)
        found = Known(api, Installation(NAMESPACE), lambda kind, before, after: None)
        followed = await found.informers()
        assert found.storage_secrets in followed
        return found.storage_secret

    defaults = {"config-defaults.yaml": "storageSecretName: theirs"}
    assert await followed() == "storage-config"
    assert await followed(model_serving_config_defaults=defaults) == "theirs"
    user = {"config.yaml": "storageSecretName: mine"}
    assert await followed(model_serving_config_defaults=defaults, model_serving_config=user) == "mine"
    assert await followed(model_serving_config={"config.yaml": "["}) == "storage-config"
