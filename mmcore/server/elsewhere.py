"""Requests by methods that this instance's models are not asked by, and another instance's may be.

Clients call any instance of a mesh, whatever runtime it has: TensorFlow Serving's Predict for a model of OpenVINO Model
Server comes to an instance beside Triton, or to one of the built-in formats, as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmcore._ext.pbwire import find_string
from mmcore.errors import NotFound, Unimplemented
from mmcore.routing import Kind, Mesh, Names, Router
from mmcore.routing.hops import arrival_of
from mmcore.server.calls import Body, Waiting
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.headers import names_models, the_one_asked
from mmcore.transport import Server, StreamCall
from mmcore.transport.server import UnaryHandler


class Elsewhere:
    """Has such requests answered where their models are."""

    def __init__(
        self,
        router: Router,
        names: Names,
        waiting: Waiting,
        mesh: Mesh,
        *,
        paths: dict[str, tuple[int, ...]],
        config: Callable[[], DataplaneConfig] | None = None,
    ) -> None:
        """``paths`` are the well-known methods, and where their requests name the model; ``config`` goes before."""
        self._router = router
        self._names = names
        self._waiting = waiting
        self._mesh = mesh
        self._paths = paths
        self._config = config or DataplaneConfig

    def register(self, server: Server, methods: list[str]) -> None:
        """Serve well-known methods, and all that nobody has described; this instance answers none of them itself."""
        for method in methods:
            server.add_unary(f"/{method}", self._handler(method))
        server.serve_others(self.stream)

    def _handler(self, method: str) -> UnaryHandler:
        return lambda call, body: self.answer(call, body, method)

    def answer(self, call: Any, body: bytes, method: str) -> None:
        """Have another instance answer.

        Raises:
            Unimplemented: none is asked by this method for the model.
            InvalidRequest: the request names no model.
        """
        rpc = self._config().of(method)
        path = rpc.path or self._paths.get(method, ())
        stated = find_string(body, path) if path else ""
        name, kind = stated, rpc.kind if rpc.path else Kind.ANY
        arrival = arrival_of(call)
        if arrival is not None and arrival.model:
            name, kind = arrival.model, Kind.MODEL
        elif not name:
            name, kind = the_one_asked(call.metadata)
        try:
            model = self._names.model(name, kind)
        except NotFound:
            self._waiting.start(call, self._find(call, body, name, kind, method, stated), method)
        else:
            self._pass_on(call, body, model, method, stated)

    async def stream(self, call: StreamCall) -> None:
        """Have another instance answer by a method that nobody has described, for the model that the metadata name.

        Raises:
            Unimplemented: none is asked by this method for the model.
        """
        if arrival_of(call) is None and names_models(call.metadata):
            name, kind = the_one_asked(call.metadata)
            model = await self._names.find(name, kind)
            if self._router.lookup_model(model, "") is None and not self._router.in_folder(model):
                async for message in call:
                    if await self._mesh.pass_stream_on(call, model, message, away=True) is None:
                        return
                    break
        raise Unimplemented(f"Method not found or not permitted: {call.method.removeprefix('/')}")

    async def _find(self, call: Any, body: bytes, name: str, kind: Kind, method: str, stated: str) -> Body | None:
        self._pass_on(call, body, await self._names.find(name, kind), method, stated)
        return None

    def _pass_on(self, call: Any, body: bytes, model: str, method: str, stated: str) -> None:
        def here() -> None:
            self._waiting.start(call, _refuse(method), method)

        if (
            self._router.lookup_model(model, "") is not None
            or self._router.in_folder(model)
            or not self._mesh.pass_on(call, body, model, here, resolved=model != stated, path=f"/{method}")
        ):
            raise Unimplemented(f"Method not found or not permitted: {method}")


async def _refuse(method: str) -> Body | None:
    raise Unimplemented(f"Method not found or not permitted: {method}")
