"""The models of the folder, kept in step with their files; what serves goes on until its successor is ready."""

from __future__ import annotations

import asyncio
import functools
import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from mmcore._ext.router import Registration
from mmcore.cache import Cache, Copy, Priority
from mmcore.errors import MmcoreError, NotFound
from mmcore.routing.known import WHOLE, Known
from mmcore.storage import Change, FileOrigin, ModelFolder, Origin

log = logging.getLogger(__name__)


class FolderModels(Known):
    """What is known, with what the folder says; ``folder`` is followed from the start to the end."""

    def __init__(self, cache: Cache, folder: ModelFolder | None) -> None:
        super().__init__(cache)
        self._folder = folder
        self._watching: asyncio.Task[None] | None = None
        #: Loads behind a copy that serves, the latest one of each version.
        self._replacing: dict[tuple[str, str], asyncio.Task[None]] = {}
        #: Models of the folder whose settings ask for it.
        self._to_preload: set[str] = set()
        #: Origins of overrides, to be closed when they are replaced.
        self._own_origins: dict[str, FileOrigin] = {}

    @abstractmethod
    def load(
        self, name: str, version: str = "", *, priority: Priority = Priority.REQUEST, idle_s: float | None = None
    ) -> asyncio.Future[Copy]:
        """See :meth:`mmcore.routing.router.Router.load`."""

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

    async def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._folder is not None:
            self._folder.close()

    async def _end_replacing(self) -> None:
        """When the cache has been closed: wait for what it has refused, and let go of overrides."""
        if self._replacing:
            await asyncio.wait(list(self._replacing.values()))
        for origin in self._own_origins.values():
            await asyncio.to_thread(origin.close)
        self._own_origins.clear()

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
            self._adopt(registration, tuple(loaded), origin, {WHOLE: change.problem or ""})
            log.warning("model %s: its files were not taken: %s", change.name, change.problem)
            return
        versions = _shared(tuple(change.layout.sources))
        problems: dict[str, str] | None = dict(change.layout.problems) or None
        if not versions and problems:
            problems[WHOLE] = "; ".join(change.layout.problems.values())
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


@functools.lru_cache(1024)
def _shared(versions: tuple[str, ...]) -> tuple[str, ...]:
    """The same tuple for equal versions, of which a million models have a handful."""
    return versions
