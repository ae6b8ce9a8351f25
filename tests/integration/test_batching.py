"""Batching of real models in a running instance: exact answers, and statistics that say what was run together."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import Queue
from typing import Any

import joblib
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.batching.merging import Merging
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import detect
from mmcore.transport import Channel
from tests.serving import ROOT, Serve, write_model

pytestmark = pytest.mark.slow

CALLERS = 64
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MERGED = {"iris-sklearn": "predict", "iris-xgboost": "predict", "iris-lightgbm": "predict", "mlp-onnx": "input"}

#: Slow to call, whatever the number of rows; fails on a negative one.
SLOW_CALL = """
import time

class Model:
    inputs = [("X", "FP32", [-1, 2])]
    outputs = [("Y", "FP32", [-1, 2])]

    def predict(self, inputs):
        time.sleep(0.01)
        if (inputs["X"] < 0).any():
            raise ValueError("a negative row")
        return {"Y": inputs["X"] * 2}
"""

WARMUP = """
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 2 ] } ]
dynamic_batching { max_queue_delay_microseconds: 1000 preferred_batch_size: 4 }
model_warmup [ { name: "w" batch_size: 1 inputs { key: "X" value { data_type: TYPE_FP32 dims: [ 2 ] KIND: true } } } ]
"""
REFUSES_ZEROS = SLOW_CALL.replace('(inputs["X"] < 0)', '(inputs["X"] == 0)')


@pytest.fixture(scope="module")
def samples() -> Path:
    folder = ROOT / "build" / "samples"
    subprocess.run([sys.executable, ROOT / "deploy/samples/train.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def models(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in MERGED:
        shutil.copytree(samples / name, root / name)
    shutil.copytree(samples / "iris-sklearn", root / "alone")
    (root / "alone" / "mmcore.yaml").write_text("max_batch_size: 0\n")
    write_model(root, "slow", SLOW_CALL, settings="max_batch_size: 64\nexecution: thread\n")
    write_model(root, "short-queue", SLOW_CALL, settings="max_batch_size: 1\nexecution: thread\nqueue_limit: 1\n")
    for name, source, kind in (("warm", SLOW_CALL, "zero_data"), ("cold", REFUSES_ZEROS, "zero_data")):
        folder = write_model(root, name, source, version="1")
        (folder / "config.pbtxt").write_text(WARMUP.replace("KIND", kind))
    return root


@pytest.fixture(scope="module")
def address(serve_for_session: Serve, models: Path) -> str:
    return serve_for_session(models).grpc


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


def request(name: str, array: NDArray[np.float32]) -> list[triton.InferInput]:
    made = triton.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return [made]


def ask_together(
    client: triton.InferenceServerClient, model: str, name: str, arrays: list[NDArray[np.float32]], **more: Any
) -> list[Any]:
    """Results or errors of many requests under way at once, by request."""
    futures: list[Future[Any]] = []
    slots = threading.Semaphore(CALLERS)
    for array in arrays:
        slots.acquire()
        future: Future[Any] = Future()
        futures.append(future)

        def done(result: Any, error: Any, future: Future[Any] = future) -> None:
            slots.release()
            future.set_result(error or result)

        client.async_infer(model, request(name, array), done, **more)
    return [future.result(30) for future in futures]


def counted(client: triton.InferenceServerClient, model: str) -> Any:
    return client.get_inference_statistics(model).model_stats[0]


@pytest.mark.parametrize("model", [*MERGED, "alone"])
def test_concurrent_callers_get_their_own_answers(
    client: triton.InferenceServerClient, samples: Path, model: str
) -> None:
    name = MERGED.get(model, "predict")
    random = np.random.default_rng(3)
    arrays = [random.uniform(0, 8, (random.integers(1, 4), 4)).astype(np.float32) for _ in range(2000)]
    (source,) = detect(samples / ("iris-sklearn" if model == "alone" else model)).values()
    framework = load_model(source)
    output = framework.default_outputs[0]
    before = counted(client, model)
    for array, result in zip(arrays, ask_together(client, model, name, arrays), strict=True):
        ((_, _, expected),) = framework.infer({name: array}, ())
        # The network's matrix products round by the number of rows.
        np.testing.assert_allclose(result.as_numpy(output), expected, rtol=1e-5 if model == "mlp-onnx" else 0)
    counts = counted(client, model)
    assert counts.inference_count - before.inference_count == sum(len(array) for array in arrays)
    assert sum(batch.compute_infer.count for batch in counts.batch_stats) == counts.execution_count
    if model == "alone":
        assert counts.execution_count - before.execution_count == len(arrays)
    assert counts.inference_stats.success.count - before.inference_stats.success.count == len(arrays)


async def test_a_fast_models_requests_of_one_turn_run_together(
    client: triton.InferenceServerClient, address: str, models: Path
) -> None:
    name = "iris-sklearn"
    before = counted(client, name)
    flowers = np.random.default_rng(4).uniform(0, 8, (CALLERS, 4)).astype(np.float32)
    estimator = joblib.load(models / name / "model.joblib")
    bodies = [bytes(encode_infer_request(name, [("predict", "FP32", flower[None])])) for flower in flowers]
    channel = Channel(address)
    for _ in range(50):
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(channel.unary(MODEL_INFER, body)) for body in bodies]
        labels = [decode_infer_response(bytes(task.result())).outputs[0].array()[0, 0] for task in asked]
        assert labels == estimator.predict(flowers).tolist()
    await channel.close()
    after = counted(client, name)
    assert after.inference_count - before.inference_count == 50 * CALLERS
    assert after.execution_count - before.execution_count < 25 * CALLERS


def test_a_slow_models_waiting_requests_run_together(client: triton.InferenceServerClient) -> None:
    arrays = [np.full((1, 2), value, np.float32) for value in range(300)]
    before = counted(client, "slow")
    for array, result in zip(arrays, ask_together(client, "slow", "X", arrays), strict=True):
        np.testing.assert_array_equal(result.as_numpy("Y"), array * 2)
    counts = counted(client, "slow")
    assert counts.inference_count - before.inference_count == 300
    assert counts.execution_count - before.execution_count < 100
    assert max(batch.batch_size for batch in counts.batch_stats) > 8
    assert counts.inference_stats.queue.ns > 0


def test_a_bad_request_fails_alone(client: triton.InferenceServerClient) -> None:
    arrays = [np.full((1, 2), -1 if value == 17 else value, np.float32) for value in range(60)]
    results = ask_together(client, "slow", "X", arrays)
    failed = [at for at, result in enumerate(results) if isinstance(result, InferenceServerException)]
    assert failed == [17]
    assert "ValueError: a negative row" in str(results[17])


def test_requests_of_a_stream_run_together(client: triton.InferenceServerClient) -> None:
    before = counted(client, "slow")
    answers: Queue[Any] = Queue()
    client.start_stream(lambda result, error: answers.put(error or result))
    for value in range(200):
        client.async_stream_infer("slow", request("X", np.full((1, 2), value, np.float32)), request_id=str(value))
    for value in range(200):
        result = answers.get(timeout=30)
        assert result.get_response().id == str(value)
        np.testing.assert_array_equal(result.as_numpy("Y"), np.full((1, 2), value * 2, np.float32))
    client.stop_stream()
    assert counted(client, "slow").execution_count - before.execution_count < 100


def test_a_full_queue_refuses(client: triton.InferenceServerClient) -> None:
    arrays = [np.ones((1, 2), np.float32)] * 40
    results = ask_together(client, "short-queue", "X", arrays)
    refused = [str(result) for result in results if isinstance(result, InferenceServerException)]
    assert refused
    assert all("RESOURCE_EXHAUSTED" in text and "1 requests waiting" in text for text in refused)
    assert len(refused) < 40
    with pytest.raises(InferenceServerException, match="batch-size must be <= 1"):
        client.infer("short-queue", request("X", np.ones((2, 2), np.float32)))


def test_a_request_waits_no_longer_than_it_says(client: triton.InferenceServerClient) -> None:
    arrays = [np.ones((40, 2), np.float32)] * 20
    results = ask_together(client, "slow", "X", arrays, timeout=5000)
    expired = [str(result) for result in results if isinstance(result, InferenceServerException)]
    assert expired
    assert all("timeout expired" in text for text in expired)


def test_warm_up_and_the_configuration_that_tells_of_it(client: triton.InferenceServerClient) -> None:
    client.infer("warm", request("X", np.ones((1, 2), np.float32)))
    config = client.get_model_config("warm").config
    assert config.max_batch_size == 8
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.model_warmup[0].inputs["X"].zero_data
    assert config.model_warmup[0].batch_size == 1
    with pytest.raises(InferenceServerException, match=r"warm-up 'w' failed: .*a negative row"):
        client.infer("cold", request("X", np.ones((1, 2), np.float32)))
    assert not client.is_model_ready("cold")


def test_the_configuration_tells_how_requests_are_merged(client: triton.InferenceServerClient) -> None:
    merged = client.get_model_config("iris-sklearn").config
    assert merged.max_batch_size > 1
    assert merged.HasField("dynamic_batching")
    assert list(merged.input[0].dims) == [4]
    alone = client.get_model_config("alone").config
    assert alone.max_batch_size == 0
    assert not alone.HasField("dynamic_batching")
    assert list(alone.input[0].dims) == [-1, 4]


@pytest.fixture(scope="module", params=MERGED)
def loaded(request: pytest.FixtureRequest, samples: Path) -> tuple[str, LoadedModel]:
    (source,) = detect(samples / request.param).values()
    return MERGED[request.param], load_model(source)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_merged_answers_are_the_single_ones(loaded: tuple[str, LoadedModel], data: st.DataObject) -> None:
    name, model = loaded
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=20))
    members = [{name: random.normal(4, 3, (count, 4)).astype(np.float32)} for count in counts]
    names = data.draw(st.sampled_from([(), *((spec.name,) for spec in model.outputs)]))
    results = Merging("m", most_rows=1000, trusted=True).run(model.infer, members, counts, names, check=False)
    exact = model.platform in ("xgboost", "lightgbm")
    for member, result in zip(members, results, strict=True):
        assert result.outputs is not None
        assert result.rows == sum(counts)
        for mine, alone in zip(result.outputs, model.infer(member, names), strict=True):
            assert mine[:2] == alone[:2]
            if exact or alone[2].dtype.kind != "f":
                np.testing.assert_array_equal(mine[2], alone[2])
            else:
                # Matrix products may round otherwise for another number of rows: by a few units of the last place.
                scale = float(np.abs(alone[2]).max())
                np.testing.assert_allclose(mine[2], alone[2], rtol=0, atol=16 * np.finfo(alone[2].dtype).eps * scale)
