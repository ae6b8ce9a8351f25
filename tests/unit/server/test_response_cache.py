"""Answers given again: to the same request only, of the same copy only, within bounds, and counted as Triton counts."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcore._ext.responses import ResponseCache
from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.errors import InferenceFailed
from mmcore.model import ModelSettings, ModelSource
from mmcore.routing import Copy, Router
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Body, Waiting
from mmcore.server.inference import Inference
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tracing import Tracing
from tests.unit.models_in_memory import FakeModel, FakeOrigin, names_of
from tests.unit.server.test_inference import FakeCall

KEPT = {"inline": ModelSettings(execution="inline", response_cache=True)}
KEPT["thread"] = ModelSettings(execution="thread", response_cache=True)
CAPACITY = 64 * 2**10


class Numbering(FakeModel):
    """Answers its input plus ``added``, and counts how often it was asked."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.added = added
        self.asked = 0
        self.gate: threading.Event | None = None

    def infer(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        self.asked += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        if (inputs["X"] < 0).any():
            raise InferenceFailed("negative")
        return [("Y", "FP32", inputs["X"] + self.added)]


class Bench:
    """Inference on a model ``m``, each load of which adds one more to its input."""

    def __init__(self, settings: ModelSettings, capacity_bytes: int = CAPACITY) -> None:
        self.models: list[Numbering] = []
        self.responses = ResponseCache(capacity_bytes)
        self.router = Router(capacity_bytes=2**20, load=self._load)
        self.origin = FakeOrigin(settings)
        self.router.register("m", ("1",), self.origin)
        self._inference = Inference(
            self.router, names_of(self.router), SharedMemory(), Tracing(self.router), Waiting(), self.responses
        )

    def _load(self, source: ModelSource) -> FakeModel:
        self.models.append(Numbering(len(self.models) + 1))
        return self.models[-1]

    async def replace(self) -> None:
        """Load it anew behind the copy that serves."""
        await self.router.cache.replace("m", "1", self.origin)

    @property
    def copy(self) -> Copy:
        found = self.router.lookup("m")
        assert found is not None
        return found

    @property
    def asked(self) -> int:
        return sum(model.asked for model in self.models)

    async def ask(self, *values: float, **more: Any) -> list[float]:
        """What a request is answered, whose id must be the one it came with."""
        call = FakeCall()
        message = self.begin(call, *values, **more)
        if message is None:
            await call.ended.wait()
            if call.error is not None:
                raise InferenceFailed(call.error[1])
            message = call.message
        assert message is not None
        response = decode_infer_response(b"".join(message) if isinstance(message, list) else bytes(message))
        assert response.id == more.get("request_id", "")
        assert (response.model_name, response.model_version) == ("m", "1")
        assert response.raw == more.get("raw", True)
        found: list[float] = response.outputs[0].array().tolist()
        return found

    def begin(self, call: FakeCall, *values: float, **more: Any) -> Body | None:
        body = encode_infer_request("m", [("X", "FP32", np.array(values, np.float32))], **more)
        return self._inference.infer(call, bytes(body))  # type: ignore[arg-type]  # as much of a call as is asked of one


@pytest.fixture(params=list(KEPT))
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = Bench(KEPT[request.param])
    yield made
    await made.router.close()


async def test_the_same_request_is_not_asked_of_the_model_again(bench: Bench) -> None:
    for number in range(20):
        assert await bench.ask(1, 2) == [2, 3]
        assert await bench.ask(1, 2, request_id=f"number {number}") == [2, 3]
    assert bench.asked == 1
    assert await bench.ask(1, 3) == [2, 4]
    assert await bench.ask(1) == [2]
    assert await bench.ask(1, 2, raw=False) == [2, 3]
    assert await bench.ask(1, 2, outputs=["Y"]) == [2, 3]
    assert bench.asked == 5


async def test_without_the_setting_every_request_is_asked() -> None:
    bench = Bench(ModelSettings(execution="inline"))
    for _ in range(5):
        await bench.ask(1)
    assert bench.asked == 5
    assert bench.responses.size_bytes == 0
    counted = bench.copy.statistics.snapshot()
    assert (counted.cache_hit, counted.cache_miss) == ((0, 0), (0, 0))
    await bench.router.close()


async def test_what_has_parameters_is_always_asked(bench: Bench) -> None:
    for _ in range(3):
        await bench.ask(1, parameters={"mine": 1})
    assert bench.asked == 3


async def test_hits_and_misses_are_counted_as_triton_does(bench: Bench) -> None:
    for values in ((1.0, 2.0), (1.0, 2.0), (3.0, 4.0), (1.0, 2.0)):
        await bench.ask(*values)
    counted = bench.copy.statistics.snapshot()
    assert (counted.cache_hit.count, counted.cache_miss.count) == (2, 2)
    assert 0 < counted.cache_hit.ns < 10e9
    assert 0 < counted.cache_miss.ns < 10e9
    assert (counted.success.count, counted.queue.count) == (4, 4)
    assert (counted.compute_input.count, counted.compute_infer.count, counted.compute_output.count) == (2, 2, 2)
    assert (counted.inference_count, counted.execution_count) == (4, 2)


async def test_an_error_is_not_kept(bench: Bench) -> None:
    for _ in range(3):
        with pytest.raises(InferenceFailed, match="negative"):
            await bench.ask(-1)
    assert bench.asked == 3
    assert len(bench.responses) == 0


async def test_a_model_loaded_anew_does_not_answer_for_its_predecessor(bench: Bench) -> None:
    assert await bench.ask(1) == [2]
    await bench.router.unload("m")
    assert bench.responses.size_bytes == 0
    await bench.router.load_explicit("m")
    assert await bench.ask(1) == [3]
    await bench.replace()
    assert bench.responses.size_bytes == 0
    assert await bench.ask(1) == [4]
    assert await bench.ask(1) == [4]
    assert bench.asked == 3


async def test_an_answer_that_comes_after_its_model_has_gone_is_not_kept() -> None:
    bench = Bench(KEPT["thread"])
    await bench.ask(1)
    bench.models[0].gate = threading.Event()
    call = FakeCall()
    assert bench.begin(call, 5) is None
    await bench.replace()
    bench.models[0].gate.set()
    await call.ended.wait()
    assert len(bench.responses) == 0
    assert await bench.ask(5) == [7]
    await bench.router.close()


async def test_the_least_recently_used_answers_make_room(bench: Bench) -> None:
    for number in range(1000):
        await bench.ask(number)
        assert bench.responses.size_bytes <= CAPACITY
        await bench.ask(0)
    assert 50 < len(bench.responses) < 400
    asked = bench.asked
    await bench.ask(0)
    await bench.ask(999)
    assert bench.asked == asked
    await bench.ask(1)
    assert bench.asked == asked + 1


async def test_large_requests_and_answers_are_kept_while_they_fit(bench: Bench) -> None:
    fits, exceeds = range(8_000), range(20_000)
    for _ in range(3):
        assert await bench.ask(*fits) == [value + 1 for value in fits]
    assert bench.asked == 1
    for _ in range(3):
        assert await bench.ask(*exceeds) == [value + 1 for value in exceeds]
    assert bench.asked == 4
    assert len(bench.responses) == 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.text(max_size=200), st.booleans(), st.booleans()), min_size=1, max_size=40)
)
async def test_answers_are_those_without_a_cache(asked: list[tuple[int, str, bool, bool]]) -> None:
    bench = Bench(KEPT["inline"], capacity_bytes=2000)
    for value, request_id, raw, named in asked:
        outputs = ["Y"] if named else []
        assert await bench.ask(value, request_id=request_id, raw=raw, outputs=outputs) == [value + 1]
    assert bench.responses.size_bytes <= 2000
    await bench.router.close()


async def test_an_id_in_an_uncommon_form_is_answered_with_it() -> None:
    bench = Bench(KEPT["inline"])
    await bench.ask(1)
    plain = bytes(encode_infer_request("m", [("X", "FP32", np.ones(1, np.float32))]))
    for form in (b"\x9a\x00\x02ab", b"\x1a\x82\x00ab", b"\x1a\x01c\x1a\x02ab"):
        for _ in range(2):
            for body in (plain + form, form + plain):
                message = bench._inference.infer(FakeCall(), body)  # type: ignore[arg-type]  # as much as is asked of one
                assert isinstance(message, bytes)
                response = decode_infer_response(message)
                assert (response.id, response.outputs[0].array().tolist()) == ("ab", [2])
    await bench.router.close()
