"""The asyncio gRPC client of tritonclient, call by call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from tests.serving import Instance

pytestmark = pytest.mark.slow


@pytest.fixture
async def client(instance: Instance) -> AsyncIterator[triton.InferenceServerClient]:
    async with triton.InferenceServerClient(instance.grpc) as client:
        yield client


def inputs(rows: int = 1) -> tuple[list[triton.InferInput], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    a = np.arange(16 * rows, dtype=np.int32).reshape(rows, 16)
    b = np.ones((rows, 16), np.int32)
    made = []
    for name, array in (("INPUT0", a), ("INPUT1", b)):
        made.append(triton.InferInput(name, list(array.shape), "INT32"))
        made[-1].set_data_from_numpy(array)
    return made, a, b


async def test_every_question_about_server_and_models_is_answered(client: triton.InferenceServerClient) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("simple")
    assert (await client.get_server_metadata()).name == "triton"
    assert (await client.get_model_metadata("simple")).platform == "python"
    assert (await client.get_model_config("simple")).config.name == "simple"
    assert len((await client.get_inference_statistics("simple")).model_stats) == 1
    assert "simple" in [row.name for row in (await client.get_model_repository_index()).models]
    assert (await client.get_log_settings()).settings["log_error"].bool_param
    assert (await client.get_trace_settings()).settings["trace_level"].value == ["OFF"]
    assert len((await client.get_system_shared_memory_status()).regions) == 0


async def test_hundreds_of_requests_at_once_are_each_answered_right(client: triton.InferenceServerClient) -> None:
    async def one(number: int) -> None:
        request, a, b = inputs(rows=1 + number % 4)
        result = await client.infer("simple", request, request_id=str(number))
        assert result.get_response().id == str(number)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + b)

    await asyncio.gather(*(one(number) for number in range(300)))


async def test_an_error_has_status_and_text(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as error:
        await client.infer("nope", inputs()[0])
    assert error.value.status() == "StatusCode.NOT_FOUND"


async def test_a_cancelled_request_does_not_disturb_others(
    client: triton.InferenceServerClient, tmp_path: Path
) -> None:
    file = tmp_path / "release"
    name = triton.InferInput("FILE", [1], "BYTES")
    name.set_data_from_numpy(np.array([str(file).encode()], dtype=np.object_))
    stuck = asyncio.ensure_future(client.infer("waiting", [name]))
    started = file.with_name("release.started")
    while not started.exists():
        await asyncio.sleep(0.005)
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    request, a, b = inputs()
    np.testing.assert_array_equal((await client.infer("simple", request)).as_numpy("OUTPUT0"), a + b)
    file.touch()


async def test_models_are_loaded_and_unloaded(client: triton.InferenceServerClient) -> None:
    await client.load_model("scores")
    assert await client.is_model_ready("scores")
    await client.unload_model("scores")
    assert not await client.is_model_ready("scores")
    await client.load_model("scores")
    assert await client.is_model_ready("scores")


async def test_an_iterator_of_requests_is_answered_in_order(client: triton.InferenceServerClient) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(20):
            yield {
                "model_name": "nope" if number == 7 else "simple",
                "inputs": inputs()[0],
                "request_id": str(number),
            }

    seen = []
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            assert "unknown model" in error.message()
            seen.append("error")
        else:
            seen.append(result.get_response().id)
    assert seen == [str(number) for number in range(7)] + ["error"] + [str(number) for number in range(8, 20)]
