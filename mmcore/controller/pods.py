"""What pods tell: where they answer, and why they do not."""

from __future__ import annotations

from collections.abc import Iterable

from mmcore.controller.objects import Object, at, deleting

#: Reasons to wait that are part of every start.
_STARTING = ("ContainerCreating", "PodInitializing")


def is_ready(pod: Object) -> bool:
    """Whether it takes requests, and stays."""
    return not deleting(pod) and _condition(pod, "Ready").get("status") == "True" and bool(at(pod, "status", "podIP"))


def address(pod: Object, port: int) -> str:
    """Where a ready pod answers on one of its ports."""
    host = str(pod["status"]["podIP"])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def trouble(pods: Iterable[Object], deployment: Object | None) -> str:
    """Why none of these pods is ready, as far as they tell; empty where they are just starting."""
    for pod in pods:
        if found := _pod_trouble(pod):
            return f"pod {pod['metadata']['name']}: {found}"
    for condition in at(deployment, "status", "conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message") or condition.get("reason"))
    return ""


def _pod_trouble(pod: Object) -> str:
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".rstrip(": ")
    for status in at(pod, "status", "containerStatuses") or []:
        waiting = at(status, "state", "waiting") or {}
        ended = at(status, "state", "terminated") or at(status, "lastState", "terminated") or {}
        reason = waiting.get("reason")
        if reason and reason not in _STARTING:
            told = [reason, waiting.get("message"), ended.get("reason") and f"it ended with {ended['reason']}"]
            return f"container {status['name']}: " + ": ".join(filter(None, told))
        if ended and not status.get("ready"):
            return f"container {status['name']} ended with {ended.get('reason')} (exit code {ended.get('exitCode')})"
    return ""


def _condition(pod: Object, kind: str) -> Object:
    return next((one for one in at(pod, "status", "conditions") or [] if one.get("type") == kind), {})
