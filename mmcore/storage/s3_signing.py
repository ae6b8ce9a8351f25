"""GETs to one S3 bucket, signed by headers: signature version 4, at a tenth of what botocore takes for it.

Described in https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlencode, urlsplit, urlunsplit

from mmcore.storage.remote import Request

_URL_LIFE_S: Final = 900
#: One that is the same however it is quoted.
_ANY_KEY: Final = "key"
_NOTHING: Final = hashlib.sha256(b"").hexdigest()


class Signing:
    """Makes requests to a bucket, with what ``credentials`` are then; raises what botocore does.

    Where a bucket is and what signs for it is botocore's to find out, from endpoint, region, style and kind of bucket:
    it is asked for one signed URL, which tells how requests are made.
    """

    def __init__(self, client: Any, bucket: str, credentials: Any) -> None:
        self._client = client
        self._bucket = bucket
        self._credentials = credentials
        parts = urlsplit(self._presigned(_ANY_KEY))
        self._host = parts.netloc.lower()
        self._base = urlunsplit(parts._replace(path="", query=""))
        #: Of the bucket, with a slash at the end.
        self._path = parts.path.removesuffix(_ANY_KEY)
        query = {name.lower(): values[0] for name, values in parse_qs(parts.query).items()}
        self._signed = bool(query)
        self._scope: list[str] | None = None
        if query.get("x-amz-algorithm") == "AWS4-HMAC-SHA256" and "x-amz-s3session-token" not in query:
            # The key's id, the day, the region and the service.
            self._scope = query["x-amz-credential"].split("/")[-3:-1]
        #: The key that signs, with the secret and the day it is made of.
        self._key = ("", "", b"")

    def object(self, key: str) -> Request:
        """What gets an object."""
        if self._signed and self._scope is None:
            return Request(self._presigned(key))
        return self._get(self._path + quote(key, safe="/~"), "")

    def listing(self, query: Mapping[str, str]) -> Request | None:
        """What lists objects; None where only botocore knows how that is signed."""
        if self._signed and self._scope is None:
            return None
        # In the path style without the slash, as botocore does.
        return self._get(self._path.rstrip("/") or "/", urlencode(sorted(query.items()), quote_via=quote, safe=""))

    def _get(self, path: str, query: str) -> Request:
        url = f"{self._base}{path}?{query}" if query else f"{self._base}{path}"
        if self._scope is None:
            return Request(url)
        credentials = self._credentials.get_frozen_credentials()
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers = {"X-Amz-Content-SHA256": _NOTHING, "X-Amz-Date": now}
        if credentials.token:
            headers["X-Amz-Security-Token"] = credentials.token
        told = {"host": self._host, **{name.lower(): value for name, value in headers.items()}}
        names, lines = ";".join(told), "".join(f"{name}:{value}\n" for name, value in told.items())
        request = hashlib.sha256(f"GET\n{path}\n{query}\n{lines}\n{names}\n{_NOTHING}".encode()).hexdigest()
        scope = "/".join((now[:8], *self._scope, "aws4_request"))
        key = self._signing_key(credentials.secret_key, now[:8])
        signature = _sum(key, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}").hex()
        who = f"Credential={credentials.access_key}/{scope}"
        headers["Authorization"] = f"AWS4-HMAC-SHA256 {who}, SignedHeaders={names}, Signature={signature}"
        return Request(url, headers)

    def _signing_key(self, secret: str, day: str) -> bytes:
        """The same for a day."""
        assert self._scope is not None
        of_secret, of_day, key = self._key
        if (of_secret, of_day) != (secret, day):
            key = f"AWS4{secret}".encode()
            for part in (day, *self._scope, "aws4_request"):
                key = _sum(key, part)
            self._key = (secret, day, key)
        return key

    def _presigned(self, key: str) -> str:
        params = {"Bucket": self._bucket, "Key": key}
        url: str = self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=_URL_LIFE_S)
        return url


def _sum(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
