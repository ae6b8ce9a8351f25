"""The controller with an API server, real instances and real etcd: what a user of manifests sees.

The API server is the real one where this machine has it, ours otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmcore.controller.api import ApiError
from mmcore.controller.objects import (
    CLUSTER_SERVING_RUNTIME,
    CONFIG_MAP,
    DEPLOYMENT,
    INFERENCE_SERVICE,
    POD,
    PREDICTOR,
    SECRET,
    SERVICE,
    SERVING_RUNTIME,
    Object,
    Ref,
)
from tests.api_servers import CONTROLLER, ApiServer, OwnApiServer, secret
from tests.clusters import Cluster, failed, infer, inference_service, predictor, running, runtime, state
from tests.management import SCALE
from tests.serving import write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def test_a_predictor_from_its_creation_to_its_end(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    # No model, no pods.
    await cluster.until(DEPLOYMENT, "modelmesh-serving-own", lambda one: one["spec"]["replicas"] == 0)
    service = await cluster.until(SERVICE, "modelmesh-serving", lambda one: True)
    assert service["spec"]["clusterIP"] == "None"

    await cluster.apply(predictor("m", "scale-2"))
    found = await cluster.until(PREDICTOR, "m", state("Loaded"))
    status = found["status"]
    assert status["available"] and status["transitionStatus"] == "UpToDate" and "lastFailureInfo" not in status
    assert status["grpcEndpoint"] == f"grpc://modelmesh-serving.{cluster.namespace}:{cluster.grpc_port}"
    assert (status["totalCopies"], status["failedCopies"]) == (1, 0)
    assert await infer(cluster, "m", 5) == 10

    # Another path: the same name answers with the other model.
    await cluster.apply(predictor("m", "scale-3"))
    generation = lambda one: one["status"].get("observedGeneration") == one["metadata"]["generation"] == 2  # noqa: E731
    await cluster.until(PREDICTOR, "m", lambda one: generation(one) and state("Loaded")(one))
    assert await infer(cluster, "m", 5) == 15

    # A path that is none: the old model goes on, and why is told.
    await cluster.apply(predictor("m", "nowhere"))
    found = await cluster.until(PREDICTOR, "m", state("Loaded", "FailedToLoad"))
    status = found["status"]
    assert status["available"] and status["transitionStatus"] == "BlockedByFailedLoad"
    assert status["lastFailureInfo"]["reason"] == "ModelLoadFailed"
    assert {"location", "time", "message", "modelId"} <= status["lastFailureInfo"].keys()
    assert await infer(cluster, "m", 5) == 15

    # Back again.
    await cluster.apply(predictor("m", "scale-3"))
    await cluster.until(PREDICTOR, "m", lambda one: state("Loaded")(one) and not failed("ModelLoadFailed")(one))

    await cluster.delete(PREDICTOR, "m")
    await cluster.until_gone(PREDICTOR, "m")
    # And with its last model the runtime's pods.
    await cluster.until(DEPLOYMENT, "modelmesh-serving-own", lambda one: one["spec"]["replicas"] == 0)
    reasons = [reason for reason, _ in await cluster.events("m")]
    assert "Loaded" in reasons and "ModelLoadFailed" in reasons


async def test_what_cannot_be_served_is_told(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    await cluster.apply(predictor("broken", "broken"))
    nokey = predictor("nokey", "scale-2")
    nokey["spec"]["storage"] = {"key": "no", "path": "x"}
    await cluster.apply(nokey)
    await cluster.apply(predictor("unknown", "scale-2", model_type="pmml"))
    await cluster.apply(predictor("lost", "scale-2", runtime={"name": "nope"}))
    for name, told in (("broken", "the weights are missing"), ("nokey", "no storage entry 'no'")):
        status = (await cluster.until(PREDICTOR, name, failed("ModelLoadFailed")))["status"]
        assert (status["activeModelState"], status["available"]) == ("FailedToLoad", False)
        assert told in status["lastFailureInfo"]["message"]
        assert {"location", "time"} <= status["lastFailureInfo"].keys()
    for name, reason, message in (
        ("unknown", "NoSupportingRuntime", "No ServingRuntime supports specified model type and/or protocol"),
        ("lost", "RuntimeNotRecognized", "Specified runtime name not recognized"),
    ):
        status = (await cluster.until(PREDICTOR, name, failed(reason)))["status"]
        assert (status["activeModelState"], status["available"]) == ("FailedToLoad", False)
        assert status["lastFailureInfo"]["message"] == message
        assert "location" not in status["lastFailureInfo"]
    # They stand in nobody's way.
    await cluster.apply(predictor("good", "scale-2", gpu="required"))
    await cluster.until(PREDICTOR, "good", state("Loaded"))
    assert ("WithoutEffect", "spec.gpu has no effect, as it had none") in await cluster.events("good")


async def test_a_spec_that_contradicts_itself_is_refused_or_told(cluster: Cluster) -> None:
    twice = predictor("twice", "scale-2")
    twice["spec"]["path"] = "other"
    told = "Only one of spec.path and spec.storage.path can be specified"
    if cluster.server.has_cel:
        with pytest.raises(ApiError, match=told):
            await cluster.apply(twice)
        return
    await cluster.apply(twice)
    status = (await cluster.until(PREDICTOR, "twice", failed("InvalidPredictorSpec")))["status"]
    assert (status["transitionStatus"], status["available"]) == ("InvalidSpec", False)
    assert ("InvalidPredictorSpec", told) in await cluster.events("twice")


async def test_a_server_too_old_for_rules_leaves_them_to_the_status(tmp_path: Path) -> None:
    (tmp_path / "kubernetes").mkdir()
    server = OwnApiServer(tmp_path / "kubernetes", cel=False)
    try:
        async with running(server.start(), tmp_path) as cluster:
            await test_a_spec_that_contradicts_itself_is_refused_or_told(cluster)
    finally:
        server.stop()


async def test_a_store_that_is_mended_is_noticed(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    item = predictor("m", "scale-2")
    item["spec"]["storage"] = {"key": "later", "path": "scale-2"}
    await cluster.apply(item)
    await cluster.until(PREDICTOR, "m", state("FailedToLoad"))
    entries = {name: {"type": "pvc", "name": "models"} for name in ("models", "later")}
    await cluster.apply(secret(cluster.namespace, "storage-config", **entries))
    await cluster.until(PREDICTOR, "m", state("Loaded"))


async def test_inference_services_of_both_forms(cluster: Cluster) -> None:
    await cluster.apply(runtime("own", "sklearn", "python"))
    model = {"modelFormat": {"name": "python"}, "storageUri": "pvc://models/scale-2"}
    await cluster.apply(inference_service("new", {"model": {**model, "protocolVersion": "grpc-v2"}}))
    await cluster.apply(inference_service("old", {"sklearn": {"storageUri": "pvc://models/nowhere"}}))
    await cluster.apply(inference_service("other", {"model": model}, deploymentMode="Serverless"))
    await cluster.apply(inference_service("none", {}))

    def ready(value: str) -> Any:
        return lambda item: any(
            one["type"] == "Ready" and one["status"] == value and one.get("reason") != "RuntimeUnhealthy"
            for one in (item.get("status") or {}).get("conditions") or []
        )

    status = (await cluster.until(INFERENCE_SERVICE, "new", ready("True")))["status"]
    assert status["url"] == status["components"]["predictor"]["grpcUrl"]
    assert status["modelStatus"]["states"]["activeModelState"] == "Loaded"
    assert await infer(cluster, "new", 4) == 8
    failure = lambda item: (item.get("status") or {}).get("modelStatus", {}).get("lastFailureInfo", {})  # noqa: E731
    await cluster.until(INFERENCE_SERVICE, "old", lambda item: failure(item).get("reason") == "ModelLoadFailed")
    await cluster.until(INFERENCE_SERVICE, "none", lambda item: failure(item).get("reason") == "InvalidPredictorSpec")
    found = await cluster.get(INFERENCE_SERVICE, "other")
    assert found is not None and "status" not in found and "finalizers" not in found["metadata"]
    # A name that a Predictor has already is told to be taken.
    await cluster.apply(predictor("new", "scale-2"))
    await cluster.until(PREDICTOR, "new", failed("InvalidPredictorSpec"))


async def test_a_runtime_that_cannot_be_run_is_told_and_what_runs_stays(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    before = await cluster.get(DEPLOYMENT, "modelmesh-serving-own")

    wrong = runtime()
    wrong["spec"]["volumes"] = [{"name": "tc-config", "emptyDir": {}}]
    await cluster.apply(wrong)

    def valid(value: str) -> Any:
        return lambda item: any(one["status"] == value for one in (item.get("status") or {}).get("conditions") or [])

    found = await cluster.until(SERVING_RUNTIME, "own", valid("False"))
    assert "tc-config" in found["status"]["conditions"][0]["message"]
    assert before is not None
    after = await cluster.get(DEPLOYMENT, "modelmesh-serving-own")
    assert after is not None and after["spec"] == before["spec"]
    assert await infer(cluster, "m", 1) == 2

    await cluster.apply(runtime())
    await cluster.until(SERVING_RUNTIME, "own", valid("True"))
    # Disabled, its pods go, and the model says why.
    await cluster.apply(runtime(disabled=True))
    await cluster.until_gone(DEPLOYMENT, "modelmesh-serving-own")
    await cluster.until(PREDICTOR, "m", lambda one: failed("RuntimeDisabled")(one) and not one["status"]["available"])


async def test_pods_that_do_not_start_say_why(cluster: Cluster) -> None:
    cluster.kubelet.broken["modelmesh-serving-own"] = "back-off restarting failed container"
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))

    def told(item: Object) -> bool:
        conditions = (item.get("status") or {}).get("conditions") or []
        return any("CrashLoopBackOff" in one.get("message", "") for one in conditions)

    status = (await cluster.until(PREDICTOR, "m", told))["status"]
    assert (status["available"], status["lastFailureInfo"]["reason"]) == (False, "RuntimeUnhealthy")
    # Nobody can be told of the deletion: it does not wait for ever. The pods go with it.
    cluster.kubelet.broken.clear()
    await cluster.delete(SERVING_RUNTIME, "own")
    await cluster.delete(PREDICTOR, "m")
    await cluster.until_gone(PREDICTOR, "m")


async def test_edits_by_hand_are_taken_back_and_others_fields_stay(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    name = "modelmesh-serving-own"
    found = await cluster.until(DEPLOYMENT, name, lambda one: True)
    where = Ref(cluster.namespace, name)
    await cluster.api.patch(
        DEPLOYMENT, where, {"metadata": {"labels": {"team": "a"}}, "spec": {"replicas": 3, "revisionHistoryLimit": 4}}
    )
    found = await cluster.until(DEPLOYMENT, name, lambda one: one["spec"]["replicas"] == 0)
    assert found["metadata"]["labels"]["team"] == "a" and found["spec"]["revisionHistoryLimit"] == 4
    await cluster.delete(CONFIG_MAP, "tc-config")
    await cluster.until(CONFIG_MAP, "tc-config", lambda one: "rt:own" in one["data"]["type_constraints"])


async def test_the_configuration_is_taken_over_while_running(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    name = "modelmesh-serving-own"
    await cluster.until(DEPLOYMENT, name, lambda one: one["spec"]["replicas"] == 0)
    await cluster.configure(podsPerRuntime="many")
    async with asyncio.timeout(10):
        while not any(reason == "InvalidConfiguration" for reason, _ in await cluster.events("model-serving-config")):
            await asyncio.sleep(0.05)
    await cluster.configure(podsPerRuntime=2, scaleToZero={"enabled": False}, headlessService=False)
    await cluster.until(DEPLOYMENT, name, lambda one: one["spec"]["replicas"] == 2)
    await cluster.until(SERVICE, "modelmesh-serving", lambda one: one["spec"]["clusterIP"] != "None")
    # Another secret of stores is followed from then on, where the controller may read it.
    rules = [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["others"], "verbs": ["list", "watch"]}]
    to = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "others"}
    users = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": CONTROLLER}]
    for kind, content in (("Role", {"rules": rules}), ("RoleBinding", {"roleRef": to, "subjects": users})):
        version = "rbac.authorization.k8s.io/v1"
        path = f"/apis/{version}/namespaces/{cluster.namespace}/{kind.lower()}s"
        item = {"apiVersion": version, "kind": kind, "metadata": {"name": "others"}, **content}
        await asyncio.to_thread(cluster.server.ask, "POST", path, item)
    await cluster.configure(storageSecretName="others")
    await cluster.apply(secret(cluster.namespace, "others", broken="{no JSON"))
    async with asyncio.timeout(20):
        while ("InvalidEntry", "no JSON object: broken") not in await cluster.events("others"):
            await asyncio.sleep(0.05)


async def test_an_instance_that_dies_is_replaced_in_the_status(cluster: Cluster) -> None:
    await cluster.configure(podsPerRuntime=2)
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    items, _ = await cluster.api.list(POD, cluster.namespace)
    for item in items[:1]:
        cluster.kubelet.kill(Ref(cluster.namespace, item["metadata"]["name"]))
        await cluster.delete(POD, item["metadata"]["name"])
    await cluster.apply(predictor("other", "scale-3"))
    await cluster.until(PREDICTOR, "other", state("Loaded"))


async def test_a_cluster_of_several_namespaces(kubernetes: ApiServer, tmp_path: Path) -> None:
    async with running(kubernetes, tmp_path, cluster_scope=True) as cluster:
        write_model(cluster.models, "scale-2", SCALE.replace("FACTOR", "2"))
        team = f"{cluster.namespace}-team"
        name = f"shared-{cluster.namespace}"
        await cluster.apply(runtime(name, kind="ClusterServingRuntime"))
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": team, "labels": {}}}
        await cluster.apply(namespace)
        await cluster.apply(secret(team, "storage-config", models={"type": "pvc", "name": "models"}))
        item = predictor("m", "scale-2")
        item["metadata"]["namespace"] = team
        await cluster.apply(item)
        # The controller's own namespace is served; the team's is when its label says so.
        await cluster.until(DEPLOYMENT, f"modelmesh-serving-{name}", lambda one: True)
        assert await cluster.get(DEPLOYMENT, f"modelmesh-serving-{name}", team) is None

        namespace["metadata"]["labels"] = {"modelmesh-enabled": "true"}
        await cluster.apply(namespace)
        await cluster.until(PREDICTOR, "m", state("Loaded"), team)
        copied = await cluster.until(SECRET, "model-serving-etcd", lambda one: True, team)
        assert json.loads(base64.b64decode(copied["data"]["etcd_connection"]))["root_prefix"].endswith(f"mm_ns/{team}")

        # A runtime of the team's own hides the cluster's.
        own = runtime(name, disabled=True)
        own["metadata"]["namespace"] = team
        await cluster.apply(own)
        await cluster.until_gone(DEPLOYMENT, f"modelmesh-serving-{name}", team)
        again = await cluster.get(SECRET, "model-serving-etcd", team)
        # The copy is written once, and not each time that the namespace is looked at.
        assert again is not None and again["metadata"]["resourceVersion"] == copied["metadata"]["resourceVersion"]
        disabled = lambda one: failed("RuntimeDisabled")(one) and not one["status"]["available"]  # noqa: E731
        await cluster.until(PREDICTOR, "m", disabled, team)
        await cluster.delete(SERVING_RUNTIME, name, team)
        # It is there again; one that was loaded before is loaded by its next request at the latest.
        await cluster.until(PREDICTOR, "m", lambda one: one["status"]["available"], team)
        assert await infer(cluster, "m", 2, team) == 4

        # Without the label nothing of ours is left, and the objects are the user's again.
        namespace["metadata"]["labels"] = {}
        await cluster.apply(namespace)
        await cluster.until_gone(DEPLOYMENT, f"modelmesh-serving-{name}", team)
        for kind, one in ((SERVICE, "modelmesh-serving"), (CONFIG_MAP, "tc-config"), (SECRET, "model-serving-etcd")):
            await cluster.until_gone(kind, one, team)
        await cluster.until(PREDICTOR, "m", lambda one: "finalizers" not in one["metadata"], team)
        await cluster.delete(CLUSTER_SERVING_RUNTIME, name)
