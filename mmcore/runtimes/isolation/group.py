"""A model in several worker processes, each of which answers one inference at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from mmcore.errors import LoadFailed
from mmcore.model import ModelSource
from mmcore.runtimes.interface import Array, OutputTensor
from mmcore.runtimes.isolation.model import Caller, Callers, IsolatedModel


class IsolatedGroup:
    """So many copies of one model, each in a worker process of its own. Satisfies ``LoadedModel``.

    An inference goes to the one with the least to do, and rather to one that is there than to one that is being
    restarted. The group is given up with the first of them that is.

    Attributes:
        members: the copies.

    Raises:
        LoadFailed: one of the workers could not load it, or crashed meanwhile.
    """

    def __init__(self, source: ModelSource, instances: int, *, network: bool = False) -> None:
        with ThreadPoolExecutor(instances, "mmcore-load") as threads:
            starting = [threads.submit(IsolatedModel, source, network=network) for _ in range(instances)]
        self.members = [one.result() for one in starting if one.exception() is None]
        failure = next((error for one in starting if (error := one.exception()) is not None), None)
        if failure is not None:
            self.close()
            raise failure
        first = self.members[0]
        self.platform = first.platform
        self.inputs = first.inputs
        self.outputs = first.outputs
        self.default_outputs = first.default_outputs
        self.any_input_name = first.any_input_name
        self.accepts = first.accepts
        stated = source.settings.size_bytes
        self.size_bytes: int = stated if stated is not None else sum(one.size_bytes for one in self.members)
        self._lock = threading.Lock()
        self._at_work = [0] * instances

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], caller: Caller | None = None
    ) -> list[OutputTensor]:
        """See :meth:`IsolatedModel.infer`."""
        with self._least_busy() as member:
            return member.infer(inputs, outputs, caller)

    def infer_for(
        self, callers: Sequence[Caller | None]
    ) -> Callable[[Mapping[str, Array], Sequence[str]], list[OutputTensor]]:
        """:meth:`infer` as it is for requests of these callers."""
        return partial(self.infer, caller=callers[0] if len(callers) == 1 else Callers(callers))

    def watch_broken(self, on_broken: Callable[[LoadFailed], object]) -> None:
        """Call ``on_broken`` with the reason when one of them is given up; from any thread."""
        for member in self.members:
            member.watch_broken(on_broken)

    def close(self) -> None:
        """End all workers, at the same time."""
        if self.members:
            with ThreadPoolExecutor(len(self.members), "mmcore-unload") as threads:
                list(threads.map(IsolatedModel.close, self.members))

    @contextmanager
    def _least_busy(self) -> Iterator[IsolatedModel]:
        with self._lock:
            place = min(range(len(self.members)), key=lambda one: self._at_work[one] + (self.members[one].pid is None))
            self._at_work[place] += 1
        try:
            yield self.members[place]
        finally:
            with self._lock:
                self._at_work[place] -= 1


#: A model that answers from worker processes.
Isolated: TypeAlias = IsolatedModel | IsolatedGroup
