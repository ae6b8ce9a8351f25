"""Signs requests for the objects of one bucket, by headers: a fraction of what a signed URL costs to make and to send.

Where a bucket is and what signs for it is botocore's to find out, from endpoint, region, style and kind of bucket: it
is asked for one signed URL, and others are made like it. Signature version 4 is described in
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

_LIFE_S: Final = 900
#: Any that is the same however it is quoted.
_KEY: Final = "key"


class Signing:
    """Of the objects in ``bucket``, with what ``credentials`` are at that moment; raises what botocore does."""

    def __init__(self, client: Any, bucket: str, credentials: Any) -> None:
        self._client = client
        self._bucket = bucket
        self._credentials = credentials
        parts = urlsplit(self._presigned(_KEY))
        self._base = urlunsplit(parts._replace(query=""))[: -len(_KEY)]
        query = {name.lower(): values[0] for name, values in parse_qs(parts.query).items()}
        self._signed = bool(query)
        self._scope: list[str] | None = None
        if query.get("x-amz-algorithm") == "AWS4-HMAC-SHA256" and "x-amz-s3session-token" not in query:
            # The key's id, the day, the region and the service.
            self._scope = query["x-amz-credential"].split("/")[-4:-1]

    def sign(self, key: str) -> tuple[str, Mapping[str, str]]:
        """The URL and headers that get an object; both may hold credentials."""
        url = self._base + quote(key, safe="/~")
        if not self._signed:
            return url, {}
        if self._scope is None:
            return self._presigned(key), {}
        _, region, service = self._scope
        request = AWSRequest("GET", url)
        S3SigV4Auth(self._credentials.get_frozen_credentials(), service, region).add_auth(request)
        return url, dict(request.headers.items())

    def _presigned(self, key: str) -> str:
        params = {"Bucket": self._bucket, "Key": key}
        url: str = self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=_LIFE_S)
        return url
