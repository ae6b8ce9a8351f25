"""Requests passed through to an external runtime: by which method, for which model, and what follows a failure.

The bytes go as they came; only the model's id is put where the runtime wants it. A runtime that has lost a model, or
was itself lost, is given the model again and the request is sent once more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from mmcore._ext.h2client import ClientCall
from mmcore._ext.passing import Asked, Passed, Passing, Quick, Target, Way, asked_by
from mmcore._ext.pbwire import find_string, replace_string
from mmcore._ext.rates import now_ns
from mmcore.adapters import SERVICE as SPI
from mmcore.adapters import External, ExternalModel, has_forgotten
from mmcore.cache import Copy
from mmcore.errors import InvalidRequest, LoadFailed, MmcoreError, NotFound, RpcError, Status, Unimplemented
from mmcore.routing import Kind, Mesh, Names, Router
from mmcore.routing.forwarding import OTHERS_MAY_ANSWER
from mmcore.routing.hops import arrival_of
from mmcore.routing.mesh import SHARED_FROM
from mmcore.server.calls import Body, Waiting
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.elsewhere import Elsewhere
from mmcore.server.headers import balanced, the_one_asked
from mmcore.tracing import RequestTrace, Tracer
from mmcore.transport import ClientStream, Server, StreamCall
from mmcore.transport.server import UnaryHandler, status_of

log = logging.getLogger(__name__)

V2: Final = "inference.GRPCInferenceService"
_NAME: Final = (1,)
#: Where requests of well-known services name their model. They are unary, which others may be or not.
KNOWN: Final = {
    f"{V2}/ModelInfer": _NAME,
    f"{V2}/ModelMetadata": _NAME,
    f"{V2}/ModelConfig": _NAME,
    "tensorflow.serving.PredictionService/Predict": (1, 1),
    "tensorflow.serving.PredictionService/GetModelMetadata": (1, 1),
    "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions": _NAME,
}
_STREAM_INFER: Final = f"{V2}/ModelStreamInfer"
#: Methods whose requests state a version of the model behind its name.
_VERSIONED: Final = frozenset(f"{V2}/{name}" for name in ("ModelInfer", "ModelMetadata", "ModelConfig"))
#: A request is sent so often at most.
_SENT_AT_MOST: Final = 3
#: A model that is said to be unknown again so soon after it was loaded for that reason is not loaded again for it.
_FORGOTTEN_AGAIN_S: Final = 10.0
_RELOADS_KEPT: Final = 1000


class PassThrough(Passing):
    """Answers requests by passing them to the runtime behind ``external``; ``config`` as for the v2 service.

    Attributes:
        tracer: traces streams, each as one span; None: nobody.
    """

    def __init__(
        self,
        external: External,
        router: Router,
        names: Names,
        waiting: Waiting,
        *,
        config: Callable[[], DataplaneConfig] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self._external = external
        self._router = router
        self._names = names
        self._waiting = waiting
        self._config = config
        self._mesh = mesh
        self._elsewhere = (
            Elsewhere(router, names, waiting, mesh, paths=KNOWN, config=config) if mesh is not None else None
        )
        self.tracer: Tracer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: When models were loaded again because the runtime did not know them.
        self._reloaded: dict[str, float] = {}

    def register(self, server: Server) -> None:
        """Serve the well-known methods, and all others as streams."""
        for method in KNOWN:
            server.add_unary(f"/{method}", self.handler(method))
        server.add_stream(f"/{_STREAM_INFER}", self.stream)
        server.serve_others(self.stream)

    # Unary calls.

    def handler(self, method: str) -> UnaryHandler:
        """What answers a unary method."""
        # By others than V2 this runtime may not be asked, and those of other instances may.
        if self._config is None and (self._mesh is None or method.startswith(V2)):
            shared_from = SHARED_FROM if self._mesh is not None else 0
            return Quick(self, method, Kind.ANY, self._router.lookup, self._find, shared_from)

        def handle(call: Any, body: bytes) -> None:
            began = now_ns()
            try:
                way, kind = self._way_of(method)
            except Unimplemented:
                if self._elsewhere is None:
                    raise
                self._elsewhere.answer(call, body, method)
                return
            self._find(call, body, asked_by(way, body, kind, began))

        return handle

    def _way_of(self, method: str) -> tuple[Way, Kind]:
        """How a method's requests are passed through, and what kind of name is in them."""
        way = self.ways.get(method) or self.describe(method)
        if self._config is None:
            return way, Kind.ANY
        rpc = self._config().of(method)
        if rpc.path:
            way = Way(method, rpc.path, way.injection, way.versioned)
        return way, rpc.kind

    def describe(self, method: str) -> Way:
        """What is known of a method; from the runtime, which may be another one after its return.

        Raises:
            Unimplemented: the runtime is not to be asked by it.
        """
        if method.partition("/")[0] == SPI or not self._external.allows(method):
            raise Unimplemented(f"Method not found or not permitted: {method}")
        extraction = KNOWN.get(method, _NAME if method == _STREAM_INFER else ())
        injection = self._external.injection(method)
        if injection is None and method not in self._external.status.methodInfos:
            injection = extraction or None
        way = self.ways[method] = Way(method, extraction or injection or (), injection, method in _VERSIONED)
        return way

    def target(self, copy: Copy) -> Target:
        """See :func:`target_of`."""
        return target_of(copy)

    def forget_methods(self) -> None:
        """The runtime has come back and may have said something else of its methods."""
        self.ways.clear()

    def _send(self, call: Any, body: bytes, copy: Copy, request: Asked) -> None:
        request.sent += 1
        self.unary(call, body, target_of(copy), request)

    def _find(self, call: Any, body: bytes, request: Asked) -> None:
        """A request that was not sent at once."""
        copy = self._router.lookup(request.name, request.version) if request.name and request.kind is Kind.ANY else None
        if copy is None:
            self._ask(call, body, request)
        elif self._mesh is None or not self._shared(call, body, copy, request):
            self._send(call, body, copy, request)

    def _ask(self, call: Any, body: bytes, request: Asked) -> None:
        """A request whose copy is not here, or that names its model in the metadata."""
        name, kind = request.name, request.kind
        arrival = arrival_of(call) if self._mesh is not None else None
        if arrival is not None and arrival.model:
            name, kind = arrival.model, Kind.MODEL
        elif not name:
            name, kind = the_one_asked(call.metadata)
        try:
            model = self._names.model(name, kind)
        except NotFound:
            pass
        else:
            copy = self._router.lookup_model(model, request.version)
            if copy is not None:
                self._send(call, body, copy, request)
                return
            if self._passed_on(call, body, model, request):
                return
        self._waiting.start(call, self._find_and_send(call, body, name, kind, request), request.way.name)

    def _passed_on(self, call: Any, body: bytes, model: str, request: Asked) -> bool:
        """Whether another instance answers, or has been asked to."""
        if self._mesh is None or self._router.in_folder(model):
            return False

        def here() -> None:
            self._waiting.start(call, self._load_and_send(call, body, model, request), request.way.name)

        return self._mesh.pass_on(call, body, model, here, resolved=model != request.name, path=request.way.path)

    def _shared(self, call: Any, body: bytes, copy: Copy, request: Asked) -> bool:
        """Whether another instance, which has less to do, has been asked to answer."""
        model = copy.name
        if self._mesh is None or copy.in_flight < SHARED_FROM or self._router.in_folder(model):
            return False
        if balanced(call.metadata):
            return False

        def here() -> None:
            self._waiting.start(call, self._load_and_send(call, body, model, request), request.way.name)

        return self._mesh.share(call, body, model, here, resolved=model != request.name, path=request.way.path)

    async def _find_and_send(self, call: Any, body: bytes, name: str, kind: Kind, request: Asked) -> Body | None:
        model = await self._names.find(name, kind)
        if not self._passed_on(call, body, model, request):
            await self._load_and_send(call, body, model, request)
        return None

    async def _load_and_send(self, call: Any, body: bytes, model: str, request: Asked) -> Body | None:
        """The way of a request whose model is to be loaded here, unless the runtime is away and others are there."""
        mesh = None if self._router.in_folder(model) else self._mesh
        path, resolved = request.way.path, model != request.name
        away = None if self._external.up else mesh
        if away is not None and away.answer_elsewhere(call, body, model, path=path, resolved=resolved):
            return None
        try:
            copy = await self._router.load(model, request.version)
        except LoadFailed as failure:
            if mesh is None or not mesh.load_elsewhere(call, body, model, failure, path=path, resolved=resolved):
                raise
            return None
        self._send(call, body, copy, request)
        return None

    # When the runtime does not answer.

    def connect(self, passed: Passed) -> None:
        """Wait for the connection and send the request then; or ask anew, if the runtime is lost."""
        connection = self._external.channel.pick()
        if connection is not None and self._external.up:
            self.session = connection
            passed.send()
            return
        self._start(self._connect(passed), "connect to the runtime")

    async def _connect(self, passed: Passed) -> None:
        try:
            if self._external.up and self._external.channel.pick() is None:
                await self._external.decided()
            if self._external.up:
                await self._external.channel.connect()
                self.session = self._external.channel.pick()
                passed.send()
                return
            error = (Status.UNAVAILABLE, "the runtime is away")
        except RpcError as failure:
            error = (failure.status, failure.details)
        request = passed.again
        if passed.over or request is None or request.sent >= _SENT_AT_MOST:
            self.give_up(passed, *error)
            return
        call, body, model = passed.call, passed.body, passed.target.copy.name
        self._leave(passed)
        self._waiting.start(call, self._once_more(call, body, model, request), request.way.name)

    def _leave(self, passed: Passed) -> None:
        """Take back a request that was not sent, without an answer."""
        passed.cancel()
        passed.send()

    def failed(self, passed: Passed, answer: ClientCall) -> None:
        """The runtime's answer is not OK: have it load the model again, or wait for it, or pass the answer on."""
        request = passed.again
        copy = passed.target.copy
        forgotten = has_forgotten(answer.status, answer.details)
        if request is None or request.sent >= _SENT_AT_MOST or not (answer.lost or answer.refused or forgotten):
            if request is None or not self._asked_another(passed, answer, request):
                passed.refuse(answer)
            return
        if forgotten and not self._may_reload(copy):
            passed.refuse(answer)
            return
        if answer.lost:
            self.session = None
        self._waiting.start(
            passed.call, self._once_more(passed.call, passed.body, copy.name, request), request.way.name
        )

    def _asked_another(self, passed: Passed, answer: ClientCall, request: Asked) -> bool:
        """Whether another copy has been asked, since the runtime here has no room or says that it is not to be had."""
        model = passed.target.copy.name
        if self._mesh is None or answer.status not in OTHERS_MAY_ANSWER or self._router.in_folder(model):
            return False
        path, resolved = request.way.path, model != request.name

        def instead() -> None:
            passed.refuse(answer)

        return self._mesh.ask_another(passed.call, passed.body, model, instead, path=path, resolved=resolved)

    def _may_reload(self, copy: Copy) -> bool:
        """Give up a copy that the runtime does not know; False where that has just been done in vain."""
        if not isinstance(self._model_of(copy), ExternalModel):
            return True  # somebody was faster
        loop = asyncio.get_running_loop()
        last = self._reloaded.get(copy.name)
        if last is not None and loop.time() - last < _FORGOTTEN_AGAIN_S:
            return False
        if len(self._reloaded) >= _RELOADS_KEPT:
            self._reloaded.clear()
        self._reloaded[copy.name] = loop.time()
        log.warning("the runtime does not know model %s any more; loading it again", copy.name)
        self._router.cache.unload(copy)
        return True

    @staticmethod
    def _model_of(copy: Copy) -> object:
        return copy.model if copy.state == "LOADED" else None

    async def _once_more(self, call: Any, body: bytes, model: str, request: Asked) -> Body | None:
        await self._external.decided()
        return await self._load_and_send(call, body, model, request)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Streams.

    async def stream(self, call: StreamCall) -> None:
        """Pass a stream through, message by message, as fast as the slower side takes them.

        Which model it is for is told by its first message or the metadata; where later ones name another model, that
        one is loaded first.

        Raises:
            RpcError: what the runtime ended it with.
            MmcoreError: the method is not allowed, or the model is not to be had.
        """
        method = call.method.removeprefix("/")
        trace = self.tracer.request(method, call.metadata) if self.tracer is not None else None
        if trace is None:
            await self._stream(call, method, None)
            return
        try:
            await self._stream(call, method, trace)
        except asyncio.CancelledError:
            late = call.deadline is not None and time.monotonic() >= call.deadline
            trace.end(Status.DEADLINE_EXCEEDED if late else Status.CANCELLED, "the call was over before its stream")
            raise
        except Exception as error:
            trace.end(*status_of(error))
            raise
        trace.end(Status.OK, "")

    async def _stream(self, call: StreamCall, method: str, trace: RequestTrace | None) -> None:
        try:
            described, kind = self._way_of(method)
        except Unimplemented:
            if self._elsewhere is None:
                raise
            await self._elsewhere.stream(call)
            return
        first: bytes | None = None
        async for message in call:
            first = message
            break
        if first is None:
            raise InvalidRequest("half-closed without a request")
        taken = await self._stream_elsewhere(call, described, kind, first)
        if taken is None:
            return
        leases: dict[str, Copy] = {}
        for sent in range(1, _SENT_AT_MOST + 1):
            try:
                stream, copy = await self._started(call, described, kind, taken, leases, trace)
                if await stream.run():
                    return
            finally:
                for leased in leases.values():
                    leased.release()
                leases.clear()
            failure = stream.out.call
            forgotten = has_forgotten(failure.status, failure.details)
            # One that may have run is not sent again: what the method does is not known.
            again = stream.can_be_repeated and sent < _SENT_AT_MOST and (failure.refused or forgotten)
            if not again or (forgotten and not self._may_reload(copy)):
                call.end_like(stream.out)
                raise RpcError(Status(failure.status), failure.details, failure.trailers)
            await self._external.decided()

    async def _started(
        self,
        call: StreamCall,
        method: Way,
        kind: Kind,
        taken: list[bytes],
        leases: dict[str, Copy],
        trace: RequestTrace | None,
    ) -> tuple[_Stream, Copy]:
        """A stream that is started at the runtime, and the copy that its first message is for."""

        async def prepared(message: bytes) -> bytes:
            return (await self._lease(call, method, kind, message, leases))[1]

        copy, first = await self._lease(call, method, kind, taken[0], leases)
        messages = [first, *[await prepared(message) for message in taken[1:]]]
        await self._external.decided()
        connection = self._external.channel.pick()
        if connection is None:
            await self._external.channel.connect()
            connection = self._external.channel.pick()
        if connection is None:
            raise RpcError(Status.UNAVAILABLE, "the runtime is away")
        try:
            out = call.pass_through(connection, target_of(copy), method.path, _encoded(trace))
        except (ConnectionError, ValueError) as error:
            raise RpcError(Status.UNAVAILABLE, str(error)) from error

        if trace is not None:
            trace.note(model=copy.name, version=copy.version)
        return _Stream(call, out, messages, prepared, trace), copy

    async def _stream_elsewhere(self, call: StreamCall, method: Way, kind: Kind, first: bytes) -> list[bytes] | None:
        """Have another instance answer a stream whose model is there; else the messages that were taken from it."""
        if self._mesh is None:
            return [first]
        name, kind = self._name_in(call, method, kind, first)
        model = await self._names.find(name, kind)
        away = not self._external.up
        if self._router.in_folder(model) or (self._router.lookup_model(model) is not None and not away):
            return [first]
        return await self._mesh.pass_stream_on(call, model, first, away=away)

    @staticmethod
    def _name_in(call: StreamCall, method: Way, kind: Kind, message: bytes) -> tuple[str, Kind]:
        """What a message, or else the metadata, calls the model."""
        name = find_string(message, method.extraction) if method.extraction else ""
        return (name, kind) if name else the_one_asked(call.metadata)

    async def _lease(
        self, call: StreamCall, method: Way, kind: Kind, message: bytes, leases: dict[str, Copy]
    ) -> tuple[Copy, bytes]:
        """The copy that a message is for, with a lease that is kept in ``leases``, and the message for the runtime."""
        if leases and not method.extraction:
            return next(iter(leases.values())), message
        name, kind = self._name_in(call, method, kind, message)
        copy = leases.get(name)
        if copy is None:
            model = await self._names.find(name, kind)
            copy = await self._router.load(model)
            copy.acquire()
            leases[name] = copy
        known_as = target_of(copy).id
        if method.injection is not None and (method.injection != method.extraction or name != known_as):
            message = replace_string(message, method.injection, known_as)
        return copy, message


class _Stream:
    """One stream between its client and the runtime; ``prepare`` makes of a message what the runtime is to get.

    ``first`` are messages that were taken from it, as the runtime is to get them.

    Attributes:
        out: the stream at the runtime.
        can_be_repeated: no others were taken from the client, and nothing was sent to it.
    """

    def __init__(
        self,
        call: StreamCall,
        out: ClientStream,
        first: list[bytes],
        prepare: Callable[[bytes], Awaitable[bytes]],
        trace: RequestTrace | None,
    ) -> None:
        self.out: Final = out
        self.can_be_repeated = True
        self._call = call
        self._first = first
        self._prepare = prepare
        self._trace = trace

    async def run(self) -> bool:
        """Pass messages both ways until the runtime ends the stream; whether its status is OK."""
        call, out = self._call, self.out
        sending = asyncio.get_running_loop().create_task(self._send(), name=f"pass {call.method} through")
        try:
            async for message in out:
                self.can_be_repeated = False
                call.begin_like(out)
                await call.send(message)
            call.end_like(out)
        except RpcError:
            return False
        finally:
            sending.cancel()
            out.cancel()
            await asyncio.wait([sending])
        return True

    async def _send(self) -> None:
        call, out = self._call, self.out
        try:
            for message in self._first:
                await out.send(message)
            async for message in call:
                self.can_be_repeated = False
                await out.send(await self._prepare(message))
            await out.end()
        except (RpcError, MmcoreError) as error:  # what the client sends cannot be taken
            self.can_be_repeated = False
            status, text = status_of(error)
            if self._trace is not None:
                self._trace.end(status, text)
            call.fail(status, text)
            out.cancel()


def target_of(copy: Copy) -> Target:
    """The copy as its runtime knows it."""
    target = copy.prepared
    if target is None:
        model = copy.model
        assert isinstance(model, ExternalModel)
        target = copy.prepared = Target(copy, model.id, model.max_concurrency)
    assert isinstance(target, Target)
    return target


def _encoded(trace: RequestTrace | None) -> list[tuple[bytes, bytes]] | None:
    return [(name.encode(), value.encode()) for name, value in trace.headers()] if trace is not None else None
