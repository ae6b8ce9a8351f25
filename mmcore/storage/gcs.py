"""Google Cloud Storage by its JSON API; google-auth makes the tokens.

Two calls of that API are all a pull needs, so the storage SDK, which brings six packages and binds protobuf's version,
is not used.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

import google.auth
from google.auth.credentials import with_scopes_if_required
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport.urllib3 import Request as TokenRequest
from google.oauth2.service_account import Credentials

from mmcore.errors import LoadFailed
from mmcore.storage.connections import Connections
from mmcore.storage.digests import Digest
from mmcore.storage.places import Place
from mmcore.storage.remote import Blob, Interrupted, Refused, Request, objects_at
from mmcore.storage.transfer import PullLimits

_ENDPOINT: Final = "https://storage.googleapis.com"
_TOKENS: Final = "https://oauth2.googleapis.com/token"
_SCOPE: Final = "https://www.googleapis.com/auth/devstorage.read_only"
_FIELDS: Final = "nextPageToken,items(name,size,generation,md5Hash,crc32c)"
_PAGE: Final = 1000
_PAGE_BYTES: Final = 16 * 2**20


class GcsRemote:
    """One bucket. Satisfies :class:`mmcore.storage.remote.Remote`.

    Its parameters are those of the archived stack (``bucket``; ``private_key`` with ``client_email``, and
    ``token_uri``, or nothing for a public bucket), ``endpoint_url`` and ``credentials``, which ``default`` makes those
    of this machine: the file of GOOGLE_APPLICATION_CREDENTIALS (a key, or workload identity federation), the login of
    gcloud, or the metadata server (https://google.aip.dev/auth/4110).
    """

    def __init__(self, place: Place, limits: PullLimits) -> None:
        self._bucket = place.required("bucket")
        self._endpoint = (place.text("endpoint_url") or _ENDPOINT).rstrip("/")
        self.where = f"gs://{self._bucket}"
        self.store = f"gcs {self._endpoint} {self._bucket}"
        self.connections = Connections(connect_s=limits.connect_s, silence_s=limits.silence_s)
        self._lock = threading.Lock()
        self._own = place.text("credentials") is None
        self._credentials = self._found(place)

    def find(self, path: str) -> list[Blob]:
        """The objects at a path, see :class:`mmcore.storage.remote.Remote`."""
        return objects_at(self.where, path, self._listing)

    def _listing(self, prefix: str, most: int | None) -> Iterator[Blob]:
        query = {"prefix": prefix, "fields": _FIELDS, "maxResults": str(most or _PAGE)}
        what = f"{self.where}/{prefix}"
        while True:
            url = f"{self._endpoint}/storage/v1/b/{quote(self._bucket)}/o?{urlencode(query)}"
            page = _page(self.connections.read(Request(url, self._headers()), what, _PAGE_BYTES), what)
            for one in page.get("items", []):
                yield _blob(one)
            if most is not None or "nextPageToken" not in page:
                return
            query["pageToken"] = page["nextPageToken"]

    def request(self, blob: Blob) -> Request:
        """The object of the generation that was listed, see :class:`mmcore.storage.remote.Remote`."""
        query = urlencode({"alt": "media", "ifGenerationMatch": blob.version})
        url = f"{self._endpoint}/download/storage/v1/b/{quote(self._bucket)}/o/{quote(blob.key, safe='')}?{query}"
        # Objects that are stored compressed are wanted as they are stored: so they are listed.
        return Request(url, {**self._headers(), "accept-encoding": "gzip"})

    def digest(self, blob: Blob) -> Digest | None:
        """That of the listing, see :class:`mmcore.storage.remote.Remote`."""
        return blob.digest

    def piece_sizes(self, blob: Blob, count: int) -> Iterable[int]:
        """Nothing is known of pieces."""
        return ()

    def checks(self, headers: Mapping[str, str]) -> bool:
        """Digests here are always of the bytes."""
        return True

    def _headers(self) -> dict[str, str]:
        """What says who we are, with a token that is good."""
        if self._credentials is None:
            return {}
        with self._lock:
            if not self._credentials.valid:
                try:
                    self._credentials.refresh(TokenRequest(self.connections.pool))
                except TransportError:
                    raise Interrupted(f"{self.where}: the token's server cannot be reached") from None
                except GoogleAuthError as error:
                    if error.retryable:
                        raise Interrupted(f"{self.where}: the token's server is not at its best") from None
                    refused = "'client_email' and 'private_key'" if self._own else "the default credentials"
                    raise Refused(f"{self.where}: the token's server refuses {refused}") from None
            headers: dict[str, str] = {}
            self._credentials.apply(headers)
            return headers

    def _found(self, place: Place) -> Any:
        if self._own:
            return _of_the_entry(place)
        if place.text("credentials") != "default" or place.text("private_key"):
            raise LoadFailed("storage of type gcs: 'credentials' must be 'default', and takes no 'private_key' beside")
        try:
            # Without a scope yet: with one it would ask another service, which may be out of reach, for a project.
            found, _ = google.auth.default(request=TokenRequest(self.connections.pool))
            return with_scopes_if_required(found, [_SCOPE])
        except GoogleAuthError as error:
            # Its text names files and what is wrong with them.
            raise Refused(f"{self.where}: no default credentials: {error}") from None


def _of_the_entry(place: Place) -> Any:
    key, email = place.text("private_key"), place.text("client_email")
    if bool(key) != bool(email):
        raise LoadFailed("storage of type gcs: 'private_key' and 'client_email' go together")
    if not key:
        return None
    try:
        return Credentials.from_service_account_info(
            {"private_key": key, "client_email": email, "token_uri": place.text("token_uri") or _TOKENS},
            scopes=[_SCOPE],
        )
    except (ValueError, GoogleAuthError):
        raise LoadFailed("storage of type gcs: 'private_key' is not a private key in PEM form") from None


def _page(body: bytes, what: str) -> dict[str, Any]:
    try:
        page = json.loads(body)
    except ValueError:
        page = None
    if not isinstance(page, dict):
        raise LoadFailed(f"{what}: the store's listing is not JSON")
    return page


def _blob(listed: Mapping[str, Any]) -> Blob:
    found = {
        algorithm: base64.b64decode(listed[field]).hex()
        for algorithm, field in (("crc32c", "crc32c"), ("md5", "md5Hash"))
        if listed.get(field)
    }
    return Blob(
        key=listed["name"],
        name="",
        size=int(listed["size"]),
        version=str(listed["generation"]),
        content=found.get("md5", ""),
        digest=next((Digest(algorithm, value) for algorithm, value in found.items()), None),
    )
