"""What every remote store offers the downloads: the objects of a model, and how each is asked for.

Bytes come over HTTP from all of them, so a store only lists objects and signs requests; ``transfer`` does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Final, Protocol

from mmcore.errors import LoadFailed
from mmcore.storage.digests import Digest

#: Objects that are listed at the first look for a model.
_FEW: Final = 20
_RETRYABLE: Final = frozenset({408, 425, 429})
_ERROR_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")
#: Codes of S3 that say something else than their HTTP status does.
_INTERRUPTIONS: Final = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
_REFUSALS: Final = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})


class Interrupted(Exception):
    """The store or the way to it failed for the moment; the same request may succeed."""


class Changed(Exception):
    """An object is not the one that was listed any more."""


class Refused(LoadFailed):
    """The store does not accept the credentials, or does not let them read this."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One object of a model.

    Attributes:
        key: its name at the store.
        name: its path in the model's folder, relative; empty while only the store knows it.
        size: in bytes; None where the store does not tell.
        version: changes with the object: an entity tag, a generation, a time; empty where the store tells none.
        content: equal in one store only where the bytes are equal; empty where the store has no such thing.
        digest: what the bytes are checked by, where the store tells.
        more: whether the store has others, which are worth asking for.
        ranges: whether parts of it can be asked for.
    """

    key: str
    name: str
    size: int | None
    version: str
    content: str = ""
    digest: Digest | None = None
    more: bool = False
    ranges: bool = True

    @property
    def asks(self) -> bool:
        """Whether the store is to be asked what the bytes are checked by."""
        return self.more or (self.digest is not None and self.digest.pieces > 0)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET, ready to be sent; URL and headers may hold credentials. ``follow`` says to go where it is redirected."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    follow: bool = False


class Remote(Protocol):
    """A bucket, container or site. Calls block and may come from several threads.

    Attributes:
        where: its name in texts, without credentials: ``s3://bucket``.
        store: what tells it from all other stores that objects come from.
    """

    where: str
    store: str

    def find(self, path: str) -> list[Blob]:
        """The objects that make up the model at ``path``: the one of that name, or all below it.

        Raises:
            LoadFailed: there is none, or it cannot be asked for; the text tells the cause.
            Interrupted: it may be asked again.
        """

    def request(self, blob: Blob) -> Request:
        """What asks for an object as listed, signed anew for each time. Raises as :meth:`find` does."""

    def digest(self, blob: Blob) -> Digest | None:
        """What an object that ``asks`` is best checked by; None where nothing fits. Raises Interrupted alone."""

    def piece_sizes(self, blob: Blob, count: int) -> Iterable[int]:
        """The bytes of each of the pieces that an object was uploaded in, as far as the store tells."""

    def checks(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer's headers leave a listed MD5 one of the bytes: not so with some encryptions."""


def refusal(status: int, text: str, what: str) -> Exception:
    """What an HTTP status above 299 means for a request for ``what``; ``text`` is the answer's body, or a code."""
    found = _ERROR_CODE.search(text)
    code = found[1] if found else text if text.isalnum() and len(text) < 64 else ""
    said = f"HTTP {status}" + (f", {code}" if code else "")
    if status in _RETRYABLE or status >= 500 or code in _INTERRUPTIONS:
        return Interrupted(f"{what}: the store answers {said}")
    if code == "RequestTimeTooSkewed":
        return LoadFailed(f"{what}: the clock of this machine is not the store's ({said})")
    if status in (401, 403) or code in _REFUSALS:
        return Refused(f"{what}: the store refuses the credentials, or they may not read this ({said})")
    if code == "NoSuchBucket" or code == "ContainerNotFound":
        return LoadFailed(f"{what}: there is no such bucket ({said})")
    if status in (404, 410):
        return LoadFailed(f"{what} does not exist ({said})")
    if status in (412, 416):
        return Changed(f"{what} was changed while it was pulled")
    return LoadFailed(f"{what}: the store answers {said}")


def relative(key: str, prefix: str, where: str) -> str:
    """The path in the model's folder of an object below ``prefix``, which ends with a slash or is empty.

    Raises:
        LoadFailed: it would be a file outside of the folder.
    """
    name = key[len(prefix) :]
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise LoadFailed(f"{where}: the object name {key!r} is no path inside the model's folder")
    return str(PurePosixPath(name))


def objects_at(where: str, path: str, listing: Callable[[str, int | None], Iterable[Blob]]) -> list[Blob]:
    """The objects that make up the model at ``path`` of a flat store: the one of that name, or all below it.

    ``listing`` gives the objects whose keys begin with a text, in the order of keys, all or so many; their names are
    given here. One short listing tells of both where the model has few objects, which most have.

    Raises:
        LoadFailed: there is none, or one's name is no path.
    """
    path = path.strip("/")
    prefix = f"{path}/" if path else ""
    first = list(listing(path, _FEW)) if path else []
    name = path.rpartition("/")[2]
    alone = [replace(blob, name=name) for blob in first if blob.key == path]
    # A name with a suffix is a single object's more often than not.
    if alone and "." in name:
        return alone
    # Those below come together: after one that is not below any more there is none.
    passed = any(blob.key > prefix and not blob.key.startswith(prefix) for blob in first)
    whole = bool(path) and (len(first) < _FEW or passed)
    objects = [blob for blob in first if blob.key.startswith(prefix)] if whole else listing(prefix, None)
    files = [blob for blob in objects if not blob.key.endswith("/")]
    found = _without_markers([replace(blob, name=relative(blob.key, prefix, where)) for blob in files]) or alone
    if not found:
        raise LoadFailed(f"{where}: no object is called '{path}' and none is below '{prefix}'")
    return found


def _without_markers(blobs: list[Blob]) -> list[Blob]:
    """The objects without those that stand for a folder: empty, and in the place where others have their folder."""
    folders = {str(parent) for blob in blobs for parent in PurePosixPath(blob.name).parents}
    return [blob for blob in blobs if blob.size != 0 or blob.name not in folders]
