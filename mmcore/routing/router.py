"""The one object that services ask for models: by name to the copy here, with loads, unloads and the index.

The hot path is :attr:`Router.lookup` and :attr:`Router.infer`, which are the table's and the execution's own methods.
A request for a model that is not loaded goes through :meth:`Router.load`, which waits for the load that all its like
share. Everything is called on the event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from mmcore._ext.router import Registration, Table
from mmcore._ext.v2codec import Signature
from mmcore.batching import Execution
from mmcore.cache import Cache, Copy, CopyState, Priority
from mmcore.cache.cache import LOADER_THREADS, bind_signature
from mmcore.errors import LoadFailed, MmcoreError, NotFound, Overloaded
from mmcore.model import ModelSource
from mmcore.routing.overrides import override_origin
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import Change, FileOrigin, ModelFolder, Origin

log = logging.getLogger(__name__)

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"
LOADING: Final = "LOADING"
UNLOADING: Final = "UNLOADING"

_NOT_LOADED: Final = "not loaded; the first request loads it"
_WITHDRAWN: Final = "unloaded"
#: The key of ``Registration.problems`` for what concerns all versions.
_WHOLE: Final = ""


class IndexRow(NamedTuple):
    """One version in the repository index; the version is empty where none could be found.

    ``state`` is READY, UNAVAILABLE, LOADING or UNLOADING. ``reason`` says why it is not ready, or of a ready one why
    newer files were not taken.
    """

    name: str
    version: str
    state: str
    reason: str


class Catalog:
    """Models that are known without a folder; here there are none (see :class:`mmcore.routing.registered.Registered`).

    The router holds a registration of one only while it is being loaded, loaded, or unloaded on demand.

    Attributes:
        origin: that of all their registrations, and of no others.
    """

    origin: Any = object()

    def __contains__(self, name: object) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def registration(self, name: str) -> Registration | None:
        """A new registration of a model, None where there is none of that name."""
        return None

    def held(self, name: str) -> None:
        """The router holds a registration of that model from now on."""

    def let_go(self, name: str) -> None:
        """The router holds it no longer."""

    def changed_state(self, name: str, state: CopyState | None, error: MmcoreError | None) -> None:
        """The copy here is LOADING, LOADED or, with None, not there, because of ``error`` if there is one."""

    def gone(self, copy: Copy) -> None:
        """A copy takes no more requests."""


class Router:
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
        self.cache = cache or Cache(
            capacity_bytes=capacity_bytes, load=load, bind=bind, loader_threads=loader_threads, clock=clock
        )
        self.cache.on_loaded = self._loaded
        self.cache.on_gone = self._gone
        self.cache.on_state = self._changed_state
        self.execution = execution or Execution()
        self.catalog = Catalog()
        self.table = self._table = Table(self.cache.lru)
        self.lookup: Callable[..., Copy | None] = self._table.lookup
        self.lookup_model: Callable[..., Copy | None] = self._table.lookup_model
        self.infer = self.execution.run
        self._folder = folder
        self._watching: asyncio.Task[None] | None = None
        #: Loads behind a copy that serves, the latest one of each version.
        self._replacing: dict[tuple[str, str], asyncio.Task[None]] = {}
        #: One explicit load or unload of a model at a time.
        self._explicit: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        #: Models of the folder whose settings ask for it.
        self._to_preload: set[str] = set()
        #: Origins of overrides, to be closed when they are replaced.
        self._own_origins: dict[str, FileOrigin] = {}

    # Life.

    async def start(self) -> None:
        """Register the models of the folder and follow it from now on.

        Raises:
            NotFound: the folder does not exist.
        """
        if self._folder is not None:
            self.apply(await self._folder.start())
            self._watching = asyncio.get_running_loop().create_task(
                self._folder.watch(self.apply), name="watch the folder of models"
            )

    async def close(self) -> None:
        """Stop following the folder, finish what runs, and unload every copy."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._folder is not None:
            self._folder.close()
        await self.execution.stop()
        await self.cache.close()
        if self._replacing:
            await asyncio.wait(list(self._replacing.values()))
        for origin in self._own_origins.values():
            await asyncio.to_thread(origin.close)
        self._own_origins.clear()

    # What is known.

    def names(self) -> list[str]:
        """The names of all models, of the folder and of the catalog."""
        held = [registration.name for registration in self._table]
        return held + [name for name in self.catalog if name not in self._table]

    def knows(self, name: str) -> bool:
        """Whether there is a model of that name."""
        return name in self._table or name in self.catalog

    def in_folder(self, name: str) -> bool:
        """Whether there is one that is not the catalog's."""
        registration = self._table.get(name)
        return registration is not None and not self._is_catalogs(registration)

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions that can be asked for, ascending, the last being the default; empty for an unknown model.

        They are numbers, but for a model whose settings give it one version of another name.
        """
        registration = self._registration(name)
        return registration.versions if registration is not None else ()

    def copies(self, name: str | None = None) -> list[Copy]:
        """The loaded copies: of one model in the order of its versions, or of all, the least recently used first."""
        if name is None:
            return [copy for copy in self.cache.lru if isinstance(copy, Copy)]
        registration = self._table.get(name)
        if registration is None:
            return []
        loaded = registration.loaded()
        # One that stands in for a version that is gone comes first.
        order = {version: place for place, version in enumerate(registration.versions)}
        return [loaded[version] for version in sorted(loaded, key=lambda version: order.get(version, -1))]

    def check(self, name: str, version: str = "") -> None:
        """Raise NotFound, with Triton's text, for a model or version that is not known or has been unloaded."""
        self._known(name, version)

    async def source(self, name: str, version: str = "") -> ModelSource:
        """Files and settings of a version, loaded or not; the errors are those of :meth:`load`."""
        registration = self._known(name, version)
        copy = registration.copy(version) if version else registration.here
        if copy is not None:
            source: ModelSource = copy.source
            return source
        return await asyncio.to_thread(registration.origin.source, name, self._version(registration, version))

    def index(self) -> list[IndexRow]:
        """Every version of every model and its state."""
        return [row for name in self.names() for row in self.rows(name)]

    def rows(self, name: str) -> list[IndexRow]:
        """The versions of one model and their states; none of an unknown one."""
        registration = self._registration(name)
        return list(self._rows(registration)) if registration is not None else []

    def _rows(self, registration: Registration) -> Iterable[IndexRow]:
        problems = registration.problems or {}
        versions = dict.fromkeys(registration.versions)
        versions |= dict.fromkeys(registration.loaded())
        versions |= dict.fromkeys(copy.version for copy in self.cache.unloading(registration.name))
        versions |= dict.fromkeys(version for version in problems if version != _WHOLE)
        if not versions:
            yield IndexRow(registration.name, "", UNAVAILABLE, problems.get(_WHOLE, _WITHDRAWN))
        for version in versions:
            yield self._row(registration, version, problems.get(version) or problems.get(_WHOLE, ""))

    def _row(self, registration: Registration, version: str, problem: str) -> IndexRow:
        name = registration.name
        match self.cache.state(name, version):
            case CopyState.LOADED:
                return IndexRow(name, version, READY, problem)
            case CopyState.QUEUED | CopyState.PULLING | CopyState.LOADING:
                return IndexRow(name, version, LOADING, problem)
            case CopyState.UNLOADING:
                return IndexRow(name, version, UNLOADING, problem)
        failure = self.cache.failures.last(name, version)
        reason = _WITHDRAWN if registration.withdrawn else problem or failure or _NOT_LOADED
        return IndexRow(name, version, UNAVAILABLE, reason)

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
            waiter.set_exception(LoadFailed(_problem(registration)))
        else:
            self._hold(registration)
            return self.cache.load(
                name, self._version(registration, version), registration.origin, priority=priority, idle_s=idle_s
            )
        return waiter

    def loading(self, name: str) -> bool:
        """Whether a version of the model is on its way."""
        return any(row.state == LOADING for row in self.rows(name)) if name in self._table else False

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
        for name, waiter in waiting.items():
            try:
                await waiter
            except MmcoreError as error:
                errors[name] = error
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
            if _WHOLE in (registration.problems or {}):
                raise LoadFailed(f"failed to load '{name}', {_problem(registration)}")
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
            self.cache.drop_loads(name, _no_versions(name))
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

    # What the folder says.

    def apply(self, changes: Iterable[Change]) -> None:
        """Register, refresh and remove models as their files are now."""
        for change in changes:
            if change.layout is None and change.problem is None:
                self.remove(change.name)
            else:
                assert self._folder is not None
                self._refresh(change, self._folder)

    def register(self, name: str, versions: Sequence[str], origin: Origin) -> None:
        """Register a model that is not in the folder; ``versions`` ascending. Replaces one of the same name."""
        self.remove(name)
        self._table.add(Registration(name, tuple(versions), origin))

    def remove(self, name: str) -> None:
        """Forget a model: its loads are given up and its copies unloaded. An unknown one is no error."""
        registration = self._table.get(name)
        if registration is None:
            return
        self._adopt(registration, (), registration.origin, None)
        self._discard(registration)
        self.cache.drop_loads(name, NotFound(f"Request for unknown model: '{name}' is not found"))
        for copy in registration.loaded().values():
            self.cache.unload(copy)

    def _refresh(self, change: Change, origin: Origin) -> None:
        registration = self._table.get(change.name)
        if registration is not None and self._is_catalogs(registration):
            # The folder's model goes before it.
            self.remove(change.name)
            registration = None
        if registration is None:
            registration = Registration(change.name, (), origin)
            self._table.add(registration)
        loaded = registration.loaded()
        if change.layout is None:
            # What serves goes on; the reason is in the index.
            self._adopt(registration, tuple(loaded), origin, {_WHOLE: change.problem or ""})
            log.warning("model %s: its files were not taken: %s", change.name, change.problem)
            return
        versions = _shared(tuple(change.layout.sources))
        problems: dict[str, str] | None = dict(change.layout.problems) or None
        if not versions and problems:
            problems[_WHOLE] = "; ".join(change.layout.problems.values())
            versions = tuple(loaded)
        serving = registration.here
        self._adopt(registration, versions, origin, problems)
        if change.layout.sources and list(change.layout.sources.values())[-1].settings.preload and serving is None:
            self._load_ahead(change.name)
        for version, copy in loaded.items():
            if version in versions:
                self._reload(registration, version)
            elif copy is not serving:
                self.cache.unload(copy)
        if serving is not None and versions and serving.version != versions[-1]:
            default = registration.copy(versions[-1])
            if default is not None:
                self._prefer(registration, default)
            else:
                self._reload(registration, versions[-1])

    def _load_ahead(self, name: str) -> None:
        """Load a model whose settings ask for that: with the others before the instance is ready, or at once."""
        if self._watching is None:
            self._to_preload.add(name)
            return
        # Its failure is remembered and in the index.
        self.load(name, priority=Priority.PRELOAD).add_done_callback(lambda load: load.cancelled() or load.exception())

    def _adopt(
        self, registration: Registration, versions: tuple[str, ...], origin: Origin, problems: dict[str, str] | None
    ) -> None:
        registration.versions = versions
        registration.problems = problems
        registration.withdrawn = False
        registration.origin = origin
        self.cache.failures.clear(registration.name)
        replaced = self._own_origins.get(registration.name)
        if replaced is not None and replaced is not origin:
            del self._own_origins[registration.name]
            asyncio.get_running_loop().run_in_executor(None, replaced.close)

    def _reload(self, registration: Registration, version: str) -> None:
        """Load a version's new files behind the copy that serves."""
        key = (registration.name, version)
        replacing = self._replace(registration, version, self._replacing.get(key))
        task = asyncio.get_running_loop().create_task(replacing, name=f"replace {registration.name}/{version}")
        self._replacing[key] = task

        def ended(task: asyncio.Task[None]) -> None:
            if self._replacing.get(key) is task:
                del self._replacing[key]

        task.add_done_callback(ended)

    async def _replace(self, registration: Registration, version: str, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        known = self._table.get(registration.name) is registration and not registration.withdrawn
        if not known or version not in registration.versions:
            return
        try:
            await self.cache.replace(registration.name, version, registration.origin)
        except MmcoreError as error:
            registration.problems = {**(registration.problems or {}), version: f"new files were not taken: {error}"}

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

    def _prefer(self, registration: Registration, copy: Copy) -> None:
        """Answer with ``copy`` where no version is named; a copy whose version is gone has served long enough."""
        before = registration.here
        registration.prefer(copy.version)
        if before is not None and before is not copy and before.version not in registration.versions:
            self.cache.unload(before)

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

    # What the router holds of the catalog.

    def _registration(self, name: str) -> Registration | None:
        """The model's registration: the one that is held, or one made of what the catalog knows."""
        return self._table.get(name) or self.catalog.registration(name)

    def _is_catalogs(self, registration: Registration) -> bool:
        return registration.origin is self.catalog.origin

    def _hold(self, registration: Registration) -> None:
        if registration.name not in self._table:
            self._table.add(registration)
            self.catalog.held(registration.name)

    def _let_go(self, registration: Registration) -> None:
        """Forget a registration of the catalog's that has nothing to tell any more."""
        if registration.loaded():
            return
        self.catalog.changed_state(registration.name, None, None)
        if not registration.withdrawn:
            self._discard(registration)

    def _discard(self, registration: Registration) -> None:
        self._table.discard(registration.name)
        if self._is_catalogs(registration):
            self.catalog.let_go(registration.name)

    # Names.

    def _known(self, name: str, version: str) -> Registration:
        registration = self._registration(name)
        if registration is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if registration.withdrawn:
            raise _no_versions(name)
        if version and version not in registration.versions and version not in (registration.problems or {}):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return registration

    def _version(self, registration: Registration, version: str) -> str:
        return version or registration.versions[-1]

    def _lock(self, name: str) -> asyncio.Lock:
        return self._explicit.setdefault(name, asyncio.Lock())


@functools.lru_cache(1024)
def _shared(versions: tuple[str, ...]) -> tuple[str, ...]:
    """The same tuple for equal versions, of which a million models have a handful."""
    return versions


def _problem(registration: Registration) -> str:
    problems: dict[str, Any] = registration.problems or {}
    return problems.get(_WHOLE) or f"'{registration.name}' has no available versions"


def _no_versions(name: str) -> NotFound:
    return NotFound(f"Request for unknown model: '{name}' has no available versions")
