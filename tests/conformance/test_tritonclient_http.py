"""The synchronous HTTP client of tritonclient, call by call."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.conformance.models import DATATYPES
from tests.serving import ADD_SUB, Instance

pytestmark = pytest.mark.slow


@pytest.fixture
def client(instance: Instance) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(instance.rest, network_timeout=30) as client:
        yield client


def tensor(name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def add_sub_inputs(*, binary: bool = True) -> tuple[list[triton.InferInput], Any, Any]:
    a = np.arange(32, dtype=np.int32).reshape(2, 16)
    b = np.full((2, 16), 3, np.int32)
    return [tensor("INPUT0", a, "INT32", binary=binary), tensor("INPUT1", b, "INT32", binary=binary)], a, b


def sample(datatype: str) -> Any:
    generator = np.random.default_rng(7)
    if datatype == "BYTES":
        return np.array([[b"", b"text"], ["čaj".encode(), b"1"]], dtype=np.object_)
    if datatype == "BOOL":
        return generator.random((3, 5)) > 0.5
    if datatype.startswith("FP"):
        return generator.standard_normal((3, 5)).astype(f"f{int(datatype[2:]) // 8}")
    dtype = np.dtype(datatype.lower())
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (3, 5), dtype=dtype, endpoint=True)


# What is asked about the server and its models


def test_health_is_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("simple", "7")
    assert not client.is_model_ready("no_such_model")


def test_metadata_and_configuration_have_numbers_where_triton_has_them(client: triton.InferenceServerClient) -> None:
    server = client.get_server_metadata()
    assert server["name"] == "triton"
    assert {"statistics", "model_repository", "binary_tensor_data"} <= set(server["extensions"])
    model = client.get_model_metadata("simple", "1")
    assert model["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": [-1, 16]}
    assert (model["name"], model["versions"], model["platform"]) == ("simple", ["1"], "python")
    config = client.get_model_config("simple")
    assert (config["name"], config["max_batch_size"]) == ("simple", 8)
    assert (config["input"][0]["dims"], config["input"][0]["data_type"]) == ([16], "TYPE_INT32")


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_an_unknown_model_is_named_in_the_error(client: triton.InferenceServerClient, method: str) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as error:
        getattr(client, method)("nope")
    assert error.value.status() == "404"


# Inference


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_it_adds_and_subtracts(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:
    inputs, a, b = add_sub_inputs(binary=binary_in)
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT1", "OUTPUT0")]
    result = client.infer("simple", inputs, outputs=outputs, model_version="1", request_id="a-17")
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), a - b)
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("a-17", "simple", "1")
    in_json = ["data" in output for output in response["outputs"]]
    assert in_json == [binary_out is False] * 2


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", [one for one in DATATYPES if one != "BF16"])
def test_every_datatype_comes_back_as_it_went(
    client: triton.InferenceServerClient, datatype: str, binary: bool
) -> None:
    array = sample(datatype)
    if datatype == "FP16" and not binary:
        given = triton.InferInput("INPUT0", list(array.shape), datatype)
        given._data = array.reshape(-1).tolist()  # the client itself sends FP16 in binary alone
        inputs = [given]
    else:
        inputs = [tensor("INPUT0", array, datatype, binary=binary)]
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary)]
    answer = client.infer(f"identity_{datatype.lower()}", inputs, outputs=outputs).as_numpy("OUTPUT0")
    if datatype == "BYTES" and not binary:
        assert [str(one) for one in answer.reshape(-1)] == [one.decode() for one in array.reshape(-1)]
    else:
        np.testing.assert_array_equal(answer, array)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 0)])
@pytest.mark.parametrize("binary", [True, False])
def test_empty_and_single_tensors_come_back(
    client: triton.InferenceServerClient, shape: tuple[int, int], binary: bool
) -> None:
    array = np.ones(shape, np.float32)
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary)]
    answer = client.infer("identity_fp32", [tensor("INPUT0", array, "FP32", binary=binary)], outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), array)


@pytest.mark.parametrize("binary", [True, False])
def test_a_large_tensor_comes_back(client: triton.InferenceServerClient, binary: bool) -> None:
    array = np.random.default_rng(1).standard_normal((3, 100_000), dtype=np.float32)
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary)]
    answer = client.infer("identity_fp32", [tensor("INPUT0", array, "FP32", binary=binary)], outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), array)


def test_what_is_not_finite_comes_back_in_json(client: triton.InferenceServerClient) -> None:
    array = np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32)
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=False)]
    result = client.infer("identity_fp32", [tensor("INPUT0", array, "FP32", binary=False)], outputs=outputs)
    assert result.get_response()["outputs"][0]["data"] == ["NaN", "Infinity", "-Infinity", 0.1]
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_both_ways_may_be_compressed(client: triton.InferenceServerClient, algorithm: str, binary: bool) -> None:
    array = np.zeros((10, 1000), np.float32)
    answer = client.infer(
        "identity_fp32",
        [tensor("INPUT0", array, "FP32", binary=binary)],
        outputs=[triton.InferRequestedOutput("OUTPUT0", binary_data=binary)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), array)


def test_a_body_made_beforehand_is_taken_and_its_answer_parsed(
    client: triton.InferenceServerClient, instance: Instance
) -> None:
    inputs, a, b = add_sub_inputs()
    body, length = triton.InferenceServerClient.generate_request_body(inputs)
    headers = {"Inference-Header-Content-Length": str(length)}
    answer = client._post("v2/models/simple/infer", body, headers, None)
    result = triton.InferenceServerClient.parse_response_body(
        answer.read(), header_length=int(answer.get("Inference-Header-Content-Length"))
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), a - b)


def test_parameters_are_taken_and_come_back(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    sent = {"flag": True, "count": -5, "text": "hello", "share": 0.25}
    result = client.infer("simple", inputs, parameters=sent, priority=3, timeout=10_000_000, sequence_id=7)
    assert result.get_response()["parameters"] == sent


def test_asynchronous_calls_are_answered(client: triton.InferenceServerClient) -> None:
    inputs, a, b = add_sub_inputs()
    pending = [client.async_infer("simple", inputs, request_id=str(number)) for number in range(20)]
    for number, one in enumerate(pending):
        result = one.get_result()
        assert result.get_response()["id"] == str(number)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)


def test_classes_come_with_value_index_and_label(client: triton.InferenceServerClient) -> None:
    scores = np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput("SCORES", binary_data=binary, class_count=2)]
        answer = client.infer("scores", [tensor("INPUT0", scores, "FP32")], outputs=wanted).as_numpy("SCORES")
        found = [one.decode() if isinstance(one, bytes) else str(one) for one in answer[0]]
        assert found == ["0.400000:1:bee", "0.300000:3:dog"]


# Errors


def infer_error(
    client: triton.InferenceServerClient, model: str, inputs: list[triton.InferInput], **more: Any
) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as error:
        client.infer(model, inputs, **more)
    return error.value.status(), error.value.message()


def test_errors_have_the_status_and_text_of_their_kind(client: triton.InferenceServerClient) -> None:
    inputs, a, _ = add_sub_inputs()
    one = tensor("INPUT0", np.ones(1, np.float32), "FP32")
    unknown = [triton.InferRequestedOutput("OUTPUT9")]
    assert infer_error(client, "nope", inputs) == ("404", "Request for unknown model: 'nope' is not found")
    assert infer_error(client, "simple", inputs, model_version="9")[0] == "404"
    for call, status, words in (
        (lambda: infer_error(client, "simple", inputs[:1]), "400", "INPUT1"),
        (
            lambda: infer_error(client, "simple", [inputs[0], tensor("INPUT1", a[:, :4].copy(), "INT32")]),
            "400",
            "[2,4]",
        ),
        (lambda: infer_error(client, "simple", inputs, outputs=unknown), "400", "OUTPUT9"),
        (lambda: infer_error(client, "failing", [one]), "500", "seven is not a number I like"),
        (lambda: infer_error(client, "broken", [one]), "400", "SyntaxError"),
    ):
        found, text = call()
        assert (found, "Traceback" in text) == (status, False)
        assert words in text


# Repository, statistics, settings, shared memory


def test_the_repository_is_told_and_changed(client: triton.InferenceServerClient) -> None:
    client.load_model("simple")
    index = {row["name"]: row for row in client.get_model_repository_index()}
    assert (index["simple"]["version"], index["simple"]["state"]) == ("1", "READY")
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    client.load_model("simple")
    assert client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="failed to load 'broken'"):
        client.load_model("broken")


def test_a_model_is_loaded_from_files_in_the_request(client: triton.InferenceServerClient) -> None:
    config = json.dumps({"name": "uploaded", "backend": "mmcore_python", "max_batch_size": 4})
    client.load_model("uploaded", config=config, files={"file:1/model.py": ADD_SUB.encode()})
    inputs, a, b = add_sub_inputs()
    np.testing.assert_array_equal(client.infer("uploaded", inputs).as_numpy("OUTPUT0"), a + b)
    assert client.get_model_config("uploaded")["max_batch_size"] == 4
    client.unload_model("uploaded")


def test_statistics_count_requests_of_both_ways_alike(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    client.infer("simple", inputs)
    [before] = client.get_inference_statistics("simple")["model_stats"]
    client.infer("simple", inputs)
    [after] = client.get_inference_statistics("simple", "1")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 1
    assert "simple" in [row["name"] for row in client.get_inference_statistics()["model_stats"]]


def test_trace_and_log_settings_are_read_and_changed(client: triton.InferenceServerClient) -> None:
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    changed = client.update_trace_settings("simple", {"trace_level": ["TIMESTAMPS"], "trace_rate": "2"})
    assert (changed["trace_level"], changed["trace_rate"]) == (["TIMESTAMPS"], "2")
    client.update_trace_settings("simple", {"trace_level": None, "trace_rate": None})
    assert client.get_trace_settings("simple")["trace_level"] == ["OFF"]
    assert client.get_log_settings()["log_info"] is True
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    client.update_log_settings({"log_verbose_level": 0})
    with pytest.raises(InferenceServerException) as error:
        client.update_log_settings({"log_file": "/tmp/x"})
    assert error.value.status() == "400"


def test_tensors_go_in_and_out_through_shared_memory(client: triton.InferenceServerClient) -> None:
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    key = f"/mmcore-test-http-{os.getpid()}"
    handle = shm.create_shared_memory_region("both", key, 256, create_only=True)
    try:
        client.register_system_shared_memory("both", key, 256)
        assert client.get_system_shared_memory_status("both") == [
            {"name": "both", "key": key, "offset": 0, "byte_size": 256}
        ]
        shm.set_shared_memory_region(handle, [a, a])
        inputs = []
        for at, name in enumerate(("INPUT0", "INPUT1")):
            inputs.append(triton.InferInput(name, [1, 16], "INT32"))
            inputs[-1].set_shared_memory("both", 64, offset=64 * at)
        output = triton.InferRequestedOutput("OUTPUT0", binary_data=True)
        output.set_shared_memory("both", 64, offset=128)
        result = client.infer("simple", inputs, outputs=[output])
        assert result.get_output("OUTPUT0")["parameters"]["shared_memory_byte_size"] == 64
        np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [1, 16], offset=128), a + a)
        client.unregister_system_shared_memory("both")
        assert client.get_system_shared_memory_status() == []
        client.unregister_cuda_shared_memory()
        with pytest.raises(InferenceServerException) as error:
            client.get_cuda_shared_memory_status()
        assert error.value.status() == "501"
    finally:
        shm.destroy_shared_memory_region(handle)


def test_a_client_that_gives_up_does_not_disturb_others(instance: Instance, tmp_path: Path) -> None:
    file = tmp_path / "release"
    name = np.array([str(file).encode()], dtype=np.object_)
    with (
        triton.InferenceServerClient(instance.rest, network_timeout=0.3) as hasty,
        pytest.raises(Exception, match="timed out"),
    ):
        hasty.infer("waiting", [tensor("FILE", name, "BYTES")])
    file.touch()
    with triton.InferenceServerClient(instance.rest) as client:
        assert client.infer("waiting", [tensor("FILE", name, "BYTES")]).as_numpy("DONE").tolist() == [True]
