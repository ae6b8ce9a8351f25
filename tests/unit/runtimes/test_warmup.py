"""A model is called ready when it has answered its warm-up requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcore.cache.cache import bind_signature
from mmcore.errors import LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec, Warmup, WarmupInput
from mmcore.routing import Router
from mmcore.runtimes import OutputTensor
from mmcore.runtimes.warmup import warm_up
from tests.unit.models_in_memory import FakeModel, FakeOrigin


class Warmed(FakeModel):
    """Keeps what it was asked; ``fault`` is raised instead of an answer."""

    def __init__(self, spec: TensorSpec = FakeModel.inputs[0], fault: BaseException | None = None) -> None:
        super().__init__()
        self.inputs = (spec,)
        self.fault = fault
        self.asked: list[NDArray[Any]] = []

    def infer(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        self.asked.append(inputs["X"])
        if self.fault is not None:
            raise self.fault
        return [("Y", "FP32", inputs["X"])]


def warm(model: Warmed, *warmups: Warmup) -> list[NDArray[Any]]:
    source = ModelSource("m", "1", "fake", Path(__file__), ModelSettings(warmups=warmups))
    warm_up(source, model, bind_signature(model))
    return model.asked


def test_zeros_are_asked_as_often_as_told() -> None:
    asked = warm(Warmed(), Warmup("z", {"X": WarmupInput("FP32", (3,))}, count=2))
    assert [array.tolist() for array in asked] == [[0, 0, 0]] * 2


@pytest.mark.parametrize("datatype", ["FP32", "INT8", "BOOL", "BYTES", "FP16"])
def test_random_data_has_the_datatype(datatype: str) -> None:
    (asked,) = warm(
        Warmed(TensorSpec("X", datatype, (-1, 50))), Warmup("r", {"X": WarmupInput(datatype, (2, 50), random=True)})
    )
    assert asked.shape == (2, 50)
    if datatype != "BYTES":
        assert len(np.unique(asked)) > 1


def test_data_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(np.array([1, 2], np.float32).tobytes())
    (asked,) = warm(Warmed(), Warmup("f", {"X": WarmupInput("FP32", (2,), data=tmp_path / "x")}))
    assert asked.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("given_input", "words"),
    [
        ({"X": WarmupInput("INT32", (1,))}, "'w' failed: .*X"),
        ({"Z": WarmupInput("FP32", (1,))}, "'w' failed: .*Z"),
        ({"X": WarmupInput("FP32", (1, 2))}, "'w' failed: .*shape"),
        ({"X": WarmupInput("FP32", (2**40,))}, "is too large"),
        ({"X": WarmupInput("FP32", (1,), data=Path("/nowhere/x"))}, "'w' failed: FileNotFoundError"),
    ],
)
def test_a_request_that_does_not_fit_fails_the_load(given_input: dict[str, WarmupInput], words: str) -> None:
    with pytest.raises(LoadFailed, match=words):
        warm(Warmed(), Warmup("w", given_input))


@pytest.mark.parametrize("fault", [ValueError("cold"), SystemExit(3)])
async def test_a_model_that_fails_its_warm_up_is_not_loaded(fault: BaseException) -> None:
    model = Warmed(fault=fault)
    router = Router(capacity_bytes=2**20, load=lambda source: model)
    settings = ModelSettings(warmups=(Warmup("w", {"X": WarmupInput("FP32", (1,))}),))
    router.register("m", ("1",), FakeOrigin(settings))
    with pytest.raises(LoadFailed, match="warm-up 'w' failed"):
        await router.load("m")
    assert model.closed.is_set()
    assert router.lookup("m") is None
    model.fault = None
    model.closed.clear()
    router.cache.failures.clear("m")
    assert await router.load("m") is router.lookup("m")
    await router.close()
