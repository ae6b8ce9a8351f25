"""Models, origins and callers that are made up, for the tests of the rooms above the runtimes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcore.cache import Copy
from mmcore.errors import Cancelled, NotFound
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.registry import open_registry
from mmcore.routing import Names, Router
from mmcore.runtimes import OutputTensor
from mmcore.storage.cancellation import Cancellation


class FakeModel:
    """A model that answers its input; ``work`` runs in each inference, in the thread that runs it."""

    platform = "fake"
    inputs = (TensorSpec("X", "FP32", (-1,)),)
    outputs = (TensorSpec("Y", "FP32", (-1,)),)
    default_outputs = ("Y",)
    any_input_name = False
    accepts: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, size_bytes: int = 10, work: Callable[[], None] = lambda: None) -> None:
        self.size_bytes = size_bytes
        self.work = work
        self.threads: list[str] = []
        self.closed = threading.Event()

    def infer(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        assert not self.closed.is_set(), "used after it was closed"
        self.threads.append(threading.current_thread().name)
        self.work()
        return [("Y", "FP32", inputs["X"])]

    def close(self) -> None:
        assert not self.closed.is_set(), "closed twice"
        self.closed.set()


class FakeOrigin:
    """Versions by name, with what their loads are to do; ``fault`` is raised by the checks of a version's files."""

    def __init__(self, settings: ModelSettings | None = None) -> None:
        self.settings = settings or ModelSettings()
        self.gone: set[str] = set()
        self.fault: Exception | None = None
        #: Released by each who looks for files that are being pulled, which ends only when the load is given up.
        self.pulling: threading.Semaphore | None = None

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        if self.pulling is not None:
            assert cancelled is not None
            given_up = threading.Event()
            with cancelled.calling(given_up.set):
                self.pulling.release()
                assert given_up.wait(10)
            raise Cancelled("the pull was cancelled")
        if version in self.gone:
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return ModelSource(name, version, "fake", Path(__file__), self.settings)

    def confirm(self, name: str) -> None:
        if self.fault is not None:
            raise self.fault


class Loader:
    """Stands for ``load_model``: counts, waits at a gate, fails or gives the model that is set for a name."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.errors: dict[str, BaseException] = {}
        self.gates: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Event] = {}
        self.loads: list[str] = []
        self.models: list[FakeModel] = []
        self.threads: set[str] = set()

    def gate(self, name: str) -> threading.Event:
        """Loads of that name wait for this event; ``entered[name]`` tells that one does."""
        self.entered[name] = threading.Event()
        return self.gates.setdefault(name, threading.Event())

    def __call__(self, source: ModelSource) -> FakeModel:
        self.loads.append(source.name)
        self.threads.add(threading.current_thread().name)
        if source.name in self.gates:
            self.entered[source.name].set()
            assert self.gates[source.name].wait(30)
        if source.name in self.errors:
            raise self.errors[source.name]
        model = FakeModel(self.sizes.get(source.name, source.settings.size_bytes or 10))
        self.models.append(model)
        return model


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made_copy(model: FakeModel, settings: ModelSettings | None = None, name: str = "m") -> Copy:
    """A copy that no cache holds."""
    source = ModelSource(name, "1", "fake", Path(__file__), settings or ModelSettings())
    signature: Any = None
    return Copy(source, model, signature, files=b"", weight=1, on_idle=lambda copy: None)


def rows(count: int) -> dict[str, NDArray[Any]]:
    """Inputs of so many rows."""
    return {"X": np.zeros(count, np.float32)}


def names_of(router: Router) -> Names:
    """The names of an instance without registered models."""
    return Names(router.table, open_registry("memory:", "i"), router.knows)
