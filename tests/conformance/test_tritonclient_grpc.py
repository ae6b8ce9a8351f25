"""The synchronous gRPC client of tritonclient, call by call."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.conformance.models import DATATYPES
from tests.serving import ADD_SUB, Instance

pytestmark = pytest.mark.slow


@pytest.fixture
def client(instance: Instance) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(instance.grpc) as client:
        yield client


def tensor(name: str, array: np.ndarray[Any, Any], datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def add_sub_inputs(rows: int = 1) -> tuple[list[triton.InferInput], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    a = np.arange(16 * rows, dtype=np.int32).reshape(rows, 16)
    b = np.full((rows, 16), 3, np.int32)
    return [tensor("INPUT0", a, "INT32"), tensor("INPUT1", b, "INT32")], a, b


# Health and metadata


def test_it_is_live_and_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()


def test_a_model_is_ready_when_it_can_be_asked(client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("simple", "7")
    assert not client.is_model_ready("no_such_model")


def test_the_server_tells_its_name_version_and_extensions(client: triton.InferenceServerClient) -> None:
    metadata = client.get_server_metadata()
    assert metadata.name == "triton"
    assert metadata.version
    assert {"statistics", "model_repository", "system_shared_memory"} <= set(metadata.extensions)
    assert "cuda_shared_memory" not in metadata.extensions


def test_a_models_metadata_has_full_shapes(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("simple", as_json=True)
    assert metadata["name"] == "simple"
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "python"
    assert metadata["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": ["-1", "16"]}
    assert [output["name"] for output in metadata["outputs"]] == ["OUTPUT0", "OUTPUT1"]


def test_a_models_configuration_has_shapes_without_the_batch(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("simple").config
    assert config.name == "simple"
    assert config.max_batch_size == 8
    assert [(one.name, list(one.dims)) for one in config.input] == [("INPUT0", [16]), ("INPUT1", [16])]
    assert not config.model_transaction_policy.decoupled
    unbatched = client.get_model_config("identity_bytes").config
    assert (unbatched.max_batch_size, list(unbatched.output[0].dims)) == (0, [-1, -1])
    assert client.get_model_config("identity_bytes", as_json=True)["config"]["input"][0]["data_type"] == "TYPE_STRING"


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_an_unknown_model_is_named_in_the_error(client: triton.InferenceServerClient, method: str) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as error:
        getattr(client, method)("nope")
    assert error.value.status() == "StatusCode.NOT_FOUND"


# Inference


def test_it_adds_and_subtracts(client: triton.InferenceServerClient) -> None:
    inputs, a, b = add_sub_inputs(rows=3)
    result = client.infer("simple", inputs, request_id="a-17")
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), a - b)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("a-17", "simple", "1")
    assert len(response.raw_output_contents) == 2


def test_only_requested_outputs_are_answered_in_the_order_asked(client: triton.InferenceServerClient) -> None:
    inputs, a, b = add_sub_inputs()
    wanted = [triton.InferRequestedOutput("OUTPUT1"), triton.InferRequestedOutput("OUTPUT0")]
    response = client.infer("simple", inputs, outputs=wanted).get_response()
    assert [output.name for output in response.outputs] == ["OUTPUT1", "OUTPUT0"]
    one = client.infer("simple", inputs, outputs=wanted[:1])
    assert one.as_numpy("OUTPUT0") is None
    np.testing.assert_array_equal(one.as_numpy("OUTPUT1"), a - b)


def sample(datatype: str) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(7)
    if datatype == "BYTES":
        return np.array([[b"", b"text", "čaj".encode()], [b"\0\xff", b"a" * 1000, b"1"]], dtype=np.object_)
    if datatype == "BOOL":
        return generator.random((3, 5)) > 0.5
    if datatype == "BF16":
        return generator.standard_normal((3, 5)).astype(ml_dtypes.bfloat16)
    if datatype.startswith("FP"):
        return generator.standard_normal((3, 5)).astype(f"f{int(datatype[2:]) // 8}")
    dtype = np.dtype(datatype.lower())
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (3, 5), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_comes_back_as_it_went(client: triton.InferenceServerClient, datatype: str) -> None:
    array = sample(datatype)
    result = client.infer(f"identity_{datatype.lower()}", [tensor("INPUT0", array, datatype)])
    answer = result.as_numpy("OUTPUT0")
    assert answer.dtype == array.dtype
    np.testing.assert_array_equal(answer, array)
    assert result.get_output("OUTPUT0").datatype == datatype


@pytest.mark.parametrize(("datatype", "value"), [("FP32", np.float32(1)), ("BYTES", b"x"), ("INT8", np.int8(1))])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 0)])
def test_empty_and_single_tensors_come_back(
    client: triton.InferenceServerClient, datatype: str, value: Any, shape: tuple[int, int]
) -> None:
    array = np.full(shape, value, dtype=np.object_ if datatype == "BYTES" else None)
    answer = client.infer(f"identity_{datatype.lower()}", [tensor("INPUT0", array, datatype)]).as_numpy("OUTPUT0")
    assert answer.shape == shape
    if array.size:
        np.testing.assert_array_equal(answer, array)


def test_a_large_tensor_comes_back(client: triton.InferenceServerClient) -> None:
    array = np.random.default_rng(1).standard_normal((3, 1_000_000), dtype=np.float32)
    answer = client.infer("identity_fp32", [tensor("INPUT0", array, "FP32")]).as_numpy("OUTPUT0")
    np.testing.assert_array_equal(answer, array)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(client: triton.InferenceServerClient, algorithm: str) -> None:
    array = np.zeros((10, 1000), np.float32)
    answer = client.infer("identity_fp32", [tensor("INPUT0", array, "FP32")], compression_algorithm=algorithm)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), array)


def typed(
    model: str, name: str, datatype: str, shape: list[int], **contents: list[Any]
) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model)
    one = request.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(one.contents, field).extend(values)
    return request


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-32768, 7]),
        ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [1, 65535]),
        ("UINT32", "uint_contents", [1, 2**32 - 1]),
        ("UINT64", "uint64_contents", [1, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -1.5]),
        ("FP64", "fp64_contents", [0.1, 1e300]),
        ("BYTES", "bytes_contents", [b"", b"\0text"]),
    ],
)
def test_typed_contents_are_answered_typed(
    client: triton.InferenceServerClient, datatype: str, field: str, values: list[Any]
) -> None:
    request = typed(f"identity_{datatype.lower()}", "INPUT0", datatype, [1, 2], **{field: values})
    response = client._client_stub.ModelInfer(request)
    assert list(response.raw_output_contents) == []
    assert list(getattr(response.outputs[0].contents, field)) == values


def test_parameters_of_every_kind_are_taken_and_come_back(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    sent = {"flag": True, "count": -5, "text": "hello", "share": 0.25}
    result = client.infer("simple", inputs, parameters=sent, priority=3, timeout=10_000_000)
    answered = result.get_response().parameters
    assert answered["flag"].bool_param is True
    assert answered["count"].int64_param == -5
    assert answered["text"].string_param == "hello"
    assert answered["share"].double_param == 0.25
    assert set(answered) == set(sent)


def test_sequence_parameters_are_taken_by_models_without_sequences(client: triton.InferenceServerClient) -> None:
    inputs, a, b = add_sub_inputs()
    result = client.infer("simple", inputs, sequence_id="abc", sequence_start=True, sequence_end=True)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)


def test_asynchronous_calls_call_back(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    inputs, a, b = add_sub_inputs()
    for number in range(50):
        client.async_infer("simple", inputs, lambda result, error: answers.put((result, error)), request_id=str(number))
    client.async_infer("nope", inputs, lambda result, error: answers.put((result, error)))
    seen, errors = set(), []
    for _ in range(51):
        result, error = answers.get(timeout=10)
        if error is not None:
            errors.append(error)
        else:
            seen.add(result.get_response().id)
            np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)
    assert seen == {str(number) for number in range(50)}
    assert [error.status() for error in errors] == ["StatusCode.NOT_FOUND"]


# Errors


def infer_error(
    client: triton.InferenceServerClient, model: str, inputs: list[triton.InferInput], **more: Any
) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as error:
        client.infer(model, inputs, **more)
    return error.value.status(), error.value.message()


def test_an_unknown_model_or_version_is_not_found(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    assert infer_error(client, "nope", inputs) == (
        "StatusCode.NOT_FOUND",
        "Request for unknown model: 'nope' is not found",
    )
    status, text = infer_error(client, "simple", inputs, model_version="9")
    assert status == "StatusCode.NOT_FOUND"
    assert text == "Request for unknown model: 'simple' version 9 is not found"


def test_a_wrong_tensor_is_named_with_what_was_expected(client: triton.InferenceServerClient) -> None:
    inputs, a, _ = add_sub_inputs()
    for wrong, words in (
        ([inputs[0]], ["INPUT1"]),
        ([inputs[0], tensor("INPUT2", a, "INT32")], ["INPUT2"]),
        ([inputs[0], tensor("INPUT1", a[:, :4].copy(), "INT32")], ["INPUT1", "[-1,16]", "[1,4]"]),
        ([inputs[0], tensor("INPUT1", a.astype(np.float32), "FP32")], ["INPUT1", "INT32", "FP32"]),
    ):
        status, text = infer_error(client, "simple", wrong)
        assert status == "StatusCode.INVALID_ARGUMENT"
        for word in words:
            assert word in text.replace(", ", ",")


def test_an_unknown_output_is_an_invalid_argument(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    status, text = infer_error(client, "simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT9")])
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "OUTPUT9" in text


def test_typed_and_raw_contents_together_are_refused_in_tritons_words(client: triton.InferenceServerClient) -> None:
    request = typed("simple", "INPUT0", "INT32", [1, 16], int_contents=list(range(16)))
    request.inputs.add(name="INPUT1", datatype="INT32", shape=[1, 16])
    request.raw_input_contents.append(bytes(64))
    with pytest.raises(
        grpc.RpcError, match="contents field must not be specified when using raw_input_contents"
    ) as error:
        client._client_stub.ModelInfer(request)
    assert "for 'INPUT0' for model 'simple'" in error.value.details()
    assert error.value.code().name == "INVALID_ARGUMENT"


def test_what_a_model_raises_is_told_without_a_traceback(client: triton.InferenceServerClient) -> None:
    status, text = infer_error(client, "failing", [tensor("INPUT0", np.ones(1, np.float32), "FP32")])
    assert status == "StatusCode.INTERNAL"
    assert "seven is not a number I like" in text
    assert "Traceback" not in text
    assert "line" not in text


def test_a_model_that_cannot_be_loaded_says_why(client: triton.InferenceServerClient) -> None:
    status, text = infer_error(client, "broken", [tensor("INPUT0", np.ones(1, np.float32), "FP32")])
    assert status == "StatusCode.FAILED_PRECONDITION"
    assert "SyntaxError" in text


def test_a_client_timeout_ends_the_call_at_its_time(client: triton.InferenceServerClient, tmp_path: Path) -> None:
    file = tmp_path / "release"
    name = np.array([str(file).encode()], dtype=np.object_)
    started = time.monotonic()
    status, _ = infer_error(client, "waiting", [tensor("FILE", name, "BYTES")], client_timeout=0.3)
    assert status == "StatusCode.DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 5
    file.touch()
    assert client.infer("waiting", [tensor("FILE", name, "BYTES")]).as_numpy("DONE").tolist() == [True]


# Classification


def test_classes_come_with_value_index_and_label(client: triton.InferenceServerClient) -> None:
    scores = np.array([[0.1, 0.4, 0.2, 0.3], [9, 1, 2, 3]], np.float32)
    wanted = [triton.InferRequestedOutput("SCORES", class_count=2)]
    answer = client.infer("scores", [tensor("INPUT0", scores, "FP32")], outputs=wanted).as_numpy("SCORES")
    assert answer.tolist() == [[b"0.400000:1:bee", b"0.300000:3:dog"], [b"9.000000:0:ant", b"3.000000:3:dog"]]


def test_classes_of_text_are_refused(client: triton.InferenceServerClient) -> None:
    text = np.array([[b"a"]], dtype=np.object_)
    wanted = [triton.InferRequestedOutput("OUTPUT0", class_count=2)]
    status, message = infer_error(client, "identity_bytes", [tensor("INPUT0", text, "BYTES")], outputs=wanted)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "BYTES" in message


# Repository


def test_the_index_tells_every_models_state(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    client.infer("simple", inputs)
    index = {row.name: row for row in client.get_model_repository_index().models}
    # "uploaded" where another test has put it there.
    assert set(index) - {"uploaded"} == {
        *("simple", "scores", "failing", "waiting", "broken"),
        *(f"identity_{datatype.lower()}" for datatype in DATATYPES),
    }
    assert (index["simple"].version, index["simple"].state, index["simple"].reason) == ("1", "READY", "")


def test_a_failed_model_is_unavailable_with_its_reason(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="failed to load 'broken'"):
        client.load_model("broken")
    index = {row.name: row for row in client.get_model_repository_index().models}
    assert index["broken"].state == "UNAVAILABLE"
    assert "SyntaxError" in index["broken"].reason
    assert not client.is_model_ready("broken")


def test_a_model_unloaded_is_gone_until_it_is_loaded(client: triton.InferenceServerClient) -> None:
    inputs, a, b = add_sub_inputs()
    client.load_model("simple")
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    status, text = infer_error(client, "simple", inputs)
    assert status in {"StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}
    assert "simple" in text
    client.load_model("simple")
    assert client.is_model_ready("simple")
    np.testing.assert_array_equal(client.infer("simple", inputs).as_numpy("OUTPUT0"), a + b)


def test_loading_what_does_not_exist_fails(client: triton.InferenceServerClient) -> None:
    for name in ("nope", "x" * 256, "../simple", ""):
        with pytest.raises(InferenceServerException, match="failed to load"):
            client.load_model(name)


def test_a_model_is_loaded_from_files_in_the_request(client: triton.InferenceServerClient) -> None:
    client.load_model(
        "uploaded",
        config='{"name": "uploaded", "backend": "mmcore_python", "max_batch_size": 4}',
        files={"file:1/model.py": ADD_SUB.encode()},
    )
    inputs, a, b = add_sub_inputs()
    np.testing.assert_array_equal(client.infer("uploaded", inputs).as_numpy("OUTPUT0"), a + b)
    assert client.get_model_config("uploaded").config.max_batch_size == 4
    client.unload_model("uploaded")
    assert not client.is_model_ready("uploaded")


def test_a_loads_configuration_overrides_the_folders(client: triton.InferenceServerClient) -> None:
    client.load_model("simple", config='{"max_batch_size": 2}')
    assert client.get_model_config("simple").config.max_batch_size == 2
    client.load_model("simple")
    assert client.get_model_config("simple").config.max_batch_size == 8


@pytest.mark.parametrize("path", ["file:../evil.py", "file:/tmp/evil.py", "file:1/../../evil.py", "file:"])
def test_files_that_leave_the_models_folder_are_refused(client: triton.InferenceServerClient, path: str) -> None:
    with pytest.raises(InferenceServerException) as error:
        client.load_model("uploaded", config="{}", files={path: b"x"})
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


# Statistics, settings


def counts(client: triton.InferenceServerClient, model: str) -> Any:
    stats = client.get_inference_statistics(model).model_stats
    assert len(stats) == 1
    return stats[0]


def test_statistics_count_requests_rows_and_time(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs(rows=5)
    client.infer("simple", inputs)
    before = counts(client, "simple")
    for _ in range(3):
        client.infer("simple", inputs)
    with pytest.raises(InferenceServerException):
        client.infer("simple", inputs[:1])
    after = counts(client, "simple")
    assert (after.name, after.version) == ("simple", "1")
    assert after.inference_count - before.inference_count == 15
    assert after.execution_count - before.execution_count == 3
    stats = after.inference_stats
    assert stats.success.count - before.inference_stats.success.count == 3
    assert stats.fail.count - before.inference_stats.fail.count == 1
    for part in (stats.compute_input, stats.compute_infer, stats.compute_output):
        assert part.count == stats.success.count
        assert 0 < part.ns < stats.success.ns
    assert stats.success.ns >= stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
    assert [row.batch_size for row in after.batch_stats if row.batch_size == 5] == [5]
    assert abs(after.last_inference / 1000 - time.time()) < 60


def test_statistics_of_all_models_are_one_list(client: triton.InferenceServerClient) -> None:
    inputs, _, _ = add_sub_inputs()
    client.infer("simple", inputs)
    names = [one.name for one in client.get_inference_statistics().model_stats]
    assert "simple" in names
    assert len(names) == len(set(names))


def test_trace_settings_fall_back_from_model_to_server(client: triton.InferenceServerClient) -> None:
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    client.update_trace_settings("simple", {"trace_rate": "2"})
    settings = client.get_trace_settings("simple", as_json=True)["settings"]
    assert (settings["trace_level"]["value"], settings["trace_rate"]["value"]) == (["TIMESTAMPS"], ["2"])
    client.update_trace_settings("simple", {"trace_rate": None})
    client.update_trace_settings(settings={"trace_level": None, "trace_rate": None})
    assert client.get_trace_settings("simple", as_json=True)["settings"]["trace_rate"]["value"] == ["1000"]
    for wrong in ({"trace_level": ["TENSORS"]}, {"trace_rate": "0"}, {"trace_file": "/tmp/x"}, {"colour": "red"}):
        with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
            client.update_trace_settings(settings=wrong)


def test_traced_requests_are_in_the_log(client: triton.InferenceServerClient, instance: Instance) -> None:
    inputs, _, _ = add_sub_inputs()
    client.update_trace_settings("simple", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "2"})
    for number in range(3):
        client.infer("simple", inputs, request_id=f"traced-{number}")
    client.update_trace_settings("simple", {"trace_level": None, "trace_rate": None, "trace_count": None})
    client.infer("simple", inputs, request_id="traced-3")
    log = instance.log_text()
    assert '"id": "traced-1"' in log
    assert "COMPUTE_START" in log
    assert "traced-2" not in log
    assert "traced-3" not in log


def test_log_settings_change_what_is_logged(client: triton.InferenceServerClient, instance: Instance) -> None:
    settings = client.get_log_settings(as_json=True)["settings"]
    assert settings["log_info"]["bool_param"] is True
    assert settings["log_verbose_level"]["uint32_param"] == 0
    changed = client.update_log_settings({"log_verbose_level": 1, "log_info": False}, as_json=True)["settings"]
    assert changed["log_verbose_level"]["uint32_param"] == 1
    assert not changed["log_info"].get("bool_param")
    client.update_log_settings({"log_verbose_level": 0, "log_info": True})
    for wrong in ({"log_file": "/tmp/x"}, {"log_format": "prose"}, {"colour": True}, {"log_info": None}):
        with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
            client.update_log_settings(wrong)


def test_cuda_shared_memory_is_unimplemented(client: triton.InferenceServerClient) -> None:
    for call in (
        client.get_cuda_shared_memory_status,
        lambda: client.register_cuda_shared_memory("r", b"", 0, 64),
    ):
        with pytest.raises(InferenceServerException) as error:
            call()
        assert error.value.status() == "StatusCode.UNIMPLEMENTED"
    # Triton's own examples of system shared memory begin with this.
    client.unregister_cuda_shared_memory()
