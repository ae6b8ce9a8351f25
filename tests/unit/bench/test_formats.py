"""The formats suite's pure parts: what the third-party servers are told, and how their answers are judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.comparison import OURS, Summary
from bench.formats import SAMPLES, agree, framework_rows, served_model, values_of
from bench.peers.mlserver import model_settings, server_settings
from bench.peers.served import ServedModel, free_ports
from bench.peers.triton import config_pbtxt
from mmcore.pb import inference_pb2

MODEL = ServedModel("iris", "sklearn", "/models/iris/model.joblib", "predict", "FP32", (4,), (("predict", "INT64"),))


def test_a_model_travels_to_a_launcher_unchanged() -> None:
    assert ServedModel.from_json(MODEL.to_json()) == MODEL


def test_triton_is_told_of_a_python_model_that_batches() -> None:
    assert config_pbtxt(MODEL).splitlines() == [
        'name: "iris"',
        'backend: "python"',
        "max_batch_size: 64",
        "input [",
        '  { name: "predict" data_type: TYPE_FP32 dims: [ 4 ] }',
        "]",
        "output [",
        '  { name: "predict" data_type: TYPE_INT64 dims: [ -1 ] }',
        "]",
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
        "dynamic_batching { }",
        'parameters { key: "framework" value { string_value: "sklearn" } }',
        'parameters { key: "path" value { string_value: "/models/iris/model.joblib" } }',
    ]


def test_mlserver_is_told_to_batch_in_one_process() -> None:
    settings = server_settings(1, 2, 3)
    assert settings["parallel_workers"] == 0
    assert (settings["http_port"], settings["grpc_port"], settings["metrics_port"]) == (1, 2, 3)
    assert model_settings(MODEL) == {
        "name": "iris",
        "implementation": "mlserver_sklearn.SKLearnModel",
        "max_batch_size": 64,
        "max_batch_time": 0.001,
        "parameters": {"uri": "/models/iris/model.joblib"},
    }
    with pytest.raises(KeyError, match="onnx"):
        model_settings(replace(MODEL, framework="onnx"))


def test_a_sample_keeps_its_names_and_the_shape_of_one_row() -> None:
    sample = next(sample for sample in SAMPLES if sample.case == "onnx")
    served = served_model(sample, [("probabilities", "FP32")])
    assert (served.name, served.framework, served.input, served.shape) == ("mlp-onnx", "onnx", "input", (4,))
    assert served.outputs == (("probabilities", "FP32"),)


def test_ports_are_free_and_differ() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert all(port > 1023 for port in ports)


def test_raw_and_typed_contents_of_any_shape_say_the_same() -> None:
    raw = inference_pb2.ModelInferResponse()
    raw.outputs.add(name="predict", datatype="INT64", shape=[2, 1])
    raw.raw_output_contents.append(np.array([1, 2]).tobytes())
    typed = inference_pb2.ModelInferResponse()
    typed.outputs.add(name="predict", datatype="FP64", shape=[2]).contents.fp64_contents.extend([1.0, 2.0])
    assert agree(values_of(raw), values_of(typed))


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        ({"y": [0.1, 0.9000001]}, True),
        ({"y": [0.1, 0.91]}, False),
        ({"y": [0.1]}, False),
        ({"x": [0.1, 0.9]}, False),
        ({}, False),
        ({"y": [0.1, float("nan")]}, False),
    ],
)
def test_answers_are_the_framework_s_own_but_for_rounding(found: dict[str, list[float]], agrees: bool) -> None:
    arrays = {name: np.array(values) for name, values in found.items()}
    assert agree(arrays, {"y": np.array([0.1, 0.9])}) is agrees


def test_one_caller_is_held_against_the_budget_and_64_only_against_the_bare_call() -> None:
    ours = Summary({"throughput": 50_000.0, "p99": 900.0, "cpu": 20.0}, limited_by_load=False)
    summaries = {("onnx", OURS): ours, ("onnx-1x1", OURS): ours, ("identity", OURS): ours}
    loops = {"onnx": [{"calls": 1000, "seconds": 0.01, "cpu_us": 10.0}], "identity": []}
    found = {(row.case, row.metric): row for row in framework_rows(summaries, loops)}
    assert found.keys() == {
        ("onnx", "throughput"), ("onnx", "cpu"),
        ("onnx-1x1", "throughput"), ("onnx-1x1", "cpu"), ("onnx-1x1", "cpu_budget"),
    }  # fmt: skip
    assert found["onnx", "throughput"].ratio == pytest.approx(0.5)
    assert found["onnx-1x1", "cpu_budget"].peer_value == pytest.approx(23.0)
    assert found["onnx-1x1", "cpu_budget"].ratio == pytest.approx(1.15)


def test_what_a_lone_message_costs_in_raw_c_is_a_budget_of_its_own() -> None:
    ours = Summary({"throughput": 50_000.0, "p99": 900.0, "cpu": 60.0}, limited_by_load=False)
    raw = Summary({"throughput": 50_000.0, "p99": 900.0, "cpu": 40.0}, limited_by_load=False)
    loops = {"onnx": [{"calls": 1000, "seconds": 0.01, "cpu_us": 10.0}]}
    rows = framework_rows({("onnx-1x1", OURS): ours, ("onnx-1x1", "raw-c"): raw}, loops)
    found = {row.peer: (row.peer_value, row.ratio) for row in rows if row.metric == "cpu_budget"}
    assert found == {"framework": (23.0, pytest.approx(23 / 60)), "framework + raw-c": (63.0, pytest.approx(1.05))}
