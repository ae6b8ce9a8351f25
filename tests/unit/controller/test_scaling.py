"""Scaling to zero and back, over restarts of the controller too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from mmcore.controller.scaling import IDLE_SINCE, Scale, scale
from mmcore.controller.serving_config import ServingConfig
from tests.unit.controller.objects import runtime

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = ServingConfig.read("podsPerRuntime: 2\nscaleToZero: {gracePeriodSeconds: 60}")


def found(replicas: int, idle: timedelta | None = None) -> dict[str, Any]:
    marks = {IDLE_SINCE: (NOW - idle).isoformat()} if idle is not None else {}
    return {"metadata": {"annotations": marks}, "spec": {"replicas": replicas}}


def decide(before: dict[str, Any] | None, *, wanted: bool, config: ServingConfig = CONFIG, **spec: Any) -> Scale:
    return scale(runtime(**spec), config, before, wanted=wanted, now=NOW)


def test_a_runtime_without_models_starts_with_none() -> None:
    assert decide(None, wanted=False).replicas == 0
    assert decide(found(0), wanted=False).replicas == 0
    # That its grace has only begun wakes nothing up.
    assert decide(found(0, timedelta(seconds=1)), wanted=False).replicas == 0


def test_the_first_model_wakes_it() -> None:
    assert decide(found(0, timedelta(hours=1)), wanted=True) == Scale(2)
    assert decide(found(0), wanted=True, replicas=5) == Scale(5)


def test_it_stays_for_the_grace_and_is_looked_at_then() -> None:
    first = decide(found(2), wanted=False)
    assert (first.replicas, first.look_again_s) == (2, 60)
    assert datetime.fromisoformat(first.idle_since) == NOW
    later = decide(found(2, timedelta(seconds=45)), wanted=False)
    assert (later.replicas, later.look_again_s) == (2, 15)
    assert decide(found(2, timedelta(seconds=60)), wanted=False).replicas == 0


def test_a_model_within_the_grace_ends_it() -> None:
    assert decide(found(2, timedelta(seconds=30)), wanted=True).idle_since == ""


def test_without_scaling_to_zero_it_is_always_up() -> None:
    config = ServingConfig.read("scaleToZero: {enabled: false}")
    assert decide(None, wanted=False, config=config) == Scale(2)


def test_replicas_that_an_autoscaler_chose_are_kept_within_its_bounds() -> None:
    item = runtime()
    item.resource["metadata"]["annotations"] = {
        "serving.kserve.io/autoscalerClass": "hpa",
        "serving.kserve.io/min-scale": "2",
        "serving.kserve.io/max-scale": "4",
    }
    for now, kept in ((3, 3), (9, 4), (0, 2)):
        assert scale(item, CONFIG, found(now), wanted=True, now=NOW).replicas == kept
    # Its first Deployment needs no other that is there already.
    assert scale(item, CONFIG, None, wanted=True, now=NOW).replicas == 2
    assert scale(item, CONFIG, None, wanted=False, now=NOW).replicas == 0


def test_a_note_that_cannot_be_read_starts_the_grace_anew() -> None:
    before = found(2)
    before["metadata"]["annotations"] = {IDLE_SINCE: "yesterday"}
    assert decide(before, wanted=False).look_again_s == 60
