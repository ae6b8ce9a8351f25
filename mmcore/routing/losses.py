"""Models that end the instances which load them: after two the next is not asked at once, whoever would ask it.

An instance that ends cannot say why. Who had asked it to load a model, for a request or ahead, and lost the connection
before the answer writes that into the model's record, where all others see it; and where the record says that the model
was being loaded by an instance that is gone, that counts as well. One instance may be lost for any reason; where two
were, the model is loaded nowhere for a minute, then by one, and for twice as long after each further one that ends.

Requests that only hit a copy do not count: those of all models are cut off when an instance is lost. So a model whose
requests, not its load, end an instance may end one more before that, whose loss does not tell of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmcore.cache import CopyState
from mmcore.errors import LoadFailed, MmcoreError
from mmcore.log import event
from mmcore.registry import FailureRecord, ModelRecord, Registry

log = logging.getLogger(__name__)

#: So many instances lost keep a model from being loaded.
LOST: Final = 2
#: For so long, which doubles with each further one; and at most for so long.
PAUSE_MS: Final = 60_000
LONGEST_PAUSE_MS: Final = 10 * 60_000
#: What was longer ago does not count. Clocks may differ by nearly as much: a pause begins when one hears of a loss.
KEPT_MS: Final = 3_600_000
#: So many are kept in a record: more change nothing.
MOST: Final = 8

_MESSAGE: Final = "it ended while it loaded the model"


def loading_at(record: ModelRecord, gone: Callable[[str], bool]) -> dict[str, FailureRecord]:
    """The loss of each instance that is gone and loaded a model by the model's record."""
    return {
        instance: FailureRecord(at_ms=copy.since_ms, message=_MESSAGE)
        for instance, copy in record.copies.items()
        if copy.state != CopyState.LOADED and gone(instance)
    }


class Barred(LoadFailed):
    """The model is loaded nowhere for a while, as it ended instances that did."""


class Losses:
    """Notes the losses that this instance has seen, and tells which models are not to be loaded.

    ``is_lost`` tells whether an instance has ended, or cannot be reached, though it was not about to leave.
    """

    def __init__(self, registry: Registry, is_lost: Callable[[str], bool], clock_ms: Callable[[], int]) -> None:
        self._registry = registry
        self._is_lost = is_lost
        self._clock_ms = clock_ms
        #: Those seen here, by model: they hold also before, or without, the registry.
        self._seen: dict[str, dict[str, FailureRecord]] = {}
        #: When this instance heard of each loss first, by model and instance: clocks differ.
        self._heard_ms: dict[str, dict[str, int]] = {}
        self._writing: set[asyncio.Task[None]] = set()
        registry.models.listen(self._model_changed)

    def barred(self, model: str, record: ModelRecord) -> str | None:
        """Why a model is not to be loaded now; None where it may be."""
        if not (record.losses or record.copies or model in self._seen):
            return None
        now_ms = self._clock_ms()
        told = {**loading_at(record, self._is_lost), **record.losses, **self._seen.get(model, {})}
        losses = {instance: loss for instance, loss in told.items() if abs(now_ms - loss.at_ms) < KEPT_MS}
        if not losses:
            return None
        known = self._heard_ms.get(model, {})
        heard_ms = {instance: known.get(instance, now_ms) for instance in losses}
        self._heard_ms[model] = heard_ms
        if len(losses) < LOST:
            return None
        last = max(heard_ms, key=lambda instance: heard_ms[instance])
        pause_ms = min(PAUSE_MS << (len(losses) - LOST), LONGEST_PAUSE_MS)
        left_ms = min(pause_ms, heard_ms[last] + pause_ms - now_ms)
        if left_ms <= 0:
            return None
        return (
            f"{len(losses)} instances ended while they loaded the model, the last one {last}; "
            f"it is not loaded again for {left_ms / 1000:.0f} s"
        )

    def note(self, model: str, instance: str) -> None:
        """An instance was lost while it loaded a model at this one's request; not one that was about to leave."""
        known = self._registry.instances.get(instance)
        seen = self._seen.setdefault(model, {})
        if instance in seen or (known is not None and known.draining):
            return
        seen[instance] = FailureRecord(at_ms=self._clock_ms(), message=_MESSAGE)
        log.warning(
            "instance %s ended while it loaded model %s", instance, model,
            extra=event("lost_loading", instance=instance, model=model),
        )  # fmt: skip
        task = asyncio.get_running_loop().create_task(self._write(model), name=f"note a loss by {model}")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def close(self) -> None:
        """Write nothing any more."""
        for task in self._writing:
            task.cancel()
        if self._writing:
            await asyncio.wait(self._writing)

    async def _write(self, model: str) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            losses = {**record.losses, **self._seen.get(model, {})}
            latest = sorted(losses, key=lambda instance: losses[instance].at_ms)[-MOST:]
            return replace(record, losses={instance: losses[instance] for instance in latest})

        try:
            await self._registry.models.update(model, change)
        except MmcoreError as error:
            log.warning("the other instances are not told of what model %s did: %s", model, error)

    def _model_changed(self, model: str) -> None:
        """Hear of the losses that others have seen; one that is registered anew may be another model."""
        models = self._registry.models
        if model not in models:
            self._seen.pop(model, None)
            self._heard_ms.pop(model, None)
        elif models.mentions(model, b'"losses"') and (record := models.get(model)) is not None:
            self.barred(model, record)
