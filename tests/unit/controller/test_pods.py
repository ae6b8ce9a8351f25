"""Why no pod answers, from what pods and their Deployment tell."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmcore.controller import pods
from mmcore.controller.objects import Object


def pod(*containers: Object, **scheduled: str) -> Object:
    status: Object = {"containerStatuses": list(containers)}
    if scheduled:
        status["conditions"] = [{"type": "PodScheduled", "status": "False", **scheduled}]
    return {"metadata": {"name": "p"}, "status": status}


def container(**status: Any) -> Object:
    return {"name": "triton", "ready": False, **status}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (pod(reason="Unschedulable", message="0/3 nodes have enough memory"), "Unschedulable: 0/3 nodes"),
        (pod(container(state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})), "ImagePullBackOff"),
        (
            pod(
                container(
                    state={"waiting": {"reason": "CrashLoopBackOff"}},
                    lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}},
                )
            ),
            "CrashLoopBackOff: it ended with OOMKilled",
        ),
        (pod(container(state={"terminated": {"reason": "Error", "exitCode": 2}})), r"ended with Error \(exit code 2\)"),
        (pod(container(state={"waiting": {"reason": "ContainerCreating"}})), "^$"),
        (pod(container(state={"running": {}})), "^$"),
    ],
)
def test_what_a_pod_tells(found: Object, told: str) -> None:
    assert re.search(told, pods.trouble([found], None))


def test_a_deployment_whose_pods_are_refused_says_so() -> None:
    condition = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: pods=3"}
    assert pods.trouble([], {"status": {"conditions": [condition]}}) == "exceeded quota: pods=3"
    assert pods.trouble([], None) == pods.trouble([], {"status": {}}) == ""


def test_a_pod_is_ready_when_it_says_so_has_an_address_and_stays() -> None:
    ready: Object = {
        "metadata": {"name": "p"},
        "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }
    assert pods.is_ready(ready) and pods.address(ready, 8033) == "10.0.0.1:8033"
    assert not pods.is_ready({**ready, "metadata": {"name": "p", "deletionTimestamp": "now"}})
    assert not pods.is_ready({**ready, "status": {**ready["status"], "podIP": None}})
    assert pods.address({"status": {"podIP": "fd00::1"}}, 8033) == "[fd00::1]:8033"
