"""One runtime's life as it is seen from here: its start, its models, its end and its return.

The cache loads and closes models through it in threads of its own; what is done there waits for the loop, which has the
connections. A runtime that cannot be reached any more has lost its models: they are told of as lost, and the handshake
that follows its return has it forget whatever it may still hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mmcore.adapters.runtime import Runtime, Tls
from mmcore.adapters.server_memory import DISK_FACTOR
from mmcore.config import TransportSettings
from mmcore.errors import InferenceFailed, LoadFailed, RpcError, Status, Unavailable
from mmcore.model import ModelSource, TensorSpec
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.runtimes.interface import Array, OutputTensor
from mmcore.runtimes.size import files_of
from mmcore.transport import Channel
from mmcore.transport.channel import ClientConnection

log = logging.getLogger(__name__)

#: How long a runtime may take to become ready.
READY_WITHIN_S: Final = 180.0
#: One question for its status: it may unload what it has before it answers.
STATUS_S: Final = 30.0
#: Pauses between attempts to reach it, and between questions while it is starting: the first and the longest.
FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 2.0
#: How long a runtime may take for its first word on a connection.
GREETING_S: Final = 2.0
#: How long a load waits for a runtime that is away.
AWAY_S: Final = 60.0
#: A runtime that has requests and says nothing for so long is looked at: whether a new connection hears from it within
#: the other time. No PINGs on the one that is there: servers of gRPC's own libraries end connections for them.
SILENT_S: Final = 10.0
HUNG_S: Final = 20.0
SIZE_S: Final = 30.0
PREDICT_S: Final = 0.5
UNLOAD_S: Final = 30.0
#: Pauses between attempts to unload a model: the first and the longest, each twice the last.
UNLOAD_PAUSE_S: Final = 0.5
UNLOAD_LONGEST_PAUSE_S: Final = 10.0
#: How often what failed to load is unloaded where that is refused: for three minutes.
CLEAN_UP_ATTEMPTS: Final = 20
#: A model's loading may take so long where the runtime does not say.
LOAD_S: Final = 90.0
#: Answers to a load that say that nothing was attempted and no memory used.
_NOTHING_DONE: Final = (Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION)
#: What travels on the connection that requests go by is bounded where it came in.
_SETTINGS: Final = TransportSettings(max_message_bytes=2**31 - 1, max_header_bytes=64 * 2**10, connect_timeout_s=2.0)


class ExternalModel:
    """A model in a runtime, as the cache keeps it. Satisfies :class:`mmcore.runtimes.LoadedModel` but for ``infer``.

    Attributes:
        id: the runtime's name for it.
        max_concurrency: requests that it takes at once; 0: any number.
    """

    platform: str = "external"
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    default_outputs: tuple[str, ...] = ()
    any_input_name: bool = False
    accepts: Mapping[str, tuple[str, ...]] = {}  # never changed

    def __init__(self, external: External, known_as: str, size_bytes: int, max_concurrency: int, life: int) -> None:
        self.id: Final = known_as
        self.size_bytes: int = size_bytes
        self.max_concurrency: Final = max_concurrency
        self.life: Final = life
        self._external = external

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        """Requests for it are passed through as they come and never decoded here."""
        raise InferenceFailed(f"model {self.id!r} is asked by its runtime's own protocol")

    def close(self) -> None:
        """Unload it, in a thread; returns when the runtime has confirmed that, or has lost it anyway."""
        self._external.unload(self)


class External:
    """The models of one runtime.

    ``load_timeout_s``, ``loads_at_once`` and ``model_concurrency`` (0: any number) count before what it says itself.

    Attributes:
        runtime: what loads and unloads them.
        channel: the connection that requests go by.
        up: whether the runtime is ready.
        status: what it said of itself.
        on_up, on_down: called when it has become ready again, and when it is lost with all its models.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        tls: Tls | None = None,
        load_timeout_s: float | None = None,
        loads_at_once: int | None = None,
        model_concurrency: int | None = None,
        ready_within_s: float = READY_WITHIN_S,
        away_s: float = AWAY_S,
        silent_s: float = SILENT_S,
        hung_s: float = HUNG_S,
    ) -> None:
        self.runtime: Final = runtime
        self.channel: Final = Channel(runtime.address, settings=_SETTINGS, ssl=tls)
        self._tls = tls
        self.up = False
        self.status = pb.RuntimeStatusResponse()
        self.on_up: Callable[[], object] = lambda: None
        self.on_down: Callable[[], object] = lambda: None
        self._load_timeout_s = load_timeout_s
        self._loads_at_once = loads_at_once
        self._model_concurrency = model_concurrency
        self._ready_within_s = ready_within_s
        self._away_s = away_s
        self._silent_s = silent_s
        self._hung_s = hung_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._following: list[asyncio.Task[None]] = []
        #: Counts the runtime's lives; models of an earlier one are gone.
        self._life = 0
        self._changed = asyncio.Event()
        #: Ids that are taken; the future of one that is being unloaded.
        self._ids: dict[str, asyncio.Future[None] | None] = {}
        #: Loads that the runtime is at.
        self._loading: set[asyncio.Task[ExternalModel]] = set()
        #: Unloads of what failed to load, where the runtime has refused that once.
        self._cleaning: set[asyncio.Task[bool]] = set()
        #: Whether it has been said that sizes are not told beforehand.
        self._predicts = True
        self._closing = False

    # Life.

    async def start(self) -> None:
        """Wait until the runtime is ready, and follow it from then on.

        Raises:
            Unavailable: it cannot be reached in time, or says that it is failing.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.runtime.prepare)
        except OSError as error:
            raise Unavailable(f"the runtime at {self.runtime.address} lacks what it starts with: {error}") from error
        try:
            async with asyncio.timeout(self._ready_within_s):
                await self._connected()
                await self._handshake(starting=True)
        except TimeoutError:
            raise Unavailable(
                f"the runtime at {self.runtime.address} was not ready within {self._ready_within_s:g} s"
            ) from None
        self._following = [
            self._loop.create_task(self._follow(), name="follow the runtime"),
            self._loop.create_task(self._watch(), name="watch the runtime"),
        ]

    def give_up_loads(self) -> None:
        """This instance is about to end: take no new loads, and have the runtime let go of what it is at."""
        self._closing = True
        self._changed.set()
        for load in self._loading:
            load.cancel()

    async def close(self) -> None:
        """Let go of the runtime."""
        self.give_up_loads()
        ending = [*self._following, *self._cleaning]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        await self.channel.close()
        await self.runtime.close()

    async def decided(self) -> None:
        """Wait until it is known whether the runtime can be reached, after a connection was lost."""
        while self.up and self.channel.pick() is None and not self._closing:
            await self._next_change()

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()

    async def _connected(self) -> ClientConnection:
        """A connection on which the runtime has said something; tried for as long as it takes."""
        pause_s = FIRST_PAUSE_S
        while True:
            with contextlib.suppress(RpcError):
                return await self.channel.greeted(GREETING_S)
            if self.up:
                self._down()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _handshake(self, *, starting: bool = False) -> None:
        """Ask the runtime until it says that it is ready and empty."""
        pause_s = FIRST_PAUSE_S
        said = ""
        while True:
            try:
                status = await self.runtime.status(STATUS_S)
            except RpcError as error:
                now = f"{error.details} ({error.status.name})"
            else:
                if status.status == pb.RuntimeStatusResponse.READY:
                    break
                if status.status == pb.RuntimeStatusResponse.FAILING and starting:
                    raise Unavailable(f"the runtime at {self.runtime.address} says that it is failing")
                now = pb.RuntimeStatusResponse.Status.Name(status.status)
            if now != said:
                said = now
                log.info("the runtime at %s is not ready: %s", self.runtime.address, said)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.status = status
        self._predicts = True
        self._ids.clear()
        self.up = True
        log.info(
            "the runtime at %s is ready: version %r, capacity %d bytes, %d loads at once",
            self.runtime.address, status.runtimeVersion, status.capacityInBytes, self.loads_at_once,
        )  # fmt: skip
        self._tell()

    async def _follow(self) -> None:
        while True:
            connection = await self._connected()
            self._tell()
            if not self.up:
                await self._handshake()
                self.on_up()
            await asyncio.shield(connection.lost)

    async def _watch(self) -> None:
        """Find out a runtime that hangs: it takes requests and not even a new connection hears from it."""
        loop = asyncio.get_running_loop()
        watched: ClientConnection | None = None
        heard, since = 0, loop.time()
        while True:
            await asyncio.sleep(self._silent_s / 4)
            connection = self.channel.pick()
            silent = connection is watched and connection is not None and connection.bytes_received == heard
            if connection is None or not silent or not connection.open_streams:
                watched, heard, since = connection, connection.bytes_received if connection else 0, loop.time()
            elif loop.time() - since >= self._silent_s:
                if await self._hangs() and not connection.lost.done():
                    log.warning("the runtime at %s hangs", self.runtime.address)
                    connection.abort()
                since = loop.time()

    async def _hangs(self) -> bool:
        probe = Channel(self.runtime.address, settings=_SETTINGS, ssl=self._tls)
        try:
            await probe.greeted(self._hung_s)
        except RpcError:
            return True
        finally:
            await probe.close()
        return False

    def _down(self) -> None:
        self.up = False
        self._life += 1
        log.warning("the runtime at %s is gone, and its models with it", self.runtime.address)
        self._tell()
        self.on_down()

    # What the runtime has said.

    @property
    def loads_at_once(self) -> int:
        """How many models it may load at once."""
        return max(1, min(self._loads_at_once or self.status.maxLoadingConcurrency, 64))

    @property
    def load_s(self) -> float:
        """How long a load may take."""
        if self._load_timeout_s is not None:
            return self._load_timeout_s
        return max(self.status.modelLoadingTimeoutMs, 100) / 1000 if self.status.modelLoadingTimeoutMs else LOAD_S

    def injection(self, method: str) -> tuple[int, ...] | None:
        """The fields that lead to where the model's id is to be in a method's requests; None: nowhere is said."""
        info = self.status.methodInfos.get(method)
        return tuple(info.idInjectionPath) or None if info is not None else None

    def allows(self, method: str) -> bool:
        """Whether requests may be passed to a method, ``package.Service/Method``."""
        infos = self.status.methodInfos
        return not infos or method in infos or self.status.allowAnyMethod

    # Loading and unloading, in the cache's threads.

    def load(self, source: ModelSource) -> ExternalModel:
        """Load a model.

        Raises:
            LoadFailed: the runtime would not, or took too long; the text has its words.
            Unavailable: it is away.
        """
        key = _key_of(source)

        async def load() -> ExternalModel:
            task = asyncio.get_running_loop().create_task(self._load(source, key), name=f"load {source.name}")
            self._loading.add(task)
            try:
                return await task
            except asyncio.CancelledError:
                raise Unavailable("this instance is shutting down") from None
            finally:
                self._loading.discard(task)

        model: ExternalModel = self._wait(load())
        return model

    def unload(self, model: ExternalModel) -> None:
        """Unload a model; returns when it takes no space any more."""
        # An instance that has ended has nothing to wait for.
        with contextlib.suppress(RuntimeError):
            self._wait(self._unload(model.id, model.life))

    def predict(self, source: ModelSource) -> int | None:
        """What a model will take by what the runtime says, in bytes; None where it says nothing."""
        request = pb.PredictModelSizeRequest()
        self._describe(request, source, source.name, _key_of(source))
        if self._predicts:
            try:
                return self._wait(self.runtime.predict_size(request, PREDICT_S)) or None
            except RpcError as error:
                # Said once, that holds until the runtime is another one.
                self._predicts = error.status is not Status.UNIMPLEMENTED
        return self.status.defaultModelSizeInBytes or None

    def _wait(self, work: Any) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _load(self, source: ModelSource, key: dict[str, Any]) -> ExternalModel:
        try:
            async with asyncio.timeout(self._away_s):
                while not self.up:
                    if self._closing:
                        raise Unavailable("this instance is shutting down")
                    await self._next_change()
        except TimeoutError:
            raise Unavailable(f"the runtime at {self.runtime.address} is away") from None
        life = self._life
        known_as = await self._take_id(source)
        request = pb.LoadModelRequest()
        self._describe(request, source, known_as, key)
        try:
            response = await self._ask_to_load(request)
        except RpcError as error:
            if error.status not in _NOTHING_DONE:
                await self._clean_up(known_as, life)
            elif life == self._life:
                del self._ids[known_as]
            if life != self._life or error.status is Status.UNAVAILABLE:
                raise Unavailable(f"the runtime went away while it loaded: {error.details}") from None
            raise LoadFailed(_failure(error, self.load_s)) from None
        except BaseException:
            await self._clean_up(known_as, life)
            raise
        size = response.sizeInBytes or await self._size_of(known_as, key)
        limit = self._model_concurrency
        if limit is None:
            limit = max(1, response.maxConcurrency) if self.status.limitModelConcurrency else 0
        return ExternalModel(self, known_as, size, limit, life)

    async def _ask_to_load(self, request: pb.LoadModelRequest) -> pb.LoadModelResponse:
        try:
            return await self.runtime.load(request, self.load_s)
        except RpcError as error:
            if error.status is not Status.ALREADY_EXISTS:
                raise
        # Left from before, of files that may have been others.
        await self.runtime.unload(request.modelId, UNLOAD_S)
        return await self.runtime.load(request, self.load_s)

    async def _take_id(self, source: ModelSource) -> str:
        """The model's name, or another one while that is taken by a copy that serves until this one does."""
        for known_as in (source.name, *(f"{source.name}--{source.version}-{number}" for number in range(1, 1000))):
            leaving = self._ids.get(known_as)
            if leaving is not None:
                await asyncio.wait([leaving], timeout=UNLOAD_S)
            if known_as not in self._ids:
                self._ids[known_as] = None
                return known_as
        raise LoadFailed(f"model '{source.name}' is loaded too often")

    def _describe(self, request: Any, source: ModelSource, known_as: str, key: dict[str, Any]) -> None:
        request.modelId = known_as
        request.modelType = source.info.type if source.info is not None else source.format
        request.modelPath = str(source.path)
        request.modelKey = json.dumps(key)

    async def _size_of(self, known_as: str, key: dict[str, Any]) -> int:
        with contextlib.suppress(RpcError):
            size = await self.runtime.size(known_as, SIZE_S)
            if size:
                return size
        return max(int(key["disk_size_bytes"] * DISK_FACTOR), self.status.defaultModelSizeInBytes)

    def given_up(self, model: ExternalModel) -> None:
        """A model is about to be unloaded: a load of the same name waits for that, instead of taking another id."""
        assert self._loop is not None
        if model.life == self._life and self._ids.get(model.id, self) is None:
            self._ids[model.id] = self._loop.create_future()

    async def _clean_up(self, known_as: str, life: int) -> None:
        """Have the runtime unload what it may have loaded of a model that failed.

        One that refuses is asked some times more, which nobody waits for: the model may never have been there.
        """
        if await self._unload(known_as, life, attempts=1) or self._closing or life != self._life:
            return
        assert self._loop is not None
        self._ids[known_as] = None
        unload = self._unload(known_as, life, attempts=CLEAN_UP_ATTEMPTS)
        task = self._loop.create_task(unload, name=f"unload {known_as}, which failed to load")
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _unload(self, known_as: str, life: int, attempts: int = 0) -> bool:
        """Unload until the runtime confirms it, or so many times; whether it is there no more.

        Nothing is to be done where the runtime has been lost since.
        """
        if life != self._life or known_as not in self._ids:
            return True
        assert self._loop is not None
        left = self._ids[known_as] = self._ids[known_as] or self._loop.create_future()
        pause_s = UNLOAD_PAUSE_S
        try:
            while life == self._life:
                try:
                    await self.runtime.unload(known_as, UNLOAD_S)
                    return True
                except RpcError as error:
                    log.warning("model %s was not unloaded: %s (%s)", known_as, error.details, error.status.name)
                attempts -= 1
                if attempts == 0 or self._closing:
                    return False
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, UNLOAD_LONGEST_PAUSE_S)
            return True
        finally:
            left.set_result(None)
            if self._ids.get(known_as) is left:
                del self._ids[known_as]


def _key_of(source: ModelSource) -> dict[str, Any]:
    """The key that a runtime is given: of files that are here, without the way they came. Blocking."""
    key: dict[str, Any] = {}
    if source.info is not None and source.info.key:
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(source.info.key)
            key = read if isinstance(read, dict) else {}
    for gone in ("storage_key", "storage_params", "bucket", "schema_path"):
        key.pop(gone, None)
    if source.format:
        key.setdefault("model_type", {"name": source.format})
    if source.schema is not None:
        key["schema_path"] = str(source.schema)
    key["disk_size_bytes"] = sum(file.stat().st_size for file in files_of(source.path))
    return key


def _failure(error: RpcError, load_s: float) -> str:
    if error.status is Status.DEADLINE_EXCEEDED:
        return f"the runtime did not load it within {load_s:g} s"
    return f"the runtime says {error.status.name}: {error.details}"
