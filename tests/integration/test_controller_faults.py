"""What the archived controller got wrong, and what goes wrong around a controller: nothing is lost, and it is told."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mmcore.controller import leader
from mmcore.controller.api import Api
from mmcore.controller.app import Controller
from mmcore.controller.known import Installation
from mmcore.controller.leader import Leader, LeaseLost
from mmcore.controller.objects import (
    CLUSTER_SERVING_RUNTIME,
    DEPLOYMENT,
    DISRUPTION_BUDGETS,
    INFERENCE_SERVICE,
    NAMESPACE,
    NETWORK_POLICY,
    POD,
    PREDICTOR,
    SECRET,
    SERVICE,
    SERVING_RUNTIME,
    Object,
    Ref,
    at,
)
from tests.api_servers import TOKEN, ApiServer, OwnApiServer, secret, write_kubeconfig
from tests.clusters import WITHIN_S, Cluster, failed, infer, inference_service, predictor, running, runtime, state
from tests.cutting import CuttingProxy
from tests.etcds import Etcd, etcdctl, free_port
from tests.garbage_collector import collecting
from tests.management import SCALE
from tests.serving import command, environment, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

OWN = "modelmesh-serving-own"


async def until(fits: Any, within_s: float = WITHIN_S) -> None:
    async with asyncio.timeout(within_s):
        while not await fits():
            await asyncio.sleep(0.05)


async def versions(cluster: Cluster) -> dict[str, str]:
    """The versions of what the controller keeps."""
    found = {}
    for kind in (DEPLOYMENT, SERVICE, NETWORK_POLICY, PREDICTOR, INFERENCE_SERVICE, POD):
        for item in (await cluster.api.list(kind, cluster.namespace))[0]:
            found[f"{kind.name} {item['metadata']['name']}"] = item["metadata"]["resourceVersion"]
    return found


async def test_nothing_is_written_where_nothing_differs(cluster: Cluster) -> None:
    item = runtime("own", "python")
    # Forms that API servers write differently, and what they leave out.
    limits = {"memory": "1024Mi", "cpu": "1000m"}
    item["spec"]["containers"][0] |= {
        "resources": {"limits": limits, "requests": {"cpu": "0.5"}},
        "env": [{"name": "EMPTY", "value": ""}],
        "volumeMounts": [],
    }
    item["spec"]["volumes"] = [{"name": "scratch", "emptyDir": {"sizeLimit": "2048Mi"}}]
    item["spec"]["nodeSelector"] = {}
    await cluster.apply(item)
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.apply(inference_service("s", {"sklearn": {"storageUri": "pvc://models/scale-2"}}))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    await cluster.until(
        INFERENCE_SERVICE, "s", lambda one: at(one, "status", "modelStatus", "lastFailureInfo") is not None
    )
    assert cluster.controller is not None
    await until(lambda: _idle(cluster.controller))
    before = await versions(cluster)
    # A controller that starts anew looks at everything.
    await cluster.stop_controller()
    await cluster.start_controller()
    await until(lambda: _idle(cluster.controller))
    assert await versions(cluster) == before
    requests = cluster.controller.requests
    assert not {"PATCH", "DELETE"} & {method for method, _ in requests}, requests


async def _idle(controller: Controller | None) -> bool:
    """Whether it has had nothing to do for a while."""
    assert controller is not None
    for _ in range(20):
        if not controller.queue.idle:
            return False
        await asyncio.sleep(0.05)
    return True


async def test_watches_that_end_and_versions_that_are_gone_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "kubernetes").mkdir()
    server = OwnApiServer(tmp_path / "kubernetes")
    try:
        async with running(server.start(), tmp_path) as cluster:
            write_model(cluster.models, "scale-2", SCALE.replace("FACTOR", "2"))
            await cluster.apply(runtime())
            await cluster.apply(predictor("m", "scale-2"))
            await cluster.until(PREDICTOR, "m", state("Loaded"))
            before = await cluster.get(DEPLOYMENT, OWN)
            await asyncio.to_thread(server.expire)
            await cluster.apply(predictor("n", "scale-2"))
            await cluster.until(PREDICTOR, "n", state("Loaded"))
            after = await cluster.get(DEPLOYMENT, OWN)
            assert before is not None and after is not None
            assert before["metadata"]["uid"] == after["metadata"]["uid"] and before["spec"] == after["spec"]
    finally:
        server.stop()


async def test_a_model_whose_pods_have_gone_is_not_available(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    cluster.kubelet.broken[OWN] = "the image is gone"
    for item in (await cluster.api.list(POD, cluster.namespace))[0]:
        cluster.kubelet.kill(Ref(cluster.namespace, item["metadata"]["name"]))
        await cluster.delete(POD, item["metadata"]["name"])
    gone = lambda one: failed("RuntimeUnhealthy")(one) and not one["status"]["available"]  # noqa: E731
    await cluster.until(PREDICTOR, "m", gone)
    # And back again, as far as a pod is there.
    cluster.kubelet.broken.clear()
    for item in (await cluster.api.list(POD, cluster.namespace))[0]:
        await cluster.delete(POD, item["metadata"]["name"])
    await cluster.until(PREDICTOR, "m", lambda one: one["status"]["available"] and not failed("RuntimeUnhealthy")(one))
    assert await infer(cluster, "m", 2) == 4


async def test_models_are_registered_again_when_etcd_has_lost_them(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    await asyncio.to_thread(wipe, cluster.server.etcd.url, cluster.namespace + "/")

    async def serves() -> bool:
        try:
            return await infer(cluster, "m", 2) == 4
        except Exception:
            return False

    async def lost() -> bool:
        return not await serves()

    await until(lost)
    await until(serves)
    await cluster.until(PREDICTOR, "m", state("Loaded"))


def wipe(etcd: str, prefix: str) -> None:
    """Delete all keys below a prefix."""
    first, last = prefix.encode(), prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])
    body = {"key": base64.b64encode(first).decode(), "range_end": base64.b64encode(last).decode()}
    request = urllib.request.Request(f"{etcd}/v3/kv/deleterange", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert int(json.loads(answer.read())["deleted"]) > 0


async def test_an_etcd_secret_that_is_missing_or_changes_is_followed(cluster: Cluster, tmp_path: Path) -> None:
    first = await cluster.get(SECRET, "model-serving-etcd")
    assert first is not None
    await cluster.delete(SECRET, "model-serving-etcd")
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))

    async def missed() -> bool:
        return "EtcdSecretMissing" in [reason for reason, _ in await cluster.events("own")]

    await until(missed)
    # One that is made later is taken, and stays.
    await cluster.apply(secret(cluster.namespace, "model-serving-etcd", etcd_connection=connection_of(first)))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    assert await cluster.get(SECRET, "model-serving-etcd") is not None

    async def change(prefix: str) -> None:
        connection = {"endpoints": etcd.url, "root_prefix": prefix}
        await cluster.apply(secret(cluster.namespace, "model-serving-etcd", etcd_connection=connection))

    async def pods() -> set[str]:
        return {item["metadata"]["name"] for item in (await cluster.api.list(POD, cluster.namespace))[0]}

    async def has_keys(prefix: str) -> bool:
        get = ("--endpoints", etcd.endpoint, "get", "--prefix", f"{prefix}/models/", "--keys-only")
        return bool(await asyncio.to_thread(etcdctl, *get))

    async def alone() -> bool:
        return len(await pods()) == 1

    # The one that waited for the secret has gone.
    await until(alone)
    etcd = Etcd(tmp_path / "other-etcd").start()
    try:
        before = await pods()
        # Another etcd: what runs goes over to it and takes its models along.
        await change(cluster.namespace)
        await until(lambda: has_keys(cluster.namespace))
        await cluster.apply(predictor("n", "scale-3"))
        await cluster.until(PREDICTOR, "n", state("Loaded"))
        assert [await infer(cluster, name, 2) for name in ("m", "n")] == [4, 6]
        assert await pods() == before
        # Another prefix is another mesh: only new pods can be in it.
        await change(f"{cluster.namespace}-b")
        await until(lambda: has_keys(f"{cluster.namespace}-b"))

        async def replaced() -> bool:
            return bool(found := await pods()) and not found & before

        await until(replaced)
        for name in ("m", "n"):
            await cluster.until(PREDICTOR, name, lambda one: state("Loaded")(one) and one["status"]["available"])
        assert await infer(cluster, "n", 2) == 6
    finally:
        await cluster.stop_controller()
        etcd.kill()


def connection_of(found: Object) -> Any:
    """What the secret of etcd holds."""
    return json.loads(base64.b64decode(found["data"]["etcd_connection"]))


async def test_what_happens_while_no_controller_works_is_made_up_for(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    for name in ("m", "n"):
        await cluster.apply(predictor(name, "scale-2"))
    for name in ("m", "n"):
        await cluster.until(PREDICTOR, name, state("Loaded"))
    await cluster.stop_controller()
    await cluster.delete(PREDICTOR, "m")
    await cluster.apply(predictor("n", "scale-3"))
    held = await cluster.get(PREDICTOR, "m")
    assert held is not None and held["metadata"]["deletionTimestamp"]
    await cluster.start_controller()
    await cluster.until_gone(PREDICTOR, "m")
    updated = lambda one: one["status"].get("observedGeneration") == 2 and state("Loaded")(one)  # noqa: E731
    await cluster.until(PREDICTOR, "n", updated)
    assert await infer(cluster, "n", 2) == 6
    with pytest.raises(Exception, match="m"):
        await infer(cluster, "m", 2)


async def test_a_runtime_that_goes_while_no_controller_works_takes_its_pods_along(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    await cluster.stop_controller()
    budgets = await cluster.api.served(DISRUPTION_BUDGETS)
    assert budgets is not None and await cluster.get(budgets, OWN) is not None
    async with collecting(cluster.server, cluster.namespace):
        await cluster.delete(SERVING_RUNTIME, "own")
        await cluster.until_gone(DEPLOYMENT, OWN)
        await cluster.until_gone(budgets, OWN)
        await until(lambda: _no_pods(cluster))
        # Its model says so, and goes too.
        await cluster.start_controller()
        gone = lambda one: failed("NoSupportingRuntime")(one) and not one["status"]["available"]  # noqa: E731
        await cluster.until(PREDICTOR, "m", gone)
        await cluster.delete(PREDICTOR, "m")
        await cluster.until_gone(PREDICTOR, "m")


async def _no_pods(cluster: Cluster) -> bool:
    return not (await cluster.api.list(POD, cluster.namespace))[0]


async def test_a_namespace_that_is_deleted_takes_its_models_along(kubernetes: ApiServer, tmp_path: Path) -> None:
    async with running(kubernetes, tmp_path, cluster_scope=True) as cluster:
        write_model(cluster.models, "scale-2", SCALE.replace("FACTOR", "2"))
        team = f"{cluster.namespace}-team"
        labels = {"modelmesh-enabled": "true"}
        await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": team, "labels": labels}})
        stores = secret(team, "storage-config", models={"type": "pvc", "name": "models"})
        await cluster.apply(stores)
        for item in (runtime(), predictor("m", "scale-2"), predictor("waits", "scale-2", runtime={"name": "none"})):
            item["metadata"]["namespace"] = team
            await cluster.apply(item)
        await cluster.until(PREDICTOR, "m", state("Loaded"), team)
        async with collecting(kubernetes, cluster.namespace):
            await cluster.delete(NAMESPACE, team)
            await cluster.until_gone(NAMESPACE, team)
        # The controller goes on with others.
        await cluster.apply(runtime())
        await cluster.apply(predictor("m", "scale-2"))
        await cluster.until(PREDICTOR, "m", state("Loaded"))


async def test_another_controller_takes_over(cluster: Cluster) -> None:
    await cluster.apply(runtime())
    second = Controller(Api(cluster.server.controller_kubeconfig), Installation(cluster.namespace, cluster=False))
    working = asyncio.ensure_future(second.run())
    try:
        async with asyncio.timeout(WITHIN_S):
            while not second.is_ready():
                await asyncio.sleep(0.05)
        assert not second.ready.is_set(), "it stands by"
        await cluster.stop_controller()
        await asyncio.wait_for(second.ready.wait(), WITHIN_S)
        await cluster.apply(predictor("m", "scale-2"))
        await cluster.until(PREDICTOR, "m", state("Loaded"))
    finally:
        working.cancel()
        await asyncio.wait([working])


@pytest.fixture
async def candidates(kubernetes: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Two for one lease of short durations, and the way of the first to the API server."""
    for name, value in (("LEASE_S", 2), ("RENEW_WITHIN_S", 0.8), ("RETRY_S", 0.1)):
        monkeypatch.setattr(leader, name, value)
    way = await CuttingProxy(kubernetes.url.rpartition("/")[2]).start()
    by_the_way = tmp_path / "kubeconfig"
    write_kubeconfig(by_the_way, f"{kubernetes.scheme}://{way.endpoint}", TOKEN)
    apis = Api(by_the_way), Api(kubernetes.kubeconfig)
    where = Ref(f"candidates-{os.urandom(4).hex()}", "lease")
    await apis[1].apply(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": where.namespace}})
    try:
        yield Leader(apis[0], where, "first"), Leader(apis[1], where, "second"), way
    finally:
        await way.mend()
        await way.cut()
        for api in apis:
            await api.close()


async def test_a_controllers_process_answers_probes_and_tells_what_it_does(cluster: Cluster) -> None:
    await cluster.stop_controller()
    port = free_port()
    line = command("controller", "--namespace", cluster.namespace, "--namespace-scope", "--probe-port", str(port))
    line += ["--kubeconfig", str(cluster.server.controller_kubeconfig)]

    def ask(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    async def works() -> bool:
        return "\nmmcore_controller_working 1\n" in (await asyncio.to_thread(ask, "/metrics"))[1]

    with (cluster.folder / "controller.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment())
    try:
        await until(works)
        assert [(await asyncio.to_thread(ask, path))[0] for path in ("/healthz", "/readyz", "/other")] == [
            200,
            200,
            404,
        ]
        await cluster.apply(predictor("m", "scale-2"))
        await cluster.until(PREDICTOR, "m", failed("NoSupportingRuntime"))
        told = (await asyncio.to_thread(ask, "/metrics"))[1]
        assert 'mmcore_controller_requests_total{method="PATCH",resource="predictors"} 2' in told
        assert 'mmcore_controller_objects{resource="predictors"} 1' in told
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait(20)


async def test_a_controller_that_hears_nothing_more_stops_before_another_begins(candidates: Any) -> None:
    """A request to the API server may take longer than the lease is for."""
    first, second, way = candidates
    await asyncio.wait_for(first.acquire(), WITHIN_S)
    way.silence()
    holding, waiting = asyncio.ensure_future(first.hold()), asyncio.ensure_future(second.acquire())
    await asyncio.wait([holding, waiting], timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
    assert not waiting.done()
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(holding, WITHIN_S)
    await asyncio.wait_for(waiting, WITHIN_S)


async def test_a_controller_that_was_stopped_for_long_does_not_go_on(candidates: Any) -> None:
    first, second, _ = candidates
    await asyncio.wait_for(first.acquire(), WITHIN_S)
    holding = asyncio.ensure_future(first.hold())
    await asyncio.sleep(0)
    time.sleep(leader.RENEW_WITHIN_S + leader.RETRY_S)  # as where the process is stopped
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(holding, WITHIN_S)
    await asyncio.wait_for(second.acquire(), WITHIN_S)


async def test_what_others_tell_of_a_service_stays(cluster: Cluster) -> None:
    await cluster.apply(runtime("own", "python"))
    item = inference_service("s", {"model": {"modelFormat": {"name": "python"}, "storageUri": "pvc://models/scale-2"}})
    item["spec"]["transformer"] = {"containers": [{"name": "kserve-container", "image": "i"}]}
    await cluster.apply(item)

    def condition(one: Object, name: str) -> Object:
        return next((it for it in at(one, "status", "conditions") or [] if it["type"] == name), {})

    await cluster.until(INFERENCE_SERVICE, "s", lambda one: condition(one, "PredictorReady").get("status") == "True")
    found = await cluster.get(INFERENCE_SERVICE, "s")
    assert found is not None and condition(found, "Ready")["reason"] == "TransformerNotReady"
    since = condition(found, "PredictorReady")["lastTransitionTime"]
    theirs = {"type": "TransformerReady", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    change = {
        "status": {
            "conditions": [*found["status"]["conditions"], theirs],
            "components": {"transformer": {"url": "http://t"}},
            "address": {"url": "http://a"},
        }
    }
    await cluster.api.patch(INFERENCE_SERVICE, Ref(cluster.namespace, "s"), change, "status")
    found = await cluster.until(INFERENCE_SERVICE, "s", lambda one: condition(one, "Ready").get("status") == "True")
    assert condition(found, "TransformerReady") == theirs
    assert found["status"]["components"]["transformer"] == {"url": "http://t"}
    assert found["status"]["components"]["predictor"]["grpcUrl"] and found["status"]["address"] == {"url": "http://a"}
    assert condition(found, "PredictorReady")["lastTransitionTime"] == since


async def test_what_the_api_server_refuses_is_told(cluster: Cluster) -> None:
    wrong = runtime()
    wrong["spec"]["containers"][0]["env"] = [{"name": "NUMBER", "value": 5}]
    refused = f"The API server refuses the Deployment {OWN}: "

    def told(available: bool) -> Any:
        def fits(item: Object) -> bool:
            status = item.get("status") or {}
            [ready] = status.get("conditions") or [{}]
            info = status.get("lastFailureInfo") or {}
            return (
                info.get("reason") == "RuntimeUnhealthy"
                and info["message"].startswith(refused)
                and ready["message"].startswith(refused)
                and (status["available"], ready["status"]) == (available, str(available))
            )

        return fits

    await cluster.apply(wrong)
    await cluster.apply(predictor("m", "scale-2", runtime={"name": "own"}))
    service = {"modelFormat": {"name": "python"}, "storageUri": "pvc://models/scale-2", "runtime": "own"}
    await cluster.apply(inference_service("s", {"model": service}))
    await cluster.until(PREDICTOR, "m", told(available=False))
    failure = lambda one: str(at(one, "status", "modelStatus", "lastFailureInfo", "message"))  # noqa: E731
    await cluster.until(INFERENCE_SERVICE, "s", lambda one: failure(one).startswith(refused))
    for name, reason in (("own", "Refused"), ("m", "RuntimeUnhealthy"), ("s", "RuntimeUnhealthy")):
        events = await cluster.events(name)
        assert [one for one, text in events if one == reason and text.startswith(refused)], events
    # It is in no other's way, nor does another's pod hide it.
    await cluster.apply(runtime("other", "python"))
    await cluster.apply(predictor("n", "scale-2", runtime={"name": "other"}))
    await cluster.until(PREDICTOR, "n", lambda one: state("Loaded")(one) and not failed("RuntimeUnhealthy")(one))
    await cluster.until(PREDICTOR, "m", told(available=False))

    clear = lambda one: state("Loaded")(one) and one["status"]["available"] and not failed("RuntimeUnhealthy")(one)  # noqa: E731
    await cluster.apply(runtime())
    await cluster.until(PREDICTOR, "m", clear)
    await cluster.until(INFERENCE_SERVICE, "s", lambda one: failure(one) == "None")
    # What runs goes on, and what it is not changed to is told.
    await cluster.apply(wrong)
    await cluster.until(PREDICTOR, "m", told(available=True))
    assert await infer(cluster, "m", 2) == 4
    await cluster.apply(runtime())
    await cluster.until(PREDICTOR, "m", clear)


async def test_what_the_controller_may_not_make_is_told_by_all_models_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "kubernetes").mkdir()
    # One of its own, where the controller has no rights of other tests.
    server = OwnApiServer(tmp_path / "kubernetes")
    try:
        async with running(server.start(), tmp_path) as cluster:
            await may_not(cluster)
    finally:
        server.stop()


async def may_not(cluster: Cluster) -> None:
    write_model(cluster.models, "scale-2", SCALE.replace("FACTOR", "2"))
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", state("Loaded"))
    role = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{cluster.namespace}/roles/modelmesh-controller"
    found = await asyncio.to_thread(cluster.server.ask, "GET", role)

    async def allow(rules: list[Object]) -> None:
        body = {"rules": rules}
        await asyncio.to_thread(cluster.server.ask, "PATCH", role, body, "application/merge-patch+json")

    lesser = []
    for rule in found["rules"]:
        kept = rule if "networkpolicies" not in rule["resources"] else {**rule, "verbs": ["get", "list", "watch"]}
        lesser.append(kept)
    await allow(lesser)
    await cluster.delete(NETWORK_POLICY, "modelmesh-serving")
    refused = "The API server refuses the NetworkPolicy modelmesh-serving: "
    message = lambda one: str(at(one, "status", "lastFailureInfo", "message"))  # noqa: E731
    status = (await cluster.until(PREDICTOR, "m", lambda one: message(one).startswith(refused)))["status"]
    assert (status["available"], status["activeModelState"]) == (True, "Loaded")
    await allow(found["rules"])
    await cluster.until(PREDICTOR, "m", lambda one: message(one) == "None")
    assert await cluster.get(NETWORK_POLICY, "modelmesh-serving") is not None


async def test_deployments_of_a_clusters_runtimes_are_watched_too(kubernetes: ApiServer, tmp_path: Path) -> None:
    async with running(kubernetes, tmp_path, cluster_scope=True) as cluster:
        name = f"shared-{cluster.namespace}"
        await cluster.apply(runtime(name, kind="ClusterServingRuntime"))
        try:
            deployment = f"modelmesh-serving-{name}"
            await cluster.until(DEPLOYMENT, deployment, lambda one: one["spec"]["replicas"] == 0)
            change = {"spec": {"replicas": 3, "template": {"spec": {"terminationGracePeriodSeconds": 1}}}}
            await cluster.api.patch(DEPLOYMENT, Ref(cluster.namespace, deployment), change)
            back = lambda one: (  # noqa: E731
                one["spec"]["replicas"] == 0 and one["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 1
            )
            await cluster.until(DEPLOYMENT, deployment, back)
            policies, _ = await cluster.api.list(NETWORK_POLICY, cluster.namespace)
            assert [one["metadata"]["name"] for one in policies] == ["modelmesh-serving"]
        finally:
            await cluster.delete(CLUSTER_SERVING_RUNTIME, name)
