"""The one object that services ask for models: by name to the copy here, with loads, unloads and the index.

The hot path is :attr:`Router.lookup` and :attr:`Router.infer`, which are the table's and the execution's own methods.
A request for a model that is not loaded goes through :meth:`Router.load`, which waits for the load that all its like
share. Everything is called on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

from mmcore._ext.router import Registration
from mmcore._ext.v2codec import Signature
from mmcore.batching import Execution
from mmcore.cache import Cache, Copy, CopyState, Priority
from mmcore.cache.cache import LOADER_THREADS, bind_signature
from mmcore.errors import LoadFailed, MmcoreError, NotFound, Overloaded
from mmcore.model import ModelSource
from mmcore.routing.folder_models import FolderModels
from mmcore.routing.known import WHOLE, no_versions, problem_of
from mmcore.routing.overrides import override_origin
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import FileOrigin, ModelFolder

log = logging.getLogger(__name__)


class Router(FolderModels):
    """Models by name.

    Attributes:
        lookup: ``(name, version="") -> Copy | None``, the copy that is loaded here; counts as its use. None both for a
            model that is not loaded and for one that is not known. It may be run in the same turn of the loop; to keep
            it longer take a lease (``Copy.acquire``, ``Copy.release``). An alias of a model goes before the model of
            that name; everything else here takes names of models.
        lookup_model: the same without aliases.
        table: the routing table, for those who keep its aliases.
        catalog: the models that are in no folder.
        infer: :meth:`mmcore.batching.Execution.run`.
        cache, execution: what it is built on.

    ``capacity_bytes`` is what loaded models may take together. ``folder`` is watched from :meth:`start` to
    :meth:`close`. ``load`` and ``bind`` make the model and the signature of a source.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        folder: ModelFolder | None = None,
        load: Callable[[ModelSource], LoadedModel] = load_model,
        bind: Callable[[LoadedModel], Signature] = bind_signature,
        loader_threads: int = LOADER_THREADS,
        execution: Execution | None = None,
        cache: Cache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            cache
            or Cache(capacity_bytes=capacity_bytes, load=load, bind=bind, loader_threads=loader_threads, clock=clock),
            folder,
        )
        self.cache.on_loaded = self._loaded
        self.cache.on_gone = self._gone
        self.cache.on_state = self._changed_state
        self.execution = execution or Execution()
        self.lookup: Callable[..., Copy | None] = self._table.lookup
        self.lookup_model: Callable[..., Copy | None] = self._table.lookup_model
        self.infer = self.execution.run
        #: One explicit load or unload of a model at a time.
        self._explicit: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # Life.

    async def close(self) -> None:
        """Stop following the folder, finish what runs, and unload every copy."""
        await self._stop_watching()
        await self.execution.stop()
        await self.cache.close()
        await self._end_replacing()

    async def source(self, name: str, version: str = "") -> ModelSource:
        """Files and settings of a version, loaded or not; the errors are those of :meth:`load`."""
        registration = self._known(name, version)
        copy = registration.copy(version) if version else registration.here
        if copy is not None:
            source: ModelSource = copy.source
            return source
        return await asyncio.to_thread(registration.origin.source, name, self._version(registration, version))

    # Loading.

    def load(
        self, name: str, version: str = "", *, priority: Priority = Priority.REQUEST, idle_s: float | None = None
    ) -> asyncio.Future[Copy]:
        """The copy for a name and version, loaded if it is not: one load for all who ask meanwhile.

        Loads of a more urgent ``priority`` go first, and make one that they join as urgent. With ``idle_s`` it is
        loaded into free room alone, see :meth:`mmcore.cache.Cache.load`.
        The future is the caller's own, to be cancelled when its caller leaves or its deadline passes. It ends with
        LoadFailed (remembered for a while), NotFound (the version is gone), Overloaded (no room) or Unavailable (files
        being changed, or the instance stops). The copy can be run in the turn of the loop that the future wakes, and
        for some 50 ms after; to keep it longer take a lease.

        Raises:
            NotFound: at once, when the model or version is not known or has been unloaded on demand.
        """
        registration = self._known(name, version)
        waiter: asyncio.Future[Copy] = asyncio.get_running_loop().create_future()
        copy = registration.copy(version) if version else registration.here
        if copy is not None:
            waiter.set_result(copy)
        elif not version and not registration.versions:
            waiter.set_exception(LoadFailed(problem_of(registration)))
        else:
            self._hold(registration)
            return self.cache.load(
                name, self._version(registration, version), registration.origin, priority=priority, idle_s=idle_s
            )
        return waiter

    def unload_copies(self, name: str) -> None:
        """Give up the copies of a model; the next request loads it again."""
        for copy in self.copies(name):
            self.cache.unload(copy)

    def touch(self, name: str) -> None:
        """Count the copy that answers for a model, if it is here, as used now."""
        self._table.lookup_model(name)

    async def preload(self, names: Sequence[str]) -> dict[str, MmcoreError]:
        """Load these models and those whose settings say so, or every one for ``("all",)``.

        Returns the errors of those that would not, by name.
        """
        wanted = self.names() if tuple(names) == ("all",) else list(dict.fromkeys((*names, *self._to_preload)))
        self._to_preload.clear()
        errors: dict[str, MmcoreError] = {}
        waiting: dict[str, asyncio.Future[Copy]] = {}
        for name in wanted:
            try:
                waiting[name] = self.load(name, priority=Priority.PRELOAD)
            except MmcoreError as error:
                errors[name] = error
        # All at once: one that fails behind others would be told of by the loop where this ends before.
        for name, loaded in zip(waiting, await asyncio.gather(*waiting.values(), return_exceptions=True), strict=True):
            if isinstance(loaded, MmcoreError):
                errors[name] = loaded
            elif isinstance(loaded, BaseException):
                raise loaded
        return errors

    async def load_explicit(self, name: str) -> Copy:
        """Take the files as they are now and load the default version; ends an override and an explicit unload.

        The copy that serves goes on until the new one is ready, and stays when that fails.

        Raises:
            NotFound: there is no such model.
            LoadFailed, Overloaded, Unavailable: as for :meth:`load`.
        """
        async with self._lock(name):
            if self._folder is not None:
                self.apply(await self._folder.scan_now())
            registration = self._registration(name)
            if registration is None:
                raise NotFound(f"failed to load '{name}', failed to poll from model repository")
            self._hold(registration)
            if name in self._own_origins and self._folder is not None and self._folder.has(name):
                self.apply(self._folder.look_again(name))
            registration.withdrawn = False
            self.cache.failures.clear(name)
            if WHOLE in (registration.problems or {}):
                raise LoadFailed(f"failed to load '{name}', {problem_of(registration)}")
            version = registration.versions[-1]
            replacing = self._replacing.get((name, version))
            if replacing is not None:
                await asyncio.wait([replacing])
                if registration.problems and version in registration.problems:
                    raise LoadFailed(f"failed to load '{name}', {registration.problems[version]}")
            return await self.cache.load(name, version, registration.origin)

    async def load_override(self, name: str, config_json: str | None, files: Mapping[str, bytes] | None = None) -> Copy:
        """Load a model with a configuration (Triton's ModelConfig as JSON) over its own, or with files of its own.

        The model's folder is used where no files come. What served before goes on until the new copy is ready, and
        stays when that fails. The override ends with an explicit load or unload, or when the folder changes.

        Raises:
            InvalidRequest: the files or their names are not acceptable.
            LoadFailed, Overloaded, Unavailable: as for :meth:`load`.
        """
        async with self._lock(name):
            folder = self._folder.path(name) if self._folder is not None and self._folder.has(name) else None
            origin = await asyncio.to_thread(override_origin, name, folder, config_json, files or {})
            try:
                layout = await asyncio.to_thread(origin.layout)
                if not layout.sources:
                    raise LoadFailed("; ".join(layout.problems.values()))
                versions = tuple(layout.sources)
                # Loaded under its new origin before anything of the old one is given up.
                copy = await self._replace_or_register(name, versions, origin)
            except BaseException as error:
                await asyncio.shield(asyncio.to_thread(origin.close))
                if isinstance(error, LoadFailed):
                    raise type(error)(f"failed to load '{name}', {error}") from error
                raise
            return copy

    async def unload(self, name: str) -> None:
        """Take a model out of service until it is loaded explicitly or its folder changes.

        Requests being answered finish; memory is free some time after this returns.

        Raises:
            NotFound: there is no such model.
        """
        async with self._lock(name):
            registration = self._registration(name)
            if registration is None:
                raise NotFound(f"Request for unknown model: '{name}' is not found")
            self._hold(registration)
            registration.withdrawn = True
            self.cache.drop_loads(name, no_versions(name))
            for copy in registration.loaded().values():
                self.cache.unload(copy)

    async def _replace_or_register(self, name: str, versions: tuple[str, ...], origin: FileOrigin) -> Copy:
        before = self._table.get(name)
        registration = before
        if registration is None:
            registration = Registration(name, versions, origin)
            self._table.add(registration)
        try:
            copy = await self.cache.replace(name, versions[-1], origin)
        except BaseException:
            if before is None:
                self._table.discard(name)
            raise
        self._adopt(registration, versions, origin, None)
        self._own_origins[name] = origin
        for version, other in registration.loaded().items():
            if other is not copy:
                registration.displace(version, other)
                self.cache.unload(other)
        registration.prefer(copy.version)
        return copy

    # What the cache says.

    def _loaded(self, copy: Copy) -> None:
        registration = self._registration(copy.name)
        if registration is None:
            self.cache.unload(copy)
            return
        registration.place(copy.version, copy)
        if self._is_catalogs(registration):
            self._hold(registration)
            self.catalog.changed_state(copy.name, CopyState.LOADED, None)
        if registration.problems is not None:
            registration.problems.pop(copy.version, None)
        if registration.versions and copy.version == registration.versions[-1]:
            self._prefer(registration, copy)

    def _gone(self, copy: Copy) -> None:
        if copy.prepared is not None:
            copy.prepared.close()
        registration = self._table.get(copy.name)
        if registration is None:
            return
        registration.displace(copy.version, copy)
        if self._is_catalogs(registration):
            self.catalog.gone(copy)
            self._let_go(registration)

    def _changed_state(self, name: str, state: CopyState | None, error: MmcoreError | None) -> None:
        """A load has begun, or has ended without a copy."""
        registration = self._table.get(name)
        if registration is None or not self._is_catalogs(registration):
            return
        if registration.here is not None:
            # It goes on serving whatever becomes of its successor.
            return
        if state is not None:
            self.catalog.changed_state(name, CopyState.LOADING, None)
            return
        if isinstance(error, LoadFailed | Overloaded):
            self.catalog.changed_state(name, None, error)
        self._let_go(registration)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._explicit.setdefault(name, asyncio.Lock())
