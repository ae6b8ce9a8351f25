"""Models that end the instances which load them: after two the next is not asked at once, whoever would ask it.

An instance that ends cannot say why. Who had asked it to load a model, for a request or ahead, and lost the connection
before the answer writes that into the model's record, where all others see it; and where the record says that the model
was being loaded by an instance that is gone, that counts as well. One instance may be lost for any reason; where two
were, the model is loaded nowhere for a minute, then by one, and for twice as long after each further one that ends.

Where an instance was loading many models, as when a machine has just begun to take over what another one had, most of
them have not ended it: such a loss counts half.

A request that only hits a copy counts where it was the only one which its sender had at that instance, and the instance
has ended indeed, for those of all other models are cut off too. What a client has asked an instance for itself is seen
by nobody else, so a model whose requests, not its load, end an instance may end more than two: a worker process of its
own (``isolation``) contains that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Final

from mmcore.cache import CopyState
from mmcore.errors import LoadFailed, MmcoreError
from mmcore.log import event
from mmcore.registry import LossRecord, ModelRecord, Registry
from mmcore.routing.loads_at import LoadsAt

log = logging.getLogger(__name__)

#: So many instances lost keep a model from being loaded.
LOST: Final = 2
#: For so long, which doubles with each further one; and at most for so long.
PAUSE_MS: Final = 60_000
LONGEST_PAUSE_MS: Final = 10 * 60_000
#: An instance that was loading more than so many was most likely lost for another reason.
FEW_LOADS: Final = 8
#: What was longer ago does not count, and of a request what was so long ago. Clocks may differ by nearly as much: a
#: pause begins when one hears of a loss.
KEPT_MS: Final = 3_600_000
REQUEST_KEPT_MS: Final = 10 * 60_000
#: So many are kept in a record: more change nothing.
MOST: Final = 8
#: How long after its connection was lost an instance is looked for that may have ended by a request.
GONE_AFTER_S: Final = 0.3

_LOADING: Final = f'"{CopyState.LOADING}"'.encode()


class Barred(LoadFailed):
    """The model is loaded nowhere for a while, as it ended instances that did."""


class Losses:
    """Notes the losses that this instance has seen, and tells which models are not to be loaded.

    ``is_lost`` tells whether an instance has ended, or cannot be reached, though it was not about to leave.

    Attributes:
        loads: how many models each instance is loading.
    """

    def __init__(self, registry: Registry, is_lost: Callable[[str], bool], clock_ms: Callable[[], int]) -> None:
        self._registry = registry
        self._is_lost = is_lost
        self._clock_ms = clock_ms
        self.loads: Final = LoadsAt(registry)
        #: Those seen here, by model: they hold also before, or without, the registry. And the models that each instance
        #: was loading at this one's request when it was lost, of which not all records tell yet.
        self._seen: dict[str, dict[str, LossRecord]] = {}
        self._lost_with: dict[str, set[str]] = {}
        #: When this instance heard of each loss first, by model and instance: clocks differ.
        self._heard_ms: dict[str, dict[str, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        registry.models.listen(self._model_changed)

    def barred(self, model: str, record: ModelRecord) -> str | None:
        """Why a model is not to be loaded now; None where it may be."""
        if not (record.losses or record.copies or model in self._seen):
            return None
        now_ms = self._clock_ms()
        told = {**self.loading_at(record, self._is_lost), **record.losses, **self._seen_of(model)}
        losses = {instance: loss for instance, loss in told.items() if _counts(loss, now_ms)}
        if not losses:
            return None
        known = self._heard_ms.get(model, {})
        heard_ms = {instance: known.get(instance, now_ms) for instance in losses}
        self._heard_ms[model] = heard_ms
        weight = sum(1.0 if loss.loads <= FEW_LOADS else 0.5 for loss in losses.values())
        if weight < LOST:
            return None
        last = max(heard_ms, key=lambda instance: heard_ms[instance])
        pause_ms = min(PAUSE_MS << (int(weight) - LOST), LONGEST_PAUSE_MS)
        left_ms = min(pause_ms, heard_ms[last] + pause_ms - now_ms)
        if left_ms <= 0:
            return None
        what = "loaded the model" if all(loss.loads for loss in losses.values()) else "loaded the model or answered it"
        return (
            f"{len(losses)} instances ended while they {what}, the last one {last}; "
            f"it is not loaded again for {left_ms / 1000:.0f} s"
        )

    def loading_at(self, record: ModelRecord, gone: Callable[[str], bool]) -> dict[str, LossRecord]:
        """The loss of each instance that is gone and loaded a model by the model's record."""
        return {
            instance: LossRecord(at_ms=copy.since_ms, loads=max(1, self.loads.count(instance)))
            for instance, copy in record.copies.items()
            if copy.state != CopyState.LOADED and gone(instance)
        }

    def note(self, model: str, instance: str) -> None:
        """An instance was lost while it loaded a model at this one's request; not one that was about to leave."""
        if self._is_leaving(instance) or instance in self._seen.get(model, {}):
            return
        self._lost_with.setdefault(instance, set()).add(model)
        self._saw(model, instance, LossRecord(at_ms=self._clock_ms(), loads=1), "loaded")

    def note_request(self, model: str, instance: str) -> None:
        """An instance was lost while it answered a request for a model, the only one that it was sent from here."""
        if not self._is_leaving(instance) and instance not in self._seen.get(model, {}):
            self._start(self._note_if_gone(model, instance), f"note what {model} may have done")

    async def _note_if_gone(self, model: str, instance: str) -> None:
        """Where only its connection was lost, the instance can be reached again by now."""
        await asyncio.sleep(GONE_AFTER_S)
        if self._is_lost(instance) and instance not in self._seen.get(model, {}):
            self._saw(model, instance, LossRecord(at_ms=self._clock_ms()), "answered for")

    def _is_leaving(self, instance: str) -> bool:
        known = self._registry.instances.get(instance)
        return known is not None and known.draining

    def _saw(self, model: str, instance: str, loss: LossRecord, doing: str) -> None:
        self._seen.setdefault(model, {})[instance] = loss
        log.warning(
            "instance %s ended while it %s model %s", instance, doing, model,
            extra=event("lost_loading" if loss.loads else "lost_answering", instance=instance, model=model),
        )  # fmt: skip
        self._start(self._write(model), f"note a loss by {model}")

    def _seen_of(self, model: str) -> dict[str, LossRecord]:
        """The losses seen here, with the loads that are known of by now."""
        return {
            instance: replace(loss, loads=max(len(self._lost_with[instance]), self.loads.count(instance)))
            if loss.loads
            else loss
            for instance, loss in self._seen.get(model, {}).items()
        }

    def _start(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Write nothing any more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _write(self, model: str) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            losses = {**record.losses, **self._seen_of(model)}
            latest = sorted(losses, key=lambda instance: losses[instance].at_ms)[-MOST:]
            return replace(record, losses={instance: losses[instance] for instance in latest})

        try:
            await self._registry.models.update(model, change)
        except MmcoreError as error:
            log.warning("the other instances are not told of what model %s did: %s", model, error)

    def _model_changed(self, model: str) -> None:
        """Hear of what others load and have seen lost; one that is registered anew may be another model."""
        models = self._registry.models
        if model not in models:
            self.loads.changed(model, None)
            for instance in self._seen.pop(model, {}):
                self._lost_with.get(instance, set()).discard(model)
            self._heard_ms.pop(model, None)
        elif (models.mentions(model, _LOADING) or models.mentions(model, b'"losses"') or self.loads.knows(model)) and (
            record := models.get(model)
        ) is not None:
            self.loads.changed(model, record)
            self.barred(model, record)


def _counts(loss: LossRecord, now_ms: int) -> bool:
    """Whether it is not too long ago."""
    return abs(now_ms - loss.at_ms) < (KEPT_MS if loss.loads else REQUEST_KEPT_MS)
