"""Azure Blob Storage through its SDK: it lists and signs; objects are fetched by signed URLs or with a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

from azure.core.credentials import TokenCredential
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.identity import (
    ClientSecretCredential,
    DefaultAzureCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)
from azure.storage.blob import BlobSasPermissions, ContainerClient, generate_blob_sas

from mmcore.errors import LoadFailed
from mmcore.storage.cancellation import apart
from mmcore.storage.connections import Connections, trusted_file
from mmcore.storage.digests import Digest
from mmcore.storage.places import Place
from mmcore.storage.remote import Blob, Interrupted, Refused, Request, objects_at, refusal
from mmcore.storage.transfer import PullLimits

_URL_LIFE: Final = timedelta(minutes=15)
_SCOPE: Final = "https://storage.azure.com/.default"
#: The version of the service's protocol in which tokens are understood.
_PROTOCOL: Final = "2021-12-02"
#: What ``credentials`` may say.
IDENTITIES: Final = ("default", "managed-identity", "workload-identity")
_SECRETS: Final = ("client_id", "client_secret", "tenant_id")


class AzureRemote:
    """One container. Satisfies :class:`mmcore.storage.remote.Remote`.

    Its parameters are those of the archived stack: ``account_name`` and ``container``; ``connection_string``, else
    ``client_id``, ``client_secret`` and ``tenant_id``, else nothing for a public container. And ``credentials``, one of
    :data:`IDENTITIES`, for the identity that this machine or pod has (``client_id`` says which, where it has several),
    ``endpoint_url`` where the account is not in Azure's public cloud, ``authority_host`` where logins are not either,
    and ``certificate``, what both are trusted by.
    """

    def __init__(self, place: Place, limits: PullLimits) -> None:
        self._container = place.required("container")
        certificate, stated = place.text("certificate"), place.text("connection_string")
        options: dict[str, Any] = {"connection_timeout": limits.connect_s, "read_timeout": limits.silence_s}
        if certificate:
            options["connection_verify"] = trusted_file(certificate, self)
        self._token: TokenCredential | None = None
        account = "connection string"
        try:
            if stated:
                self._client = ContainerClient.from_connection_string(stated, self._container, retry_total=0, **options)
            else:
                account = place.required("account_name")
                self._token = _identity(place, options)
                endpoint = place.text("endpoint_url") or f"https://{account}.blob.core.windows.net"
                self._client = ContainerClient(
                    endpoint, self._container, credential=self._token, retry_total=0, **options
                )
        except ValueError:
            raise LoadFailed(
                "storage of type azure: the connection string or an id is missing, or is not in the right form"
            ) from None
        address = urlsplit(self._client.url)
        self.where = f"azure://{self._client.account_name or account}/{self._container}"
        self.store = f"azure {address.netloc}{address.path}"
        self._address = address
        self._account_key = getattr(self._client.credential, "account_key", None) if stated else None
        self.connections = Connections(connect_s=limits.connect_s, silence_s=limits.silence_s, ca=certificate)

    def find(self, path: str) -> list[Blob]:
        """The objects at a path, see :class:`mmcore.storage.remote.Remote`."""
        return objects_at(self.where, path, self._listing)

    def _listing(self, prefix: str, most: int | None) -> Iterator[Blob]:
        with self._translated(f"{self.where}/{prefix}"):
            yield from apart(
                lambda: [_blob(one) for one in islice(self._client.list_blobs(prefix, results_per_page=most), most)]
            )

    def request(self, blob: Blob) -> Request:
        """The object as listed, see :class:`mmcore.storage.remote.Remote`."""
        headers = {"if-match": f'"{blob.version}"', "x-ms-version": _PROTOCOL}
        query = self._address.query
        with self._translated(f"{self.where}/{blob.key}"):
            if self._account_key:
                query = generate_blob_sas(
                    self._client.account_name or "",
                    self._container,
                    blob.key,
                    account_key=self._account_key,
                    permission=BlobSasPermissions(read=True),
                    expiry=datetime.now(UTC) + _URL_LIFE,
                )
            elif self._token is not None:
                headers["authorization"] = f"Bearer {self._token.get_token(_SCOPE).token}"
        path = f"{self._address.path}/{quote(blob.key)}"
        return Request(urlunsplit(self._address._replace(path=path, query=query)), headers)

    def digest(self, blob: Blob) -> Digest | None:
        """That of the listing, see :class:`mmcore.storage.remote.Remote`."""
        return blob.digest

    def piece_sizes(self, blob: Blob, count: int) -> Iterable[int]:
        """Nothing is known of pieces."""
        return ()

    def checks(self, headers: Mapping[str, str]) -> bool:
        """Digests here are always of the bytes."""
        return True

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Our errors instead of the SDK's, whose texts may show URLs with credentials."""
        try:
            yield
        except (ServiceRequestError, ServiceResponseError) as error:
            raise Interrupted(f"{what}: the connection failed ({type(error).__name__})") from None
        except HttpResponseError as error:
            if isinstance(error, ClientAuthenticationError) or error.status_code is None:
                raise Refused(f"{what}: the store refuses the credentials, or they may not read this") from None
            raise refusal(error.status_code, str(getattr(error, "error_code", None) or ""), what) from None
        except AzureError as error:
            raise LoadFailed(f"{what}: the entry's parameters cannot be used ({type(error).__name__})") from None


def _identity(place: Place, options: dict[str, Any]) -> TokenCredential | None:
    """What gets tokens; None for a public container.

    Raises:
        ValueError: an id is missing or not in the right form.
    """
    authority = place.text("authority_host")
    if authority is not None:
        # The public cloud's login knows nothing of others, and would be asked.
        options = {**options, "authority": authority, "disable_instance_discovery": True}
    stated, client_id, tenant_id = (place.text(name) for name in ("credentials", "client_id", "tenant_id"))
    match stated:
        case None:
            secrets = [place.text(name) or "" for name in _SECRETS]
            if any(secrets) and not all(secrets):
                raise LoadFailed(f"storage of type azure: {', '.join(_SECRETS)} go together")
            client, secret, tenant = secrets
            return ClientSecretCredential(tenant, client, secret, **options) if secret else None
        case "managed-identity":
            return ManagedIdentityCredential(client_id=client_id, **options)
        case "workload-identity":
            return WorkloadIdentityCredential(client_id=client_id, tenant_id=tenant_id, **options)
        case "default":
            named = {f"{kind}_identity_client_id": client_id for kind in ("managed", "workload") if client_id}
            return DefaultAzureCredential(**named, **options)
    raise LoadFailed(f"storage of type azure: 'credentials' must be one of {', '.join(IDENTITIES)}")


def _blob(listed: Any) -> Blob:
    md5 = listed.content_settings.content_md5
    digest = bytes(md5).hex() if md5 else ""
    return Blob(
        key=listed.name,
        name="",
        size=listed.size,
        version=str(listed.etag).strip('"'),
        content=digest,
        digest=Digest("md5", digest) if digest else None,
    )
