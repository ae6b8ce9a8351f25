"""Brings the files of registered models to this machine: one listing, then the disk cache or a download.

Calls block and are made in loader threads. What comes is checked against the listing and appears in the cache whole or
not at all; content that is there already is not asked for again, whichever model of the same store it was pulled for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from mmcore.config import StorageSettings
from mmcore.errors import Cancelled, LoadFailed, Unavailable
from mmcore.model import ModelInfo
from mmcore.storage.archives import is_archive, unpack
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.disk_cache import DiskCache, Lease, Room
from mmcore.storage.mounts import mounted
from mmcore.storage.places import Place, StorageConfig
from mmcore.storage.progress import LogProgress
from mmcore.storage.remote import Blob, Changed, Refused, Remote
from mmcore.storage.settings import SCHEMA
from mmcore.storage.signature import signature
from mmcore.storage.transfer import Left, Progress, PullLimits, Transfer, Watch

log = logging.getLogger(__name__)

_DEFAULTS: Final = StorageSettings()
#: Stores that connections and credentials are kept for.
_KEPT_REMOTES: Final = 64
#: Listings of a model whose objects change while they are pulled.
_LISTINGS: Final = 3
#: In an entry: the model's folder, and the schema that its key names.
_MODEL: Final = "model"
_SCHEMA: Final = "schema.json"
#: Hex digits of the digest that names an entry.
_DIGEST: Final = 40
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class _Provider:
    module: str
    remote: str
    #: The extra of this package that installs what it needs.
    extra: str


_PROVIDERS: Final = {
    "s3": _Provider("mmcore.storage.s3", "S3Remote", "s3"),
    "gcs": _Provider("mmcore.storage.gcs", "GcsRemote", "gcs"),
    "azure": _Provider("mmcore.storage.azure", "AzureRemote", "azure"),
    "http": _Provider("mmcore.storage.web", "WebRemote", "http"),
}
_TYPES: Final = (*_PROVIDERS, "pvc", "local")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model's files on this machine.

    Attributes:
        path: its folder or file.
        schema: a file that describes its tensors, None when there is none.
        digest: equal for equal content of one store; empty for files that are not ours and may change.
        size_bytes: of all files that came for it; 0 where nothing was pulled.
        lease: keeps the files, for as long as anybody holds it.
    """

    path: Path
    schema: Path | None = None
    digest: str = ""
    size_bytes: int = 0
    lease: Lease | None = None


class Pulls(Protocol):
    """What origins ask for files."""

    def pull(self, info: ModelInfo, *, cancelled: Cancellation | None = None) -> Pulled:
        """The model's files on this machine, as :meth:`Puller.pull` gives them; LoadFailed where they cannot be had."""


@dataclass(slots=True)
class _Anywhere:
    """A folder outside of the cache, in the place of a :class:`mmcore.storage.disk_cache.Room`."""

    folder: Path
    left: Left | None = None
    kept: Left | None = None

    def take(self, count: int) -> None:
        """As many bytes as the disk has."""


class _Remote(Remote, Protocol):
    """What a provider's module makes."""

    connections: Any


class Puller:
    """Pulls models by what ``storage`` says, into ``cache``.

    ``pvc_mounts`` is the folder that claims are mounted in. ``progress`` makes what is told of one pull.

    Attributes:
        pulls, hits, failures: pulls that downloaded, that found all in the cache, that failed.
        received_bytes: what came over the network, of pulls that are over.
        seconds: that pulls took together.
    """

    def __init__(
        self,
        storage: StorageConfig,
        cache: DiskCache,
        *,
        pvc_mounts: Path = _DEFAULTS.pvc_mounts,
        limits: PullLimits = PullLimits(),
        progress: Callable[[], Progress] = LogProgress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.pulls = self.hits = self.failures = self.received_bytes = 0
        self.seconds = 0.0
        self._storage = storage
        self._pvc_mounts = pvc_mounts
        self._limits = limits
        self._progress = progress
        self._clock = clock
        self._closed = Cancellation()
        self._lock = threading.Lock()
        self._remotes_lock = threading.Lock()
        #: By a digest of their parameters, those used last at the end.
        self._remotes: OrderedDict[bytes, _Remote] = OrderedDict()

    def pull(self, info: ModelInfo, *, cancelled: Cancellation | None = None) -> Pulled:
        """The model's files, in the cache or where they are mounted.

        A pull that is cancelled leaves what has come of large files to the next of the same content, so that a model
        whose callers have less patience than its download takes is there in the end.

        Raises:
            LoadFailed: they cannot be had; the text tells the cause.
            Cancelled: ``cancelled`` was set.
            Unavailable: the puller was closed.
        """
        with self._counted(cancelled) as watch:
            return self._with_credentials(info, lambda place: self._to_cache(place, watch))

    def pull_to(self, info: ModelInfo, folder: Path, *, cancelled: Cancellation | None = None) -> None:
        """Bring the model's files to ``folder``, which must not be there yet; raises as :meth:`pull` does."""
        if os.path.lexists(folder):
            raise LoadFailed(f"{folder} is there already")
        made = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.part")
        with self._counted(cancelled) as watch:
            try:
                self._with_credentials(info, lambda place: self._to_folder(place, made, watch))
                made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)

    def close(self) -> None:
        """End pulls that run, and take no new ones."""
        self._closed.set()
        with self._remotes_lock:
            for remote in self._remotes.values():
                remote.connections.close()
            self._remotes.clear()
        self.cache.close()

    @contextmanager
    def _counted(self, cancelled: Cancellation | None) -> Iterator[Watch]:
        """One pull: its clock, its place in the counters, and our errors for those of the disk."""
        events = (self._closed,) if cancelled is None else (self._closed, cancelled)
        watch = Watch(self._limits, self._progress(), *events, clock=self._clock)
        began, failed = self._clock(), 1
        try:
            if self._closed.is_set:
                raise Unavailable("this instance is shutting down")
            yield watch
            failed = 0
        except OSError as error:
            raise self._disk_failure(error) from error
        finally:
            watch.progress.ended()
            with self._lock:
                self.failures += failed
                self.received_bytes += watch.received
                self.seconds += self._clock() - began

    def _disk_failure(self, error: OSError) -> LoadFailed:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL:
            return LoadFailed(f"the disk is full: {error.filename or self.cache.folder}: {reason}")
        return LoadFailed(f"the model's files cannot be kept in {error.filename or self.cache.folder}: {reason}")

    def _with_credentials(self, info: ModelInfo, bring: Callable[[Place], Pulled]) -> Pulled:
        """Call ``bring`` with the model's place; again if credentials were refused that have been changed since."""
        place = self._storage.place(info)
        try:
            return bring(place)
        except Refused:
            now = self._storage.place(info)
            if now == place:
                raise
            log.info("the storage entry was changed while it was used; trying the new one")
            return bring(now)

    def _to_cache(self, place: Place, watch: Watch) -> Pulled:
        found = mounted(place, place.path, self._pvc_mounts)
        if found is not None:
            schema = mounted(place, place.schema_path, self._pvc_mounts) if place.schema_path else None
            if found.is_file() and is_archive(found.name):
                return replace(self._unpacked(found, watch), schema=schema)
            return Pulled(found, schema)
        remote = self._remote(place)
        for _ in range(_LISTINGS):
            with contextlib.suppress(Changed):
                blobs = _listed(remote, place, watch, folder=f"{_MODEL}/", schema=_SCHEMA)
                digest = _identity(remote.store, blobs)
                lease = self.cache.lease(digest) or self._download(remote, blobs, digest, watch)
                files = self.cache.files(digest)
                if not watch.received:
                    self._count_hit()
                return Pulled(
                    files / _MODEL,
                    files / _SCHEMA if place.schema_path else None,
                    digest,
                    sum(blob.size or 0 for blob in blobs),
                    lease,
                )
        raise _always_changing(remote, place)

    def _download(self, remote: _Remote, blobs: list[Blob], digest: str, watch: Watch) -> Lease:
        """Make the entry, unless somebody else does, and lease it."""
        while True:
            with self.cache.making(digest, sum(blob.size or 0 for blob in blobs), watch) as room:
                if isinstance(room, Lease):
                    return room
                self._fetch(remote, blobs, room, watch)
            # Another process may have evicted it already.
            if (lease := self.cache.lease(digest)) is not None:
                return lease

    def _unpacked(self, archive: Path, watch: Watch) -> Pulled:
        """An archive that is mounted, unpacked in the cache."""
        taken = signature(archive)
        digest = hashlib.sha256(b"mounted " + taken.digest).hexdigest()[:_DIGEST]
        lease = self.cache.lease(digest)
        while lease is None:
            with self.cache.making(digest, 0, watch) as room:
                if isinstance(room, Room):
                    (room.folder / _MODEL).mkdir()
                    unpack(archive, room.folder / _MODEL, _watched(room.take, watch))
            lease = self.cache.lease(digest)
        return Pulled(self.cache.files(digest) / _MODEL, digest=digest, size_bytes=taken.size_bytes, lease=lease)

    def _to_folder(self, place: Place, folder: Path, watch: Watch) -> Pulled:
        found = mounted(place, place.path, self._pvc_mounts)
        if found is not None:
            if found.is_dir():
                shutil.copytree(found, folder)
            elif is_archive(found.name):
                folder.mkdir(parents=True)
                unpack(found, folder, lambda count: watch.check())
            else:
                folder.mkdir(parents=True)
                shutil.copy2(found, folder)
            if place.schema_path and (schema := mounted(place, place.schema_path, self._pvc_mounts)) is not None:
                shutil.copy2(schema, folder / SCHEMA)
            return Pulled(folder)
        remote = self._remote(place)
        for _ in range(_LISTINGS):
            with contextlib.suppress(Changed):
                blobs = _listed(remote, place, watch, folder="", schema=SCHEMA)
                folder.mkdir(parents=True)
                self._fetch(remote, blobs, _Anywhere(folder), watch)
                return Pulled(folder)
            shutil.rmtree(folder)
        raise _always_changing(remote, place)

    def _fetch(self, remote: _Remote, blobs: list[Blob], room: Room | _Anywhere, watch: Watch) -> None:
        """Download the objects to their names below the room's folder."""
        began = self._clock()
        sizes = [blob.size for blob in blobs]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        what = f"{remote.where}/{blobs[0].key}"
        watch.progress.started(what, len(blobs), total)
        transfer = Transfer(remote, remote.connections, watch, take=room.take, left=room.left)
        try:
            transfer.run(blobs, room.folder)
        except Cancelled:
            room.kept = transfer.left
            raise
        models = [blob for blob in blobs if blob.name not in (_SCHEMA, SCHEMA)]
        if len(models) == 1 and is_archive(models[0].name):
            archive = room.folder / models[0].name
            _unpack_apart(archive, archive.parent, _watched(room.take, watch))
        with self._lock:
            self.pulls += 1
        log.info("pulled %s: %d files, %d bytes, %.3f s", what, len(blobs), watch.received, self._clock() - began)

    def _count_hit(self) -> None:
        with self._lock:
            self.hits += 1

    def _remote(self, place: Place) -> _Remote:
        """The store of a place, its connections and credentials kept from the pull before."""
        key = hashlib.sha256(json.dumps([place.type, place.parameters], sort_keys=True).encode()).digest()
        with self._remotes_lock:
            remote = self._remotes.pop(key, None) or self._connect(place)
            self._remotes[key] = remote
            if len(self._remotes) > _KEPT_REMOTES:
                self._remotes.popitem(last=False)[1].connections.close()
        return remote

    def _connect(self, place: Place) -> _Remote:
        provider = _PROVIDERS.get(place.type)
        if provider is None:
            raise LoadFailed(f"the storage type '{place.type}' is not known; these are: {', '.join(_TYPES)}")
        try:
            module = importlib.import_module(provider.module)
        except ImportError as error:
            raise LoadFailed(
                f"storage of type {place.type} needs a package that cannot be imported ({error.name});"
                f" install it with: pip install 'mmcore[{provider.extra}]'"
            ) from error
        make: Callable[[Place, PullLimits], _Remote] = getattr(module, provider.remote)
        return make(place, self._limits)


def _listed(remote: Remote, place: Place, watch: Watch, *, folder: str, schema: str) -> list[Blob]:
    """The model's objects, named below ``folder``, and that of its schema, called ``schema``."""
    blobs = watch.again(lambda: remote.find(place.path))
    listed = [replace(blob, name=folder + blob.name) for blob in blobs]
    if place.schema_path is not None:
        # The one that the key names goes before the model's own.
        listed = [blob for blob in listed if blob.name != schema]
        path = place.schema_path
        found = watch.again(lambda: remote.find(path))
        if len(found) != 1:
            raise LoadFailed(f"{remote.where}/{path}: the schema is a folder")
        listed.append(replace(found[0], name=schema))
    return listed


def _watched(take: Callable[[int], None], watch: Watch) -> Callable[[int], None]:
    """``take``, with a look at whether the pull may go on."""

    def look_and_take(count: int) -> None:
        watch.check()
        take(count)

    return look_and_take


def _unpack_apart(archive: Path, folder: Path, take: Callable[[int], None]) -> None:
    """Unpack an archive that lies in ``folder`` into it, as if it had never been there itself."""
    apart = folder.with_name(f"{folder.name}.archive")
    apart.mkdir()
    moved = archive.rename(apart / archive.name)
    unpack(moved, folder, take)
    shutil.rmtree(apart)


def _identity(store: str, blobs: list[Blob]) -> str:
    """What tells a model's content: names and digests within one store, where it has digests; else places and times."""
    told = [
        (blob.name, blob.size, blob.content)
        if blob.content
        else (blob.name, blob.size, blob.key, blob.version or secrets.token_hex(8))
        for blob in sorted(blobs, key=lambda blob: blob.name)
    ]
    return hashlib.sha256(json.dumps([store, told]).encode()).hexdigest()[:_DIGEST]


def _always_changing(remote: Remote, place: Place) -> LoadFailed:
    return LoadFailed(f"{remote.where}/{place.path}: its objects are being changed again and again")
