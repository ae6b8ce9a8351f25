"""One request for several models, which ModelMesh's clients make by repeating the id header.

Each model is asked with the same message, a few at a time, and their answers are concatenated in the order of the
headers: of protobuf messages that makes one message, with the repeated fields of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from mmcore.errors import NotFound, RpcError, Status
from mmcore.routing import Names
from mmcore.server.calls import Answer, Body
from mmcore.server.headers import Asked

#: Models of one request that are asked at once.
AT_ONCE: Final = 4


class Part:
    """The answer of one of the models."""

    def __init__(self, call: Answer) -> None:
        self.on_cancel: Callable[[], object] | None = None
        self._call = call
        self._answer: asyncio.Future[Body] = asyncio.get_running_loop().create_future()

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata."""
        return self._call.metadata

    @property
    def deadline(self) -> float | None:
        """The request's deadline."""
        return self._call.deadline

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this part any more."""
        return self._call.cancelled or self._answer.cancelled()

    def reply(self, message: Body) -> None:
        """Take the model's answer."""
        if not self._answer.done():
            self._answer.set_result(message)

    def fail(self, status: int, details: str) -> None:
        """Take its error."""
        if not self._answer.done():
            self._answer.set_exception(RpcError(Status(status), details))

    async def wait(self) -> Body:
        """The answer when it is there; RpcError for an error. Cancelled, it tells whoever works on it."""
        try:
            return await self._answer
        except asyncio.CancelledError:
            if self.on_cancel is not None:
                self.on_cancel()
            raise


async def ask_several(call: Answer, models: Asked, names: Names, ask: Callable[[Answer, str], Body | None]) -> Body:
    """The answers of all models that are there, concatenated. ``ask`` starts with one and answers now or later.

    Raises:
        NotFound: none of them is there, or one is not and all are required.
        MmcoreError, RpcError: a model's error; the others are given up.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> Body | None:
        async with free:
            try:
                await names.find(name, models.kind)
            except NotFound:
                if models.all_required:
                    raise
                return None
            part = Part(call)
            message = ask(part, name)
            return message if message is not None else await part.wait()

    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(name), name=f"ask {name}") for name in models.ids]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    answers = [message for task in asked if (message := task.result()) is not None]
    if not answers:
        raise NotFound("none of the requested models were found")
    parts: list[bytes | memoryview] = []
    for message in answers:
        parts.extend(message if isinstance(message, list) else [memoryview(message)])
    return parts
