"""Settings files: what is read from each, which one wins, and that an error names file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcore.errors import InvalidModel, Status
from mmcore.model import TensorSpec
from mmcore.storage import detect
from mmcore.storage.config_pbtxt import read_config_json
from mmcore.storage.settings import read_settings

CONFIG = """
name: "something else"
backend: "onnxruntime"
max_batch_size: 8
default_model_filename: "graph.onnx"
input [ { name: "INPUT0" data_type: TYPE_STRING dims: [ 16 ] },
        { name: "INPUT1" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]
output [ { name: "OUT" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "labels.txt" } ]
parameters { key: "threads" value { string_value: "2" } }
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching { max_queue_delay_microseconds: 100 }
"""


def put(folder: Path, name: str, content: str | dict[str, object]) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_triton_configuration_is_read(tmp_path: Path) -> None:
    put(tmp_path, "config.pbtxt", CONFIG)
    put(tmp_path, "labels.txt", "cat\ndog\n")
    put(tmp_path, "graph.onnx", "")
    put(tmp_path, "other.onnx", "")
    source = detect(tmp_path)["1"]
    assert (source.name, source.format, source.path.name) == (tmp_path.name, "onnx", "graph.onnx")
    settings = source.settings
    assert settings.max_batch_size == 8
    assert settings.inputs == (TensorSpec("INPUT0", "BYTES", (-1, 16)), TensorSpec("INPUT1", "FP32", (-1, -1, 3)))
    assert settings.outputs == (TensorSpec("OUT", "INT64", (-1, 1)),)
    assert settings.labels == {"OUT": ("cat", "dog")}
    assert settings.parameters == {"threads": "2"}
    assert settings.instances == 2


@pytest.mark.parametrize(
    ("groups", "instances"),
    [
        ("", 0),
        ("instance_group { }", 1),
        ("instance_group [ { count: 3 kind: KIND_CPU }, { kind: KIND_AUTO } ]", 4),
        ("instance_group [ { count: 2 }, { count: 5 passive: true } ]", 2),
    ],
)
def test_instances_are_those_of_all_groups(tmp_path: Path, groups: str, instances: int) -> None:
    put(tmp_path, "config.pbtxt", groups)
    assert read_settings(tmp_path).settings().instances == instances


def test_instances_on_a_gpu_run_on_the_cpu_which_the_log_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "config.pbtxt", "instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0 ] } ]")
    assert read_settings(tmp_path).instances == 2
    assert f"{tmp_path.name}: its instance_group asks for a GPU; it runs on the CPU" in caplog.text


def test_mmcore_yaml_states_instances_and_the_response_cache(tmp_path: Path) -> None:
    put(tmp_path, "config.pbtxt", "instance_group { count: 2 }\nresponse_cache { enable: true }")
    assert read_settings(tmp_path).settings().response_cache
    put(tmp_path, "mmcore.yaml", "instances: 4\nresponse_cache: false")
    settings = read_settings(tmp_path).settings()
    assert (settings.instances, settings.response_cache) == (4, False)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("config.pbtxt", "instance_group { count: -1 }", "instance_group: count: must not be negative"),
        ("config.pbtxt", "instance_group { count: 257 }", "must not be above 256 instances, got 257"),
        ("mmcore.yaml", "instances: 0", "mmcore.yaml: instances: must be from 1 to 256, got 0"),
        ("mmcore.yaml", "instances: many", "mmcore.yaml: instances: expected a whole number"),
        ("mmcore.yaml", "response_cache: 1", "mmcore.yaml: response_cache: expected true or false, got 1"),
    ],
)
def test_wrong_instances_and_switches_are_refused(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    put(tmp_path, file, text)
    with pytest.raises(InvalidModel, match=complaint):
        read_settings(tmp_path)


def test_shapes_are_whole_without_a_batch_dimension(tmp_path: Path) -> None:
    put(tmp_path, "config.pbtxt", 'input { name: "X" data_type: TYPE_FP32 dims: [2, 3] }')
    assert read_settings(tmp_path).inputs == (TensorSpec("X", "FP32", (2, 3)),)


@pytest.mark.parametrize(
    ("platform", "known"),
    [
        ('platform: "onnxruntime_onnx"', "onnx"),
        ('platform: "tensorflow_savedmodel"', "tensorflow"),
        ('backend: "pytorch"', "torchscript"),
        ('backend: "mmcore_python"', "python"),
        ('backend: "fil"', None),
        ("", None),
    ],
)
def test_platform_and_backend_tell_the_format(tmp_path: Path, platform: str, known: str | None) -> None:
    put(tmp_path, "config.pbtxt", platform)
    assert read_settings(tmp_path).format == known


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("max_batch_size: many", r"config.pbtxt: 1:17"),
        ("max_batchsize: 1", "max_batchsize"),
        ("max_batch_size: -1", "max_batch_size: must not be negative"),
        ('backend: "python"', "backend: 'python' is Triton's own contract"),
        ('backend: "vllm"', "backend: 'vllm' is not built in"),
        ('platform: "ensemble"', "platform: ensembles"),
        ("sequence_batching { }", "sequence_batching: is not supported"),
        ("ensemble_scheduling { }", "ensemble_scheduling: is not supported"),
        ("model_transaction_policy { decoupled: true }", "decoupled: is not supported"),
        ('input { name: "X" dims: [1] }', "input 'X': data_type: is missing"),
        ("input { data_type: TYPE_FP32 dims: [1] }", r"input\[0\]: name: is missing"),
        ('input { name: "X" data_type: TYPE_FP32 dims: [-2] }', "input 'X': dims"),
        ('input { name: "X" data_type: TYPE_FP32 reshape { shape: [1] } }', "input 'X': reshape"),
        ('input { name: "X" data_type: TYPE_FP32 allow_ragged_batch: true }', "allow_ragged_batch"),
        ('input [ {name: "X" data_type: TYPE_FP32}, {name: "X" data_type: TYPE_FP32} ]', "input 'X': is there twice"),
        ('output { name: "Y" data_type: TYPE_FP32 label_filename: "../l" }', "output 'Y': label_filename: .*inside"),
        ('output { name: "Y" data_type: TYPE_FP32 label_filename: "l" }', "label_filename: 'l' cannot be read"),
        ("version_policy { specific { } }", "version_policy.specific: names no version"),
        ('default_model_filename: "../../x"', "default_model_filename: .*inside"),
    ],
)
def test_a_wrong_triton_configuration_names_the_field(tmp_path: Path, config: str, words: str) -> None:
    put(tmp_path, "config.pbtxt", config)
    with pytest.raises(InvalidModel, match=words) as error:
        read_settings(tmp_path)
    assert str(error.value).startswith("config.pbtxt: ")
    assert error.value.status is Status.FAILED_PRECONDITION


def test_a_configuration_in_json_is_read_like_one_in_text(tmp_path: Path) -> None:
    text = '{"maxBatchSize": 2, "input": [{"name": "X", "dataType": "TYPE_FP32", "dims": [3]}]}'
    stated = read_config_json(text, tmp_path)
    assert stated.max_batch_size == 2
    assert stated.inputs == (TensorSpec("X", "FP32", (-1, 3)),)
    # tritonclient's users write the names of the .proto
    assert read_config_json('{"max_batch_size": "4"}', tmp_path).max_batch_size == 4
    for wrong in ("", "[]", '{"nope": 1}', "{" * 100_000, '{"max_batch_size": "x"}'):
        with pytest.raises(InvalidModel, match=r"^config: "):
            read_config_json(wrong, tmp_path)


def test_mlserver_settings_are_read(tmp_path: Path) -> None:
    put(
        tmp_path,
        "model-settings.json",
        {
            "name": "iris",
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": "./deep/clf.bin", "version": "v0.1.0", "extra": {"predict_fn": "predict", "n": 3}},
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "parameters": {"content_type": "np"}}],
            "parallel_workers": 0,
        },
    )
    (tmp_path / "deep").mkdir()
    put(tmp_path / "deep", "clf.bin", "")
    sources = detect(tmp_path)
    assert list(sources) == ["v0.1.0"]
    source = sources["v0.1.0"]
    assert (source.name, source.format, source.path) == ("iris", "sklearn", tmp_path / "deep/clf.bin")
    assert source.settings.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert source.settings.parameters == {"predict_fn": "predict", "n": "3"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "expected a mapping, got a list"),
        ({"parameters": []}, "parameters: expected a mapping"),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"implementation": "models.Mine"}, "implementation: 'models.Mine' is a runtime class of its own"),
        ({"parameters": {"uri": "s3://bucket/x"}}, "parameters.uri: .* is remote"),
        ({"parameters": {"uri": "/etc/passwd"}}, "parameters.uri: .*not a path inside"),
        ({"parameters": {"uri": "../x"}}, "parameters.uri: .*not a path inside"),
        ({"inputs": {}}, "inputs: expected a list, got a mapping"),
        ({"inputs": [{"datatype": "FP32", "shape": []}]}, r"inputs\[0\].name: is missing"),
        ({"inputs": [{"name": "x", "shape": []}]}, r"inputs\[0\].datatype: is missing"),
        ({"inputs": [{"name": "x", "datatype": "FP33", "shape": []}]}, r"datatype: 'FP33' is not a datatype"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [True]}]}, r"inputs\[0\].shape: expected a list"),
        ({"inputs": [{"name": "x", "datatype": "FP32"}]}, r"inputs\[0\].shape: expected a list"),
    ],
)
def test_wrong_mlserver_settings_name_the_field(tmp_path: Path, settings: object, words: str) -> None:
    put(tmp_path, "model-settings.json", settings if isinstance(settings, str) else json.dumps(settings))
    with pytest.raises(InvalidModel, match=words) as error:
        read_settings(tmp_path)
    assert str(error.value).startswith("model-settings.json: ")


def test_mmcore_yaml_wins_over_all(tmp_path: Path) -> None:
    put(tmp_path, "config.pbtxt", CONFIG.replace('label_filename: "labels.txt"', ""))
    put(tmp_path, "model-settings.json", {"name": "from-json", "parameters": {"extra": {"threads": "3", "b": "json"}}})
    put(
        tmp_path,
        "mmcore.yaml",
        """
        name: mine
        format: XGBoost:1
        file: trees.bin
        version: 7
        max_batch_size: 0
        size_bytes: 64MiB
        execution: thread
        outputs: [{name: p, datatype: FP32, shape: [-1], labels: [no, yes, 3]}]
        parameters: {threads: 4}
        """.replace("[no, yes", "['no', 'yes'"),
    )
    put(tmp_path, "trees.bin", "")
    source = detect(tmp_path)["7"]
    assert (source.name, source.format, source.path.name) == ("mine", "xgboost", "trees.bin")
    settings = source.settings
    assert (settings.max_batch_size, settings.size_bytes, settings.execution) == (0, 64 * 2**20, "thread")
    assert settings.outputs == (TensorSpec("p", "FP32", (-1,)),)
    assert settings.labels == {"p": ("no", "yes", "3")}
    assert settings.parameters == {"threads": "4", "b": "json"}
    assert len(settings.inputs) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("a: [", "is not YAML"),
        ("- a", "expected a mapping"),
        ("max_batchsize: 3", "max_batchsize: no such setting; known are"),
        ("size_bytes: 64Mx", "size_bytes: '64Mx' is not a size"),
        ("size_bytes: true", "size_bytes: expected a size"),
        ("max_batch_size: -1", "max_batch_size: expected a whole number"),
        ("execution: gpu", "execution: expected one of auto, inline, thread, got 'gpu'"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("outputs: [{name: p, datatype: FP32, shape: [1], labels: x}]", r"outputs\[0\].labels: expected a list"),
        ("file: missing.onnx", "name the file 'missing.onnx', which is not there"),
        ("file: mmcore.yaml", "the format of 'mmcore.yaml' is not known"),
    ],
)
def test_a_wrong_mmcore_yaml_names_the_field(tmp_path: Path, settings: str, words: str) -> None:
    put(tmp_path, "mmcore.yaml", settings)
    with pytest.raises(InvalidModel, match=words):
        detect(tmp_path)


def test_an_empty_mmcore_yaml_states_nothing(tmp_path: Path) -> None:
    put(tmp_path, "mmcore.yaml", "# nothing yet\n")
    put(tmp_path, "model.onnx", "")
    assert detect(tmp_path)["1"].format == "onnx"


def test_a_stated_format_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "mmcore.yaml", "format: xgboost")
    put(tmp_path, "a.onnx", "")
    put(tmp_path, "b.pkl", "")
    with pytest.raises(InvalidModel, match="no model file of format xgboost"):
        detect(tmp_path)
    (tmp_path / "b.pkl").unlink()
    assert detect(tmp_path)["1"].format == "xgboost"


def test_binary_and_giant_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mmcore.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidModel, match=r"mmcore.yaml: is not UTF-8"):
        read_settings(tmp_path)
    (tmp_path / "mmcore.yaml").write_bytes(b"#" * (5 * 2**20))
    with pytest.raises(InvalidModel, match="is longer than"):
        read_settings(tmp_path)


def test_how_a_model_is_kept_is_read_from_mmcore_yaml(tmp_path: Path) -> None:
    (tmp_path / "mmcore.yaml").write_text(
        "device_bytes: 2GiB\npreload: true\npinned: true\nmin_residency: 5m\nidle_timeout: 0\n"
    )
    settings = read_settings(tmp_path).settings()
    assert settings.device_bytes == 2 * 2**30
    assert (settings.preload, settings.pinned) == (True, True)
    assert (settings.min_residency_s, settings.idle_timeout_s) == (300.0, 0.0)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("pinned: 1", "expected true or false, got 1"),
        ("min_residency: 0", "expected a time"),
        ("preload: often", "true"),
    ],
)
def test_what_makes_no_sense_of_how_a_model_is_kept_is_refused(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "mmcore.yaml").write_text(line + "\n")
    with pytest.raises(InvalidModel, match=text):
        read_settings(tmp_path)


@pytest.mark.parametrize("text", [
    "parameters: &a {x: *a}\n", "parameters:\n  a: &a [x, x]\n  b: [*a, *a]\n", "parameters: {when: 2001-99-99}\n",
    "max_batch_size: !!int ''\n", "pinned: !!bool perhaps\n", "name: !!timestamp never\n", "? [a]\n: b\n",
])  # fmt: skip
def test_yaml_that_stands_for_more_or_other_than_it_says_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mmcore.yaml").write_text(text)
    with pytest.raises(InvalidModel, match=r"mmcore\.yaml: is not YAML"):
        read_settings(tmp_path)
