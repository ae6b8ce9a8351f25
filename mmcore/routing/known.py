"""What models there are, of the folder and of the catalog: their registrations, versions, states and copies here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from mmcore._ext.router import Registration, Table
from mmcore.cache import Cache, Copy, CopyState
from mmcore.errors import NotFound
from mmcore.routing.catalog import Catalog

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"
LOADING: Final = "LOADING"
UNLOADING: Final = "UNLOADING"

_NOT_LOADED: Final = "not loaded; the first request loads it"
_WITHDRAWN: Final = "unloaded"
#: The key of ``Registration.problems`` for what concerns all versions.
WHOLE: Final = ""


class IndexRow(NamedTuple):
    """One version in the repository index; the version is empty where none could be found.

    ``state`` is READY, UNAVAILABLE, LOADING or UNLOADING. ``reason`` says why it is not ready, or of a ready one why
    newer files were not taken.
    """

    name: str
    version: str
    state: str
    reason: str


class Known:
    """Models by name. The catalog's are registered in the table only while something is held of them."""

    def __init__(self, cache: Cache) -> None:
        self.cache: Final = cache
        self.catalog = Catalog()
        self.table = self._table = Table(cache.lru)

    def names(self) -> list[str]:
        """The names of all models, of the folder and of the catalog."""
        held = [registration.name for registration in self._table]
        return held + [name for name in self.catalog if name not in self._table]

    def count(self) -> int:
        """How many there are, without a list of their names, which of a million takes a hundred megabytes."""
        both = sum(registration.name in self.catalog for registration in self._table)
        return len(self._table) + len(self.catalog) - both

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
        versions |= dict.fromkeys(version for version in problems if version != WHOLE)
        if not versions:
            yield IndexRow(registration.name, "", UNAVAILABLE, problems.get(WHOLE, _WITHDRAWN))
        for version in versions:
            yield self._row(registration, version, problems.get(version) or problems.get(WHOLE, ""))

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

    def loading(self, name: str) -> bool:
        """Whether a version of the model is on its way."""
        return any(row.state == LOADING for row in self.rows(name)) if name in self._table else False

    # Registrations.

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

    def _known(self, name: str, version: str) -> Registration:
        registration = self._registration(name)
        if registration is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if registration.withdrawn:
            raise no_versions(name)
        if version and version not in registration.versions and version not in (registration.problems or {}):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return registration

    def _version(self, registration: Registration, version: str) -> str:
        return version or registration.versions[-1]

    def _prefer(self, registration: Registration, copy: Copy) -> None:
        """Answer with ``copy`` where no version is named; a copy whose version is gone has served long enough."""
        before = registration.here
        registration.prefer(copy.version)
        if before is not None and before is not copy and before.version not in registration.versions:
            self.cache.unload(before)


def problem_of(registration: Registration) -> str:
    """Why a model has no version to load."""
    problems: dict[str, Any] = registration.problems or {}
    return problems.get(WHOLE) or f"'{registration.name}' has no available versions"


def no_versions(name: str) -> NotFound:
    """The error for a model that has been unloaded on demand."""
    return NotFound(f"Request for unknown model: '{name}' has no available versions")
