"""Single files from an HTTP server, with the headers and certificates that it wants."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mmcore.errors import LoadFailed
from mmcore.storage.connections import Connections
from mmcore.storage.digests import Digest
from mmcore.storage.places import Place
from mmcore.storage.remote import Blob, Changed, Request
from mmcore.storage.transfer import PullLimits

#: The file of a URL without a name.
_UNNAMED: Final = "_model"


class WebRemote:
    """A site. Satisfies :class:`mmcore.storage.remote.Remote`; its parameters are those of the archived stack."""

    def __init__(self, place: Place, limits: PullLimits) -> None:
        parts = urlsplit(place.required("url"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadFailed("storage of type http: 'url' must begin with http:// or https:// and a host")
        host = parts.netloc.rpartition("@")[2]
        self.where = f"{parts.scheme}://{host}"
        self.store = f"http {self.where}{parts.path}"
        self._base = parts._replace(netloc=host)
        self._headers = _headers(place)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        self.connections = Connections(
            connect_s=limits.connect_s,
            silence_s=limits.silence_s,
            ca=place.text("certificate"),
            certificate=place.text("client_certificate"),
            private_key=place.text("client_key"),
        )

    def find(self, path: str) -> list[Blob]:
        """The one file of that path, see :class:`mmcore.storage.remote.Remote`; asked for its first byte."""
        key = path.strip("/")
        what = f"{self.where}/{key}"
        try:
            with self.connections.get(self._request(key), what, stop=1) as answer:
                headers = answer.headers
                version = headers.get("etag") or headers.get("last-modified") or ""
                name = key.rpartition("/")[2] or _UNNAMED
                return [Blob(key, name, answer.size, version, ranges=answer.ranged)]
        except Changed:
            raise LoadFailed(f"{what} is empty") from None

    def request(self, blob: Blob) -> Request:
        """The file as it was found, where the server can be held to that; see :class:`mmcore.storage.remote.Remote`."""
        condition = {}
        if blob.version.startswith('"'):
            condition["if-match"] = blob.version
        elif blob.version and not blob.version.startswith("W/"):
            condition["if-unmodified-since"] = blob.version
        return self._request(blob.key, condition)

    def digest(self, blob: Blob) -> Digest | None:
        """That of the listing, see :class:`mmcore.storage.remote.Remote`."""
        return blob.digest

    def piece_sizes(self, blob: Blob, count: int) -> Iterable[int]:
        """Nothing is known of pieces."""
        return ()

    def checks(self, headers: Mapping[str, str]) -> bool:
        """No digest is known that could be another's."""
        return True

    def _request(self, key: str, headers: Mapping[str, str] | None = None) -> Request:
        path = "/".join(part for part in (self._base.path.rstrip("/"), quote(key)) if part)
        return Request(urlunsplit(self._base._replace(path=path)), {**self._headers, **(headers or {})}, follow=True)


def _headers(place: Place) -> dict[str, str]:
    """The entry's headers; several values of one are sent as one, with commas."""
    stated = place.parameters.get("headers") or {}
    if not isinstance(stated, dict):
        raise LoadFailed("storage of type http: 'headers' must be an object")
    headers = {}
    for name, value in stated.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise LoadFailed(f"storage of type http: the header '{name}' must be a text or a list of texts")
        headers[name.lower()] = ", ".join(values)
    return headers
