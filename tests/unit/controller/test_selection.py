"""Which runtime a model goes to, and what is said where none fits."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.objects import CLUSTER_SERVING_RUNTIME
from mmcore.controller.runtimes import Runtime, effective_runtimes
from mmcore.controller.selection import Unfit, select, version_fits
from mmcore.controller.wanted import WantedModel
from tests.unit.controller.objects import runtime, serving_runtime


def model(model_format: str = "onnx", **fields: Any) -> WantedModel:
    return WantedModel(owner="ksp", name="m", format=model_format, **fields)


def formats(*entries: tuple[str, str, int]) -> list[dict[str, Any]]:
    return [
        {"name": name, "autoSelect": True, **({"version": v} if v else {}), **({"priority": p} if p else {})}
        for name, v, p in entries
    ]


def chosen(wanted: WantedModel, *runtimes: Runtime) -> str:
    found = select(wanted, runtimes)
    assert isinstance(found, Runtime), found
    return found.name


def refused(wanted: WantedModel, *runtimes: Runtime) -> Unfit:
    found = select(wanted, runtimes)
    assert isinstance(found, Unfit), found
    return found


@pytest.mark.parametrize(
    ("wanted", "listed", "fits"),
    [
        ("1.15", "1", True),
        ("1.15.2", "1.15", True),
        ("1", "1", True),
        ("", "1", True),
        ("7", "", True),
        ("1", "1.15", False),
        ("15", "1", False),
        ("2.1", "1", False),
    ],
)
def test_a_listed_version_serves_those_below_it(wanted: str, listed: str, fits: bool) -> None:
    assert version_fits(wanted, listed) is fits


def test_the_highest_priority_is_taken() -> None:
    low, high = (
        runtime("a", supportedModelFormats=formats(("onnx", "1", 1))),
        runtime("b", supportedModelFormats=formats(("onnx", "1", 5))),
    )
    assert chosen(model(), low, high) == chosen(model(), high, low) == "b"


def test_a_runtime_that_is_added_takes_no_models_over() -> None:
    old, new = runtime("z", created="2025-01-01T00:00:00Z"), runtime("a", created="2026-01-01T00:00:00Z")
    assert chosen(model(), new, old) == "z"


def test_a_namespaces_own_runtime_goes_before_the_clusters() -> None:
    cluster = runtime("a", kind=CLUSTER_SERVING_RUNTIME, supportedModelFormats=formats(("onnx", "", 9)))
    assert chosen(model(), cluster, runtime("b")) == "b"


def test_a_runtime_of_the_same_name_hides_the_clusters_even_when_it_is_disabled() -> None:
    found = effective_runtimes([serving_runtime("triton", disabled=True)], [serving_runtime("triton")])
    assert [one.disabled for one in found] == [True]
    assert refused(model(), *found).reason == "RuntimeDisabled"


def test_a_named_runtime_is_taken_whatever_it_lists() -> None:
    assert chosen(model("xgboost", runtime="triton-2.x", protocol="v9"), runtime()) == "triton-2.x"


@pytest.mark.parametrize(
    ("wanted", "spec", "reason", "told"),
    [
        (model(runtime="other"), {}, "RuntimeNotRecognized", "the runtimes are: triton-2.x"),
        (model(runtime="triton-2.x"), {"disabled": True}, "RuntimeDisabled", "disabled"),
        (model(runtime="triton-2.x"), {"multiModel": False}, "NoSupportingRuntime", "not a multi-model"),
        (model("pmml"), {}, "NoSupportingRuntime", "no runtime lists the format 'pmml'"),
        (model(version="2"), {}, "NoSupportingRuntime", "lists version 1, not 2"),
        (model(protocol="grpc-v1"), {}, "NoSupportingRuntime", "speaks grpc-v2, not grpc-v1"),
        (model(), {"multiModel": False}, "NoSupportingRuntime", "is not a multi-model runtime"),
        (model(), {"supportedModelFormats": [{"name": "onnx"}]}, "NoSupportingRuntime", "name the runtime to use it"),
        (model(), {"disabled": True}, "RuntimeDisabled", "is disabled"),
    ],
)
def test_why_nothing_fits(wanted: WantedModel, spec: dict[str, Any], reason: str, told: str) -> None:
    unfit = refused(wanted, runtime(**spec))
    assert unfit.reason == reason
    assert told in unfit.detail


def test_the_sentences_that_users_search_for() -> None:
    message = "No ServingRuntime supports specified model type and/or protocol"
    assert refused(model("invalid"), runtime()).message == message
    assert refused(model(runtime="nope"), runtime()).message == "Specified runtime name not recognized"


def test_v2_over_rest_is_served_where_v2_over_grpc_is() -> None:
    assert chosen(model(protocol="v2"), runtime()) == "triton-2.x"
