"""How many models each instance is loading, by the models' records, and was loading when it left."""

from __future__ import annotations

from typing import Final

from mmcore.cache import CopyState
from mmcore.registry import ModelRecord, Registry

#: Instances that have left are remembered, the latest ones.
MOST_LEFT: Final = 1000


class LoadsAt:
    """Counts the loads that records tell of; those which changed before this instance has joined are not known."""

    def __init__(self, registry: Registry) -> None:
        self._instances = registry.instances
        self._models: dict[str, set[str]] = {}
        self._instances_of: dict[str, frozenset[str]] = {}
        #: A record tells of a load for long after its instance has left, but not all do for equally long.
        self._left: dict[str, int] = {}
        registry.instances.listen(self._instance_changed)

    def count(self, instance: str) -> int:
        """The models that an instance is loading, or was when it left."""
        left = self._left.get(instance)
        return left if left is not None else len(self._models.get(instance, ()))

    def knows(self, model: str) -> bool:
        """Whether a model is being loaded somewhere."""
        return model in self._instances_of

    def changed(self, model: str, record: ModelRecord | None) -> None:
        """A model's record is this from now on; None: it has none any more."""
        copies = record.copies.items() if record is not None else ()
        now = frozenset(instance for instance, copy in copies if copy.state != CopyState.LOADED)
        before = self._instances_of.get(model, frozenset())
        if now == before:
            return
        for instance in before - now:
            models = self._models[instance]
            models.discard(model)
            if not models:
                del self._models[instance]
        for instance in now - before:
            self._models.setdefault(instance, set()).add(model)
        if now:
            self._instances_of[model] = now
        else:
            del self._instances_of[model]

    def _instance_changed(self, name: str) -> None:
        if name in self._instances:
            self._left.pop(name, None)
        elif name in self._models:
            self._left[name] = len(self._models[name])
            if len(self._left) > MOST_LEFT:
                del self._left[next(iter(self._left))]
