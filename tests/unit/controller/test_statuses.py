"""The status of an object, from what instances say of its model and what stands against it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mmcore.controller.statuses import (
    INVALID,
    UNHEALTHY,
    Failure,
    ModelStatus,
    inference_service_status,
    observe,
    predictor_status,
    read_inference_service,
    read_predictor,
    unreachable,
)
from mmcore.pb import model_mesh_pb2 as pb

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NEW = ModelStatus()
STATES = pb.ModelStatusInfo.ModelStatus


def model(state: str, *errors: str, copies: tuple[str, ...] = ()) -> pb.ModelStatusInfo:
    status = pb.ModelStatusInfo(status=state, errors=errors)
    for number, copy in enumerate(copies):
        status.modelCopyInfos.add(location=f"instance-number-{number}", copyStatus=copy, time=1_700_000_000_000)
    return status


def vmodel(
    state: str = "DEFINED", active: pb.ModelStatusInfo | None = None, target: pb.ModelStatusInfo | None = None
) -> pb.VModelStatusInfo:
    return pb.VModelStatusInfo(
        status=state,
        activeModelId="a",
        targetModelId="b" if target is not None else "a",
        activeModelStatus=active or model("LOADED", copies=("LOADED",)),
        targetModelStatus=target,
        owner="ksp",
    )


@pytest.mark.parametrize(
    ("raw", "state", "available"),
    [("LOADED", "Loaded", True), ("NOT_LOADED", "Standby", True), ("LOADING", "Loading", False)],
)
def test_the_states_of_a_model(raw: str, state: str, available: bool) -> None:
    found = observe(vmodel(active=model(raw)), "a", NEW, None)
    assert (found.active, found.available, found.transition, found.target) == (state, available, "UpToDate", "")


def test_a_model_that_is_loaded_again_stays_available() -> None:
    loaded = replace(NEW, active="Loaded", available=True)
    assert observe(vmodel(active=model("LOADING")), "a", loaded, None).available


def test_a_state_that_is_not_known_leaves_the_last_one() -> None:
    assert observe(vmodel(active=model("UNKNOWN")), "a", replace(NEW, active="Standby"), None).active == "Standby"


def test_a_load_that_failed_is_told_with_place_and_time() -> None:
    failed = model("LOADING_FAILED", "no such object", "older", copies=("LOADING_FAILED",))
    found = observe(vmodel(active=failed), "a", NEW, None)
    assert (found.active, found.available, found.failed_copies, found.total_copies) == ("FailedToLoad", False, 1, 1)
    assert found.failure == Failure(
        "ModelLoadFailed",
        "no such object",
        location="nce-number-0",
        time="2023-11-14T22:13:20Z",
        model_id="a",
    )


def test_what_an_error_says_decides_nothing() -> None:
    # By this sentence the archived controller told a missing runtime from a failed load.
    text = "There are no running instances that meet the label requirements of type rt:x: [_no_runtime]"
    found = observe(vmodel(active=model("LOADING_FAILED", text)), "a", NEW, None)
    assert found.failure is not None
    assert (found.active, found.failure.reason, found.failure.message) == ("FailedToLoad", "ModelLoadFailed", text)


def test_a_new_model_that_cannot_be_loaded_leaves_the_old_one_serving() -> None:
    failed = model("LOADING_FAILED", "bad path", copies=("LOADING_FAILED",))
    found = observe(vmodel("TRANSITION_FAILED", target=failed), "b", NEW, None)
    assert (found.active, found.target, found.transition) == ("Loaded", "FailedToLoad", "BlockedByFailedLoad")
    assert found.available and found.failure is not None and found.failure.model_id == "b"
    assert (found.total_copies, found.failed_copies) == (2, 1)


def test_a_transition() -> None:
    found = observe(vmodel("TRANSITIONING", target=model("LOADING")), "b", NEW, None)
    assert (found.active, found.target, found.transition, found.available) == ("Loaded", "Loading", "InProgress", True)


def test_an_old_error_of_a_loaded_model_is_nobodys_failure() -> None:
    assert observe(vmodel(active=model("LOADED", "once")), "a", NEW, None).failure is None


def test_an_invalid_object_that_never_was_is_not_available() -> None:
    found = observe(None, "", NEW, Failure(INVALID, "wrong"))
    assert (found.transition, found.active, found.available) == ("InvalidSpec", "Pending", False)


def test_an_object_made_invalid_goes_on_serving_what_it_was() -> None:
    found = observe(vmodel(), "", NEW, Failure(INVALID, "wrong"))
    assert (found.transition, found.active, found.available) == ("InvalidSpec", "Loaded", True)


def test_no_runtime_for_a_new_model() -> None:
    found = observe(None, "", NEW, Failure("NoSupportingRuntime", "none"))
    assert (found.transition, found.active, found.available) == ("UpToDate", "FailedToLoad", False)


def test_no_runtime_for_a_changed_one() -> None:
    found = observe(vmodel(), "", NEW, Failure("NoSupportingRuntime", "none"))
    assert (found.transition, found.active, found.target, found.available) == (
        "BlockedByFailedLoad",
        "Loaded",
        "FailedToLoad",
        True,
    )


def test_a_model_that_waits_for_a_pod_is_loading_and_not_blocked() -> None:
    waits = Failure(UNHEALTHY, "waiting")
    found = observe(vmodel(active=model("NOT_LOADED")), "a", NEW, waits)
    assert (found.active, found.available, found.transition) == ("Loading", False, "UpToDate")
    moving = observe(vmodel("TRANSITION_FAILED", target=model("LOADING_FAILED", "x")), "b", NEW, waits)
    assert (moving.target, moving.transition, moving.available) == ("Loading", "InProgress", True)


def test_nothing_is_available_while_no_instance_can_be_asked() -> None:
    loaded = replace(NEW, active="Loaded", available=True)
    found = unreachable(loaded, "pod x: OOMKilled")
    assert (found.active, found.available) == ("Loaded", False)
    assert found.failure is not None and "OOMKilled" in found.failure.told


def predictor(status: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"metadata": {"name": "m", "generation": 3}, "status": status or {}, "spec": {}}


def test_times_change_only_with_what_they_tell_of() -> None:
    failure = Failure("NoSupportingRuntime", "none")
    first = predictor_status(predictor(), observe(None, "", NEW, failure), NOW)
    later = predictor_status(predictor(first), observe(None, "", NEW, failure), NOW + timedelta(hours=1))
    assert later == first
    assert first["lastFailureInfo"]["time"] == first["conditions"][0]["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    other = predictor_status(predictor(first), observe(vmodel(), "a", NEW, None), NOW + timedelta(hours=1))
    assert other["conditions"][0]["status"] == "True"
    assert other["conditions"][0]["lastTransitionTime"] == "2026-01-01T01:00:00Z"
    assert other["lastFailureInfo"] is None
    assert other["conditions"][0]["observedGeneration"] == 3


def test_a_predictors_status_is_read_as_it_was_written() -> None:
    status = observe(vmodel("TRANSITIONING", target=model("LOADING")), "b", NEW, None)
    read = read_predictor(predictor(predictor_status(predictor(), status, NOW)))
    assert (read.active, read.target, read.transition, read.available) == ("Loaded", "Loading", "InProgress", True)


def service(status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "m", "generation": 1}, "status": status or {}, "spec": spec}


LOADED = replace(observe(vmodel(), "a", NEW, None), grpc="grpc://s.n:8033", http="http://s.n:8008")


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}


def test_an_inference_service() -> None:
    status = inference_service_status(service(), LOADED, NOW)
    assert status["url"] == "grpc://s.n:8033"
    assert status["components"]["predictor"]["restUrl"] == "http://s.n:8008"
    assert conditions(status) == {"PredictorReady": ("True", "Loaded"), "Ready": ("True", "Loaded")}
    assert status["modelStatus"]["states"]["activeModelState"] == "Loaded"
    assert read_inference_service(service(status)).available


def test_why_an_inference_service_is_not_ready() -> None:
    found = observe(None, "", NEW, Failure("NoSupportingRuntime", "none", "the formats are: a"))
    status = inference_service_status(service(), found, NOW)
    assert conditions(status)["Ready"] == ("False", "NoSupportingRuntime")
    assert status["conditions"][0]["message"] == "none: the formats are: a"
    assert status["url"] is None and status["components"]["predictor"] is None


def test_what_others_wrote_stays() -> None:
    theirs = {"type": "TransformerReady", "status": "False", "message": "no revision", "lastTransitionTime": "t"}
    ingress = {"type": "IngressReady", "status": "True", "lastTransitionTime": "t"}
    item = service({"conditions": [theirs, ingress], "components": {"transformer": {"url": "u"}}}, transformer={"x": 1})
    status = inference_service_status(item, LOADED, NOW)
    assert theirs in status["conditions"] and ingress in status["conditions"]
    assert conditions({"conditions": [one for one in status["conditions"] if "reason" in one]}) == {
        "PredictorReady": ("True", "Loaded"),
        "Ready": ("False", "TransformerNotReady"),
    }
    # A merge patch: the transformer's part is not named and so not touched.
    assert "transformer" not in status["components"]
