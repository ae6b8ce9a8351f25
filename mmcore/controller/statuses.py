"""The status of a Predictor or InferenceService, from what instances say of its vmodel and what the controller found.

Pure: statuses come in and go out as values, and the time is given. States, reasons and the sentences that users search
for are those of the archived controller; none of them is told by the text of an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from mmcore.controller.objects import Object, at
from mmcore.pb import model_mesh_pb2 as pb

_STATES: Final = pb.ModelStatusInfo.ModelStatus
_TRANSITIONS: Final = {
    pb.VModelStatusInfo.DEFINED: "UpToDate",
    pb.VModelStatusInfo.TRANSITIONING: "InProgress",
    pb.VModelStatusInfo.TRANSITION_FAILED: "BlockedByFailedLoad",
}
_MODEL_STATES: Final = {
    _STATES.NOT_LOADED: "Standby",
    _STATES.LOADING: "Loading",
    _STATES.LOADED: "Loaded",
    _STATES.LOADING_FAILED: "FailedToLoad",
}

PENDING: Final = "Pending"
FAILED: Final = "FailedToLoad"
#: Reasons of failures, as the schema lists them.
INVALID: Final = "InvalidPredictorSpec"
UNHEALTHY: Final = "RuntimeUnhealthy"
LOAD_FAILED: Final = "ModelLoadFailed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the model that is wanted is not served.

    Attributes:
        message: as the status has it.
        detail: what more a user can be told; conditions and Events have it.
        location, time: of a failed copy; time is RFC 3339, empty for now.
        model_id: the model's registered name.
    """

    reason: str
    message: str
    detail: str = ""
    location: str = ""
    time: str = ""
    model_id: str = ""

    @property
    def told(self) -> str:
        """Message and detail in one."""
        return f"{self.message}: {self.detail}" if self.detail else self.message


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What both kinds of object tell, each in its own form."""

    available: bool = False
    transition: str = "UpToDate"
    active: str = PENDING
    target: str = ""
    failure: Failure | None = None
    total_copies: int = 0
    failed_copies: int = 0
    grpc: str = ""
    http: str = ""
    generation: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def observe(
    vmodel: pb.VModelStatusInfo | None,
    wanted: str,
    before: ModelStatus,
    problem: Failure | None,
) -> ModelStatus:
    """The status now.

    Args:
        vmodel: what instances say; None where none can be asked or they know of none.
        wanted: the registered name of the model that the object asks for; empty where there is no such.
        before: the status that the object has.
        problem: what the controller itself found: an invalid spec, no fitting runtime, no ready pod.
    """
    if vmodel is None or vmodel.status == pb.VModelStatusInfo.NOT_FOUND:
        return _unregistered(before, problem)
    active = _state(vmodel.activeModelStatus, before.active)
    moves = vmodel.activeModelId != vmodel.targetModelId
    target = _state(vmodel.targetModelStatus, before.target) if moves else ""
    transition = _TRANSITIONS.get(vmodel.status, before.transition)
    newest = vmodel.targetModelStatus if moves else vmodel.activeModelStatus
    failure = problem or _load_failure(newest, vmodel.targetModelId)
    if problem is not None:
        if problem.reason == INVALID:
            transition = "InvalidSpec"
        elif problem.reason == UNHEALTHY:
            # Registered and waiting for a pod.
            if moves and target in ("Standby", FAILED):
                target, transition = "Loading", "InProgress"
            elif not moves and active in ("Standby", FAILED):
                active = "Loading"
        else:
            # What is wanted goes nowhere; what is served stays.
            transition, target = "BlockedByFailedLoad", FAILED
    copies = _copies(vmodel, moves)
    waits = problem is not None and problem.reason == UNHEALTHY and wanted in ("", vmodel.activeModelId)
    served = active in ("Loaded", "Standby") or (active == "Loading" and before.available)
    return ModelStatus(
        available=served and not waits,
        transition=transition,
        active=active,
        target=target,
        failure=failure,
        total_copies=len(copies),
        failed_copies=sum(copy.copyStatus == _STATES.LOADING_FAILED for copy in copies),
    )


def unreachable(before: ModelStatus, detail: str, refused: str = "") -> ModelStatus:
    """The status while no instance can be asked: states are those last known, and nothing is available.

    ``refused`` is why there is none, where the API server does not take what instances need.
    """
    failure = Failure(UNHEALTHY, refused or "Waiting for runtime Pod to become available", detail)
    return ModelStatus(
        transition=before.transition,
        active=before.active,
        target=before.target,
        failure=failure,
        total_copies=0,
        failed_copies=0,
    )


def _unregistered(before: ModelStatus, problem: Failure | None) -> ModelStatus:
    if problem is None:
        return ModelStatus(transition="UpToDate", active=PENDING)
    if problem.reason == INVALID:
        return ModelStatus(transition="InvalidSpec", active=PENDING, failure=problem)
    if problem.reason == UNHEALTHY:
        return ModelStatus(active=before.active if before.active != FAILED else PENDING, failure=problem)
    return ModelStatus(transition="UpToDate", active=FAILED, failure=problem)


def _state(info: pb.ModelStatusInfo, before: str) -> str:
    return _MODEL_STATES.get(info.status, before or PENDING)


def _load_failure(info: pb.ModelStatusInfo, model_id: str) -> Failure | None:
    if info.status == _STATES.LOADED or not info.errors:
        return None
    failed = next((copy for copy in info.modelCopyInfos if copy.copyStatus == _STATES.LOADING_FAILED), None)
    location = failed.location[-12:] if failed is not None else ""
    time = rfc3339(datetime.fromtimestamp(failed.time / 1000, UTC)) if failed is not None and failed.time else ""
    return Failure(LOAD_FAILED, info.errors[0], location=location, time=time, model_id=model_id)


def _copies(vmodel: pb.VModelStatusInfo, moves: bool) -> Sequence[Any]:
    copies = list(vmodel.activeModelStatus.modelCopyInfos)
    return [*copies, *vmodel.targetModelStatus.modelCopyInfos] if moves else copies


def rfc3339(moment: datetime) -> str:
    """A time as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# The two forms.


def read_predictor(resource: Object) -> ModelStatus:
    """The status that a Predictor has."""
    status = resource.get("status") or {}
    return ModelStatus(
        available=bool(status.get("available")),
        transition=status.get("transitionStatus") or "UpToDate",
        active=status.get("activeModelState") or PENDING,
        target=status.get("targetModelState") or "",
    )


def predictor_status(resource: Object, status: ModelStatus, now: datetime) -> Object:
    """The status of a Predictor, with the times of what has not changed kept; absent fields are None."""
    before = resource.get("status") or {}
    info = _failure_info(status.failure, before.get("lastFailureInfo"), "modelId", now)
    ready = _condition("Ready", status, resource["metadata"].get("generation", 0))
    return {
        "available": status.available,
        "transitionStatus": status.transition,
        "activeModelState": status.active,
        "targetModelState": status.target or None,
        "totalCopies": status.total_copies,
        "failedCopies": status.failed_copies,
        "grpcEndpoint": status.grpc or None,
        "httpEndpoint": status.http or None,
        "observedGeneration": resource["metadata"].get("generation", 0),
        "lastFailureInfo": info,
        "conditions": merge_conditions(before.get("conditions") or [], [ready], now),
    }


def read_inference_service(resource: Object) -> ModelStatus:
    """The status that an InferenceService has."""
    status = at(resource, "status", "modelStatus") or {}
    conditions = at(resource, "status", "conditions") or []
    ready: Object = next((one for one in conditions if one.get("type") == "PredictorReady"), {})
    return ModelStatus(
        available=ready.get("status") == "True",
        transition=status.get("transitionStatus") or "UpToDate",
        active=at(status, "states", "activeModelState") or PENDING,
        target=at(status, "states", "targetModelState") or "",
    )


def inference_service_status(resource: Object, status: ModelStatus, now: datetime) -> Object:
    """What is ours in the status of an InferenceService; what KServe's controller wrote of a transformer stays."""
    before = resource.get("status") or {}
    info = _failure_info(status.failure, at(before, "modelStatus", "lastFailureInfo"), "modelRevisionName", now)
    generation = resource["metadata"].get("generation", 0)
    predictor = _condition("PredictorReady", status, generation)
    found = before.get("conditions") or []
    conditions = merge_conditions(found, [predictor, _all_ready(resource, found, predictor)], now)
    return {
        "url": status.grpc or None if status.available else None,
        "observedGeneration": generation,
        "components": {
            "predictor": {
                "url": status.grpc or None,
                "grpcUrl": status.grpc or None,
                "restUrl": status.http or None,
            }
            if status.available
            else None
        },
        "modelStatus": {
            "transitionStatus": status.transition,
            "states": {"activeModelState": status.active, "targetModelState": status.target or None},
            "copies": {"totalCopies": status.total_copies, "failedCopies": status.failed_copies},
            "lastFailureInfo": info,
        },
        "conditions": conditions,
    }


def _all_ready(resource: Object, found: Sequence[Object], predictor: Object) -> Object:
    """Ready: the predictor is, and the transformer where there is one."""
    ready: Object = {**predictor, "type": "Ready"}
    if predictor["status"] != "True" or not at(resource, "spec", "transformer"):
        return ready
    transformer = next((one for one in found if one.get("type") == "TransformerReady"), {})
    if transformer.get("status") == "True":
        return ready
    message = str(transformer.get("message") or "the transformer is not ready")
    return {**ready, "status": "False", "reason": "TransformerNotReady", "message": message}


def _condition(kind: str, status: ModelStatus, generation: int) -> Object:
    failure = status.failure
    reason = status.active if status.available or failure is None else failure.reason
    message = failure.told if failure is not None else ""
    state = "True" if status.available else "False"
    return {
        "type": kind,
        "status": state,
        "reason": reason or PENDING,
        "message": message,
        "observedGeneration": generation,
    }


def merge_conditions(before: Sequence[Object], ours: Sequence[Object], now: datetime) -> list[Object]:
    """The conditions of before with ours in their place; a time changes only with the status that it belongs to."""
    merged = {one["type"]: one for one in before}
    for condition in ours:
        known = merged.get(condition["type"])
        same = known is not None and known.get("status") == condition["status"] and known.get("lastTransitionTime")
        time = known["lastTransitionTime"] if same and known is not None else rfc3339(now)
        # An empty text is left out, as API servers would.
        stated = {key: value for key, value in condition.items() if value != ""}
        merged[condition["type"]] = {**stated, "lastTransitionTime": time}
    return list(merged.values())


def _failure_info(failure: Failure | None, before: Object | None, id_field: str, now: datetime) -> Object | None:
    if failure is None:
        return None
    return {
        "reason": failure.reason,
        "message": failure.message,
        "location": failure.location or None,
        id_field: failure.model_id or None,
        "time": _failure_time(failure, before, id_field, now),
    }


def _failure_time(failure: Failure, before: Object | None, id_field: str, now: datetime) -> str:
    if failure.time:
        return failure.time
    said = (failure.reason, failure.message, failure.model_id)
    if before and (before.get("reason"), before.get("message"), before.get(id_field) or "") == said:
        return before.get("time") or rfc3339(now)
    return rfc3339(now)
