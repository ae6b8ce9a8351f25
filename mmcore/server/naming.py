"""Which model is asked about: the one that the message names, a vmodel's, or that of the metadata."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from mmcore._ext.pbwire import find_string
from mmcore.errors import InvalidRequest, NotFound
from mmcore.routing import Names
from mmcore.routing.hops import arrival_of
from mmcore.server.calls import Answer, Body, Waiting, parse
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.headers import asked, names_models


class Named(Protocol):
    """A message with a model's name."""

    name: str


RequestT = TypeVar("RequestT", bound=Named)
#: Given call, message, model, method and what answers here after all: whether another instance answers.
PassedOn = Callable[[Answer, bytes, str, str, Callable[[], object]], bool]


class Naming:
    """Puts the model's own name into requests of the v2 protocol, wherever they name it, but for inferences."""

    def __init__(self, names: Names, waiting: Waiting, config: Callable[[], DataplaneConfig]) -> None:
        self._names = names
        self._waiting = waiting
        self._config = config

    def handler(
        self,
        method: str,
        request_type: type[Any],
        answer: Callable[[RequestT], Awaitable[Any]],
        *,
        absent: Any = None,
        passed_on: PassedOn | None = None,
    ) -> Callable[[Answer, bytes], None]:
        """A unary handler that calls ``answer`` with the request, its ``name`` being that of a model, or empty.

        ``absent`` is answered where there is no such model; with None that is an error. ``passed_on`` may have another
        instance answer.
        """
        what = method.rpartition("/")[2]

        async def respond(call: Answer, body: bytes) -> Body | None:
            request: RequestT = parse(request_type, body)
            try:
                request.name = await self._name(method, call, body, request.name)
            except NotFound:
                if absent is None:
                    raise
                encoded: bytes = absent.SerializeToString()
                return encoded

            async def here() -> Body:
                encoded: bytes = (await answer(request)).SerializeToString()
                return encoded

            if passed_on is not None and passed_on(
                call, body, request.name, f"/{method}", lambda: self._waiting.start(call, here(), what)
            ):
                return None
            return await here()

        def handle(call: Answer, body: bytes) -> None:
            self._waiting.start(call, respond(call, body), what)

        return handle

    async def _name(self, method: str, call: Answer, body: bytes, stated: str) -> str:
        arrival = arrival_of(call)
        if arrival is not None and arrival.model:
            return arrival.model
        rpc = self._config().of(method)
        name = find_string(body, rpc.path) if rpc.path else stated
        kind = rpc.kind
        if not name:
            if not names_models(call.metadata):
                return ""
            models = asked(call.metadata)
            if len(models.ids) > 1:
                raise InvalidRequest("only an inference can be for several models")
            (name,), kind = models.ids, models.kind
        return await self._names.find(name, kind)
