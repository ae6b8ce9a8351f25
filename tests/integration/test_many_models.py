"""Hundreds of small models of mixed formats in one process: all answer, and threads do not grow with their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bench.model_zoo import KINDS, Zoo
from tests.serving import Instance, Serve, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MODELS = 300

#: Answers the thread pools of the process as threadpoolctl sees them, once a framework and its libraries are there.
TELLS_POOLS = """
import json

class Model:
    inputs = [("X", "FP32", [1])]
    outputs = [("POOLS", "BYTES", [1])]

    def predict(self, inputs):
        import scipy.linalg, sklearn.ensemble, threadpoolctl
        pools = {pool["filepath"]: pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
        return {"POOLS": [json.dumps(pools)]}
"""


def ask(client: triton.InferenceServerClient, zoo: Zoo, number: int) -> None:
    """Ask a model of the zoo, which has to answer what its framework does."""
    asked = zoo.question(number)
    given = triton.InferInput(asked.input, list(asked.array.shape), asked.datatype)
    given.set_data_from_numpy(asked.array)
    found = client.infer(zoo.name(number), [given]).as_numpy(asked.output)
    np.testing.assert_allclose(found, asked.expected, rtol=1e-5, atol=1e-6, err_msg=zoo.name(number))


def test_threads_do_not_grow_with_the_models_and_each_tells_its_memory(serve: Serve, tmp_path: Path) -> None:
    zoo = Zoo()
    zoo.write(tmp_path, range(MODELS))
    instance = serve(tmp_path)
    process = psutil.Process(instance.process.pid)
    with triton.InferenceServerClient(instance.grpc) as client:
        for number in range(len(KINDS) * 4):
            ask(client, zoo, number)
        threads, memory = process.num_threads(), process.memory_info().rss
        for number in range(MODELS):
            ask(client, zoo, number)
        grown = process.memory_info().rss - memory
        assert process.num_threads() == threads
        told = {one.name: one.memory_usage[0].byte_size for one in client.get_inference_statistics().model_stats}
    assert len(told) == MODELS
    assert all(1_000 < size < 20_000_000 for size in told.values())
    assert grown < 200_000 * MODELS


def test_wrong_requests_never_reach_a_framework(serve: Serve, tmp_path: Path) -> None:
    zoo = Zoo()
    numbers = range(len(KINDS))
    zoo.write(tmp_path, numbers)
    with triton.InferenceServerClient(serve(tmp_path).grpc) as client:
        for number in numbers:
            name, asked = zoo.name(number), zoo.question(number)
            width = asked.array.shape[1]
            (told,) = client.get_model_metadata(name).inputs
            assert (told.name, told.datatype, list(told.shape)) == (asked.input, "FP32", [-1, width])
            for what, shape, datatype, more in (
                (asked.input, [1, width + 1], "FP32", 0),
                (asked.input, [width], "FP32", 0),
                (asked.input, [1, width], "BYTES", 0),
                (asked.input, [1, width], "FP32", 1),
            ):
                values = np.full(shape, b"x", object) if datatype == "BYTES" else np.zeros(shape, np.float32)
                given = [triton.InferInput(f"{what}{extra or ''}", shape, datatype) for extra in range(more + 1)]
                for one in given:
                    one.set_data_from_numpy(values)
                with pytest.raises(InferenceServerException) as refused:
                    client.infer(name, given)
                assert refused.value.status() == "StatusCode.INVALID_ARGUMENT", (name, shape, datatype)
            (counted,) = client.get_inference_statistics(name).model_stats
            assert (counted.execution_count, counted.inference_stats.fail.count) == (0, 4)
            ask(client, zoo, number)


def pools(instance: Instance, model: str) -> dict[str, int]:
    given = triton.InferInput("X", [1], "FP32")
    given.set_data_from_numpy(np.ones(1, np.float32))
    with triton.InferenceServerClient(instance.grpc) as client:
        found: dict[str, int] = json.loads(client.infer(model, [given]).as_numpy("POOLS")[0])
    return found


def test_libraries_have_one_thread_in_the_server_and_in_every_worker(serve: Serve, tmp_path: Path) -> None:
    write_model(tmp_path, "here", TELLS_POOLS)
    write_model(tmp_path, "isolated", TELLS_POOLS, settings="isolation: process\n")
    instance = serve(tmp_path)
    for model in ("here", "isolated"):
        found = pools(instance, model)
        assert any("openblas" in file for file in found)
        assert any("gomp" in file for file in found)
        assert set(found.values()) == {1}


def test_the_environment_can_say_otherwise(serve: Serve, tmp_path: Path) -> None:
    write_model(tmp_path, "isolated", TELLS_POOLS, settings="isolation: process\n")
    instance = serve(tmp_path, OMP_NUM_THREADS="3")
    assert {threads for file, threads in pools(instance, "isolated").items() if "gomp" in file} == {3}
