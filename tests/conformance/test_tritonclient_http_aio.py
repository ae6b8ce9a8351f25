"""The asyncio HTTP client of tritonclient."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import tritonclient.http.aio as triton
from tritonclient.utils import InferenceServerException

from tests.serving import Instance

pytestmark = pytest.mark.slow


@pytest.fixture
async def client(instance: Instance) -> AsyncIterator[triton.InferenceServerClient]:
    async with triton.InferenceServerClient(instance.rest) as client:
        yield client


async def test_every_question_about_server_and_models_is_answered(client: triton.InferenceServerClient) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("simple")
    assert (await client.get_server_metadata())["name"] == "triton"
    assert (await client.get_model_metadata("simple"))["platform"] == "python"
    assert (await client.get_model_config("simple"))["name"] == "simple"
    assert len((await client.get_inference_statistics("simple"))["model_stats"]) == 1
    assert "simple" in [row["name"] for row in await client.get_model_repository_index()]
    assert (await client.get_log_settings())["log_error"] is True
    assert (await client.get_trace_settings())["trace_level"] == ["OFF"]
    assert await client.get_system_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="unknown model") as error:
        await client.get_model_metadata("nope")
    assert error.value.status() == "404"


@pytest.mark.parametrize("binary", [True, False])
async def test_hundreds_of_requests_at_once_are_each_answered_right(
    client: triton.InferenceServerClient, binary: bool
) -> None:
    async def one(number: int) -> None:
        a = np.full((1 + number % 3, 16), number, np.int32)
        inputs = []
        for name in ("INPUT0", "INPUT1"):
            inputs.append(triton.InferInput(name, list(a.shape), "INT32"))
            inputs[-1].set_data_from_numpy(a, binary_data=binary)
        result = await client.infer("simple", inputs, request_id=str(number))
        assert result.get_response()["id"] == str(number)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), a + a)

    await asyncio.gather(*(one(number) for number in range(200)))


async def test_models_are_loaded_and_unloaded(client: triton.InferenceServerClient) -> None:
    await client.load_model("scores")
    assert await client.is_model_ready("scores")
    await client.unload_model("scores")
    assert not await client.is_model_ready("scores")
    await client.load_model("scores")
