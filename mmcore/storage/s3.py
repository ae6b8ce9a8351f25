"""S3 and what speaks its protocol, through boto3: it finds credentials and endpoints, lists, and signs.

Without keys in the entry the whole default chain is asked: environment, profiles, web identity, container and instance
roles. Requests for objects are signed anew each time, so that keys that are rotated do no harm.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as ConnectionFailed

from mmcore.errors import LoadFailed
from mmcore.storage.cancellation import apart
from mmcore.storage.connections import Connections, trusted_file
from mmcore.storage.digests import ALGORITHMS, Digest
from mmcore.storage.places import Place
from mmcore.storage.remote import (
    Blob,
    Interrupted,
    Refused,
    Request,
    objects_at,
    refusal,
)
from mmcore.storage.s3_signing import Signing
from mmcore.storage.transfer import PullLimits

#: Objects of less are summed up before a question would be answered.
_WORTH_ASKING: Final = 8 * 2**20
_PAGE: Final = 1000
_PAGE_BYTES: Final = 16 * 2**20
#: An entity tag that is a digest of the bytes, or of the digests of the parts of an upload.
_MD5: Final = re.compile(r"[0-9a-f]{32}(-[1-9]\d{0,4})?")
_STYLES: Final = ("auto", "path", "virtual")
#: boto3 reads its service models while a client is made, which is not for several threads at once.
_making = threading.Lock()


class S3Remote:
    """One bucket. Satisfies :class:`mmcore.storage.remote.Remote`.

    Its parameters are those of the archived stack (``endpoint_url``, ``region``, ``access_key_id``,
    ``secret_access_key``, ``bucket`` or ``default_bucket``, ``certificate``) and ``session_token``, ``anonymous`` and
    ``addressing_style``, which is ``path`` where an endpoint is given, else ``virtual``.
    """

    def __init__(self, place: Place, limits: PullLimits) -> None:
        bucket = place.text("bucket") or place.text("default_bucket")
        endpoint, region = place.text("endpoint_url"), place.text("region")
        self._bucket = bucket or place.required("bucket")
        self.where = f"s3://{self._bucket}"
        self.store = f"s3 {endpoint or region or 'aws'} {self._bucket}"
        # 'auto' would sign for the one host of all regions. A name with dots is no name that a certificate is for.
        usual = "path" if endpoint or "." in self._bucket else "virtual"
        style = place.text("addressing_style") or usual
        if style not in _STYLES:
            raise LoadFailed(f"storage of type s3: 'addressing_style' must be one of {', '.join(_STYLES)}")
        key, secret = place.text("access_key_id"), place.text("secret_access_key")
        if bool(key) != bool(secret):
            raise LoadFailed("storage of type s3: 'access_key_id' and 'secret_access_key' go together")
        certificate = place.text("certificate")
        self.connections = Connections(connect_s=limits.connect_s, silence_s=limits.silence_s, ca=certificate)
        config = Config(
            signature_version=botocore.UNSIGNED if place.flag("anonymous") else "s3v4",
            s3={"addressing_style": style},
            connect_timeout=limits.connect_s,
            read_timeout=limits.silence_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=limits.threads,
        )
        with _making, self._translated(self.where):
            session = boto3.session.Session(
                aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=place.text("session_token")
            )
            self._credentials = session.get_credentials()
            #: Made with the first request: by then the client has learned where the bucket is.
            self._signing: Signing | None = None
            self._client = session.client(
                "s3",
                endpoint_url=endpoint,
                region_name=region or session.region_name or "us-east-1",
                verify=trusted_file(certificate, self) if certificate else None,
                config=config,
            )

    def find(self, path: str) -> list[Blob]:
        """The objects at a path, see :class:`mmcore.storage.remote.Remote`."""
        return objects_at(self.where, path, self._listing)

    def _listing(self, prefix: str, most: int | None) -> Iterator[Blob]:
        """By a request of our own, which costs a fifth of the library's, where it is known how that is signed.

        Anything but a listing is left to the library: it finds a bucket that is in another region.
        """
        what = f"{self.where}/{prefix}"
        query = {"encoding-type": "url", "list-type": "2", "max-keys": str(most or _PAGE), "prefix": prefix}
        while True:
            with self._translated(what):
                request = self._signing.listing(query) if self._signing is not None else None
            try:
                page = _page(self.connections.read(request, what, _PAGE_BYTES)) if request is not None else None
            except LoadFailed:
                self._signing = page = None
            if page is None:
                break
            yield from page[0]
            if most is not None or not page[1]:
                return
            query["continuation-token"] = page[1]
        options = {"ContinuationToken": query["continuation-token"]} if "continuation-token" in query else {}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix, PaginationConfig={"MaxItems": most, "PageSize": most}, **options
        )
        with self._translated(what):
            yield from apart(lambda: [_blob(one) for page in pages for one in page.get("Contents", [])])

    def request(self, blob: Blob) -> Request:
        """The object as listed, see :class:`mmcore.storage.remote.Remote`."""
        with self._translated(f"{self.where}/{blob.key}"):
            if self._signing is None:
                self._signing = Signing(self._client, self._bucket, self._credentials)
            request = self._signing.object(blob.key)
        if not blob.version:
            return request
        return replace(request, headers={**request.headers, "if-match": f'"{blob.version}"'})

    def digest(self, blob: Blob) -> Digest | None:
        """The cheapest that the store has, see :class:`mmcore.storage.remote.Remote`.

        A server that does not know such questions is no reason to fail: the object is checked by its size alone then.
        """
        head = self._head(blob, ChecksumMode="ENABLED") if blob.more else {}
        found = (_additional(head) if _tag(head) == blob.version else None) or blob.digest
        if found is None or not found.pieces:
            return found
        size = next(iter(self.piece_sizes(blob, found.pieces)), 0)
        fits = size and blob.size is not None and -(-blob.size // size) == found.pieces
        return replace(found, piece_bytes=size) if fits else None

    def piece_sizes(self, blob: Blob, count: int) -> Iterator[int]:
        """Those of the parts of a multipart upload, by one request each."""
        for number in range(1, count + 1):
            head = self._head(blob, PartNumber=number)
            size = head.get("ContentLength")
            if head.get("PartsCount") != count or not isinstance(size, int):
                return
            yield size

    def _head(self, blob: Blob, **asked: Any) -> Mapping[str, Any]:
        """What the store tells of an object without its bytes; nothing where it cannot."""
        try:
            with self._translated(f"{self.where}/{blob.key}"):
                head: Mapping[str, Any] = apart(
                    lambda: self._client.head_object(Bucket=self._bucket, Key=blob.key, **asked)
                )
                return head
        except (LoadFailed, Interrupted):
            return {}

    def checks(self, headers: Mapping[str, str]) -> bool:
        """With keys of a key service or of the customer the tag is no digest of the bytes."""
        encryption = headers.get("x-amz-server-side-encryption", "")
        return "kms" not in encryption and "x-amz-server-side-encryption-customer-algorithm" not in headers

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise refusal(status, str(error.response.get("Error", {}).get("Code", "")), what) from None
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            raise Refused(
                f"{what}: no credentials: the storage entry has no 'access_key_id' and 'secret_access_key', and the "
                f"default chain finds none ({type(error).__name__}); for a public bucket say 'anonymous': 'true'"
            ) from None
        except SSLError:
            raise LoadFailed(
                f"{what}: the store's certificate is not trusted; give its CA as 'certificate' in the storage entry"
            ) from None
        except (HTTPClientError, ConnectionFailed) as error:
            raise Interrupted(f"{what}: the connection failed ({type(error).__name__})") from None
        except (BotoCoreError, ValueError) as error:
            # Texts of the library may show parameters, and these may hold credentials.
            raise LoadFailed(
                f"{what}: the storage entry's parameters cannot be used ({type(error).__name__})"
            ) from None


def _page(body: bytes) -> tuple[list[Blob], str]:
    """The objects of a page of a listing, and what asks for the next one; empty after the last.

    Raises:
        LoadFailed: it is no listing.
    """
    try:
        # As the library does; the parser itself bounds what entities make of a short text.
        root = ElementTree.fromstring(body)  # noqa: S314
        told = {_name(one): one.text or "" for one in root}
        listed = [{_name(field): field.text or "" for field in one} for one in root if _name(one) == "Contents"]
        if _name(root) != "ListBucketResult" or "IsTruncated" not in told:
            raise LoadFailed("the store answers no listing")
        if told.get("EncodingType") == "url":
            listed = [{**one, "Key": unquote_plus(one["Key"])} for one in listed]
        following = told["NextContinuationToken"] if told["IsTruncated"] == "true" else ""
        return [_blob(one) for one in listed], following
    except (ElementTree.ParseError, KeyError, ValueError):
        raise LoadFailed("the store's listing cannot be read") from None


def _name(element: ElementTree.Element) -> str:
    """Its tag without the namespace."""
    return element.tag.rpartition("}")[2]


def _blob(listed: Mapping[str, Any]) -> Blob:
    tag, size = _tag(listed), int(listed["Size"])
    known = _MD5.fullmatch(tag) is not None
    return Blob(
        key=listed["Key"],
        name="",
        size=size,
        version=tag,
        content=tag if known else "",
        digest=Digest("md5", tag) if known else None,
        more=bool(listed.get("ChecksumAlgorithm")) and (size >= _WORTH_ASKING or "-" in tag),
    )


def _tag(told: Mapping[str, Any]) -> str:
    return str(told.get("ETag", "")).strip('"')


def _additional(head: Mapping[str, Any]) -> Digest | None:
    """The cheapest of the digests beside the tag; those of pieces have the number of these behind them, as tags do."""
    for algorithm in ALGORITHMS:
        value, _, pieces = str(head.get(f"Checksum{algorithm.upper()}") or "").partition("-")
        if head.get("ChecksumType") == "COMPOSITE":
            # Some servers leave the number out.
            pieces = pieces or _tag(head).partition("-")[2]
        if value:
            return Digest(algorithm, base64.b64decode(value).hex() + (f"-{pieces}" if pieces else ""))
    return None
