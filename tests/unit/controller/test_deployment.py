"""The Deployment of a runtime: what stands in its pods, and what leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes_validate import validate

from mmcore.controller.deployment import (
    Place,
    capacity_bytes,
    claims_of,
    deployment,
    models_limit,
    with_architectures,
)
from mmcore.controller.objects import Object
from mmcore.controller.runtime_address import runtime_address
from mmcore.controller.runtimes import Runtime
from mmcore.controller.serving_config import ServingConfig
from tests.unit.controller.objects import own_runtime, runtime

CONFIG = ServingConfig()
PLACE = Place("models", "model-serving-etcd")


def made(item: Runtime, config: ServingConfig = CONFIG, place: Place = PLACE) -> Object:
    found = deployment(item, config, place, 2)
    validate(found, "1.33", strict=True)
    return found


def pod(item: Runtime, config: ServingConfig = CONFIG, place: Place = PLACE) -> Object:
    spec: Object = made(item, config, place)["spec"]["template"]["spec"]
    return spec


def container(spec: Object, name: str = "mmcore") -> Object:
    found: Object = next(one for one in spec["containers"] if one["name"] == name)
    return found


def environment(spec: Object) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in container(spec)["env"]}


def test_a_runtime_of_our_formats_is_one_container() -> None:
    spec = pod(own_runtime())
    assert [one["name"] for one in spec["containers"]] == ["mmcore"]
    # The runtime's own resources are the instance's, and its capacity follows from them.
    assert container(spec)["resources"] == {"limits": {"memory": "2Gi"}, "requests": {"cpu": "1"}}
    assert environment(spec)["MMCORE_CAPACITY"] == str(int(2 * 2**30 * 0.8))
    assert "MMCORE_RUNTIME" not in environment(spec)


LIMITS = ("LOAD_TIMEOUT", "LOADS_AT_ONCE", "MODEL_CONCURRENCY")


@pytest.mark.parametrize(
    ("adapter", "env", "annotations", "told"),
    [
        ({"modelLoadingTimeoutMillis": 0}, {}, {}, (None, None, None)),
        ({"modelLoadingTimeoutMillis": 90000}, {}, {"maxLoadingConcurrency": "2"}, ("90000ms", "2", None)),
        ({}, {}, {"perModelConcurrencyLimit": "0"}, (None, None, "0")),
        # Variables of the adapter go before.
        (
            {"modelLoadingTimeoutMillis": 90000},
            {"LOADTIME_TIMEOUT": "500", "LOADING_CONCURRENCY": "3", "LIMIT_PER_MODEL_CONCURRENCY": "4"},
            {"maxLoadingConcurrency": "2", "perModelConcurrencyLimit": "5"},
            ("500ms", "3", "4"),
        ),
        # And ours where nothing of theirs says otherwise.
        ({}, {"MMCORE_RUNTIME_LOAD_TIMEOUT": "7s"}, {}, ("7s", None, None)),
    ],
)
def test_limits_of_loads_and_requests_are_the_instances(
    adapter: Object, env: dict[str, str], annotations: dict[str, str], told: tuple[str | None, ...]
) -> None:
    entries = [{"name": name, "value": value} for name, value in env.items()]
    item = runtime(builtInAdapter={"serverType": "triton", "memBufferBytes": 1, "env": entries, **adapter})
    item.resource["metadata"]["annotations"] = annotations
    found = environment(pod(item))
    assert tuple(found.get(f"MMCORE_RUNTIME_{name}") for name in LIMITS) == told
    assert not {"LOADTIME_TIMEOUT", "LOADING_CONCURRENCY", "LIMIT_PER_MODEL_CONCURRENCY"} & found.keys()


def test_instances_that_hold_models_themselves_load_as_many_at_once() -> None:
    item = own_runtime()
    item.resource["metadata"]["annotations"] = {"maxLoadingConcurrency": "5", "perModelConcurrencyLimit": "4"}
    found = environment(pod(item))
    assert found["MMCORE_LOADER_THREADS"] == "5"
    assert not [name for name in found if name.startswith("MMCORE_RUNTIME")]


def test_a_buffer_that_the_adapter_was_told_by_a_variable_goes_before_the_field() -> None:
    env = [{"name": "MEM_BUFFER_BYTES", "value": str(2**20)}]
    item = runtime(builtInAdapter={"serverType": "triton", "memBufferBytes": 5, "env": env})
    assert environment(pod(item))["MMCORE_CAPACITY"] == str(2**30 - 2**20)


def test_another_server_has_one_instance_beside_it_and_nothing_else() -> None:
    spec = pod(runtime())
    assert [one["name"] for one in spec["containers"]] == ["triton", "mmcore"]
    assert environment(spec)["MMCORE_RUNTIME"] == "triton://127.0.0.1:8001?repo=/models/_triton_models"
    assert environment(spec)["MMCORE_CAPACITY"] == str(2**30 - 134217728)


def test_labels_and_names_are_those_that_services_and_dashboards_ask_for() -> None:
    found = made(runtime())
    assert found["metadata"]["name"] == "modelmesh-serving-triton-2.x"
    assert found["spec"]["selector"]["matchLabels"] == {
        "modelmesh-service": "modelmesh-serving",
        "name": "modelmesh-serving-triton-2.x",
    }
    assert found["metadata"]["ownerReferences"][0]["uid"] == "1"
    labels = environment(found["spec"]["template"]["spec"])["MMCORE_LABEL"]
    assert labels == "mt:onnx mt:onnx:1 pv:grpc-v2 pv:v2 rt:triton-2.x"


def test_our_container_needs_no_rights() -> None:
    security = container(pod(runtime()))["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["capabilities"] == {"drop": ["ALL"]} and not security["allowPrivilegeEscalation"]


def test_a_rollout_keeps_serving() -> None:
    found = made(runtime())
    assert found["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": "75%", "maxUnavailable": "15%"}
    spec = found["spec"]["template"]["spec"]
    one = container(spec)
    assert one["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert one["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    grace = int(environment(spec)["MMCORE_GRACE"].removesuffix("s"))
    assert 5 + grace < spec["terminationGracePeriodSeconds"]


def test_another_server_is_told_to_end_when_the_instance_has_ended_its_calls() -> None:
    stop = container(pod(runtime()), "triton")["lifecycle"]["preStop"]
    assert stop == {"httpGet": {"path": "/drained", "port": 2112}}
    tls = ServingConfig.read("tls: {secretName: s}\nmetrics: {port: 9}")
    stop = container(pod(runtime(), tls), "triton")["lifecycle"]["preStop"]
    assert stop == {"httpGet": {"path": "/drained", "port": 9, "scheme": "HTTPS"}}
    # Who says how it is to end, says it.
    own = {"preStop": {"exec": {"command": ["true"]}}}
    stated = runtime(containers=[{"name": "triton", "image": "t", "lifecycle": own}])
    assert container(pod(stated), "triton")["lifecycle"] == own


def test_the_folder_of_models_has_room_before_the_kubelet_evicts_the_pod() -> None:
    spec = pod(runtime())
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert volumes["models-dir"]["emptyDir"] == {"sizeLimit": "1536Mi"}
    assert int(environment(spec)["MMCORE_MODEL_CACHE_LIMIT"]) < 1536 * 2**20
    without = runtime(containers=[{"name": "triton", "image": "t"}])
    assert models_limit(without, CONFIG) == 0
    assert {"name": "models-dir", "emptyDir": {}} in pod(without)["volumes"]


def test_the_secret_of_stores_may_be_missing() -> None:
    volumes = {one["name"]: one for one in pod(runtime())["volumes"]}
    assert volumes["storage-config"]["secret"] == {"secretName": "storage-config", "optional": True}


def test_claims_are_mounted_in_every_container_each_with_mounts_of_its_own() -> None:
    item = runtime(
        containers=[{"name": "triton", "image": "t", "volumeMounts": [{"name": "x", "mountPath": "/x"}]}],
        volumes=[{"name": "x", "emptyDir": {}}],
    )
    spec = pod(item, place=Place("models", "etcd", ("claim.a", "claim-b")))
    for name in ("triton", "mmcore"):
        paths = [one["mountPath"] for one in container(spec, name)["volumeMounts"]]
        assert {"/models", "/pvc_mounts/claim.a", "/pvc_mounts/claim-b"} <= set(paths)
        assert len(paths) == len(set(paths))
    assert "/x" in [one["mountPath"] for one in container(spec, "triton")["volumeMounts"]]
    assert "/x" not in [one["mountPath"] for one in container(spec)["volumeMounts"]]


def test_a_users_affinity_is_narrowed_and_never_widened() -> None:
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [zone]}, {"matchExpressions": [zone]}]}
    found = with_architectures({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})
    made_terms = found["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(made_terms) == 2
    for term in made_terms:
        assert [one["key"] for one in term["matchExpressions"]] == ["zone", "kubernetes.io/arch"]


def test_what_the_user_sets_goes_into_the_pods() -> None:
    config = ServingConfig.read(
        "runtimePodLabels: {team: a, name: not-this}\nimagePullSecrets: [{name: one}, {name: two}]\n"
        "serviceAccountName: models\ninternalModelMeshEnvVars: [{name: A, value: b}, {name: MMCORE_HOST, value: x}]\n"
    )
    item = runtime(
        labels={"team": "b"}, nodeSelector={"gpu": "yes"}, imagePullSecrets=[{"name": "two"}, {"name": "three"}]
    )
    found = made(item, config)
    template = found["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "b"
    assert template["metadata"]["labels"]["name"] == "modelmesh-serving-triton-2.x"
    spec = template["spec"]
    assert [one["name"] for one in spec["imagePullSecrets"]] == ["one", "two", "three"]
    assert spec["nodeSelector"] == {"gpu": "yes"} and spec["serviceAccountName"] == "models"
    # Ours go before, so that an old setting cannot cut an instance off.
    assert environment(spec)["A"] == "b" and environment(spec)["MMCORE_HOST"] == "::"


def test_what_a_runtime_says_of_its_pods_is_so() -> None:
    probe = {"httpGet": {"path": "/ready", "port": 1}}
    item = runtime(
        containers=[{"name": "triton", "image": "t", "readinessProbe": probe}],
        initContainers=[{"name": "fetch", "image": "f"}],
        runtimeClassName="nvidia", priorityClassName="high", hostIPC=True,
        securityContext={"runAsUser": 7},
    )  # fmt: skip
    spec = pod(item, place=Place("models", "etcd", ("claim",)))
    assert (spec["runtimeClassName"], spec["priorityClassName"], spec["hostIPC"]) == ("nvidia", "high", True)
    assert spec["securityContext"] == {"fsGroup": 2000, "runAsUser": 7}
    [first] = spec["initContainers"]
    assert [one["mountPath"] for one in first["volumeMounts"]] == ["/models", "/pvc_mounts/claim"]
    # A server that has crashed is not asked: the pod is ready when both of its containers are.
    assert container(spec, "triton")["readinessProbe"] == probe


def test_a_custom_runtime_is_reached_by_its_endpoint() -> None:
    item = runtime(
        builtInAdapter=None, grpcEndpoint="unix:///tmp/mm/grpc.sock", containers=[{"name": "c", "image": "c"}]
    )
    assert runtime_address(item) == "unix:/tmp/mm/grpc.sock"
    spec = pod(item)
    for name in ("c", "mmcore"):
        assert {"name": "domain-socket", "mountPath": "/tmp/mm"} in container(spec, name)["volumeMounts"]
    spi = {"builtInAdapter": None, "grpcEndpoint": "port:8085"}
    assert runtime_address(runtime(**spi)) == "127.0.0.1:8085"
    assert runtime_address(runtime(**spi, grpcDataEndpoint="port:8085")) == "127.0.0.1:8085"
    assert runtime_address(runtime(**spi, grpcDataEndpoint="port:8001")) == "127.0.0.1:8085?data=127.0.0.1:8001"


def test_servers_with_a_port_for_management_are_told_both() -> None:
    ovms = {
        "builtInAdapter": {"serverType": "ovms", "runtimeManagementPort": 8888},
        "grpcDataEndpoint": "port:8001",
        "containers": [{"name": "ovms", "args": ["--port=8001", "--config_path=/models/list.json"]}],
    }
    expected = "ovms://127.0.0.1:8001?repo=/models/_ovms_models&rest=8888&config="
    assert runtime_address(runtime(**ovms)) == expected + "/models/list.json"
    assert runtime_address(runtime(**{**ovms, "containers": [{"name": "ovms"}]})) == (
        expected + "/models/model_config_list.json"
    )
    torchserve = {"builtInAdapter": {"serverType": "torchserve"}, "containers": [{"name": "torchserve"}]}
    told = "torchserve://127.0.0.1:7070?repo=/models/_torchserve_models&management=7071"
    assert runtime_address(runtime(**torchserve)) == told


def test_nothing_of_the_controller_itself_is_in_the_pods() -> None:
    # An upgrade of the controller rolls pods only where the image that they run changes.
    config = ServingConfig.read("mmcoreImage: {name: mine, tag: fixed}")
    assert "0.1" not in str(made(own_runtime(), config)["spec"])


@pytest.mark.parametrize(
    ("containers", "capacity"),
    [
        ([{"name": "triton", "resources": {"requests": {"memory": "2Gi"}}}], 2 * 2**30 - 134217728),
        ([{"name": "triton", "resources": {"limits": {"memory": "100Mi"}}}], 1),
        ([{"name": "triton"}], None),
        ([{"name": "triton", "resources": {"limits": {"memory": "1Gi"}}}, {"name": "log"}], 2**30 - 134217728),
    ],
)
def test_capacity_follows_from_the_servers_memory(containers: list[Object], capacity: int | None) -> None:
    assert capacity_bytes(runtime(containers=containers), {}) == capacity


def test_which_claims_are_mounted() -> None:
    entries = [{"type": "pvc", "name": "b"}, {"type": "s3"}, {"type": "pvc"}]
    assert claims_of(entries, ["a"], None) == ("b",)
    assert claims_of(entries, ["a", "missing"], ["a"]) == ("a", "b")
