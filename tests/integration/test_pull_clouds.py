"""Pulling from Google's and Azure's stores: an emulator of the first, and small sites that ask for their logins."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from azure.core.credentials import AccessToken
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import create_server

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Pulled, Puller, StorageConfig, azure
from mmcore.storage.places import Place
from mmcore.storage.remote import Blob
from mmcore.storage.transfer import PullLimits
from tests.stores import BUCKET, Site

pytestmark = pytest.mark.slow

LIMITS = PullLimits(connect_s=2, silence_s=2, tries=2, pause_s=0.01, total_s=20)


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    made = Puller(StorageConfig(None), DiskCache(tmp_path / "cache", 10**9), limits=LIMITS)
    yield made
    made.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def emulator() -> Iterator[str]:
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield f"http://127.0.0.1:{server._api._httpd.server_port}"
    finally:
        server.stop()


def pull(puller: Puller, path: str, **params: str) -> Pulled:
    return puller.pull(ModelInfo("", path, json.dumps({"storage_params": params})))


def tree(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def upload(endpoint: str, name: str, body: bytes) -> None:
    url = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers)).close()


def test_gcs_folder_and_file_come_and_changes_are_noticed(emulator: str, puller: Puller) -> None:
    big = os.urandom(17 * 2**20)
    for name, body in {"m/1/a b.onnx": b"one", "m/config.pbtxt": b"c", "m-2/other": b"o", "big.onnx": big}.items():
        upload(emulator, name, body)
    params = {"type": "gcs", "bucket": BUCKET, "endpoint_url": emulator}
    first = pull(puller, "m", **params)
    assert tree(first.path) == {"1/a b.onnx": b"one", "config.pbtxt": b"c"}
    assert tree(pull(puller, "big.onnx", **params).path) == {"big.onnx": big}
    assert pull(puller, "m", **params).path == first.path
    upload(emulator, "m/1/a b.onnx", b"two")
    assert tree(pull(puller, "m", **params).path) == {"1/a b.onnx": b"two", "config.pbtxt": b"c"}
    with pytest.raises(LoadFailed, match="gs://models: no object is called 'no'"):
        pull(puller, "no", **params)
    with pytest.raises(LoadFailed, match=r"gs://none/m does not exist \(HTTP 404\)"):
        pull(puller, "m", **{**params, "bucket": "none"})


def test_gcs_service_account_gets_a_token_from_its_server(site: Site, puller: Puller) -> None:
    body = b"model"
    listed = {"name": "m/model.onnx", "size": "5", "generation": "7"}
    listed["md5Hash"] = base64.b64encode(hashlib.md5(body).digest()).decode()
    site.files = {
        "/token": json.dumps({"access_token": "T0KEN", "expires_in": 3600}).encode(),
        f"/storage/v1/b/{BUCKET}/o": json.dumps({"items": [listed]}).encode(),
        f"/download/storage/v1/b/{BUCKET}/o/m/model.onnx": body,
    }
    site.login, site.open = "Bearer T0KEN", {"/token"}
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    params = {
        "type": "gcs", "bucket": BUCKET, "endpoint_url": site.url, "client_email": "me@x", "private_key": key.decode(),
        "token_uri": f"{site.url}/token",
    }  # fmt: skip
    assert tree(pull(puller, "m", **params).path) == {"model.onnx": body}
    site.files[f"/download/storage/v1/b/{BUCKET}/o/m/model.onnx"] = b"m0del"
    listed["generation"], listed["md5Hash"] = "8", base64.b64encode(hashlib.md5(b"other").digest()).decode()
    site.files[f"/storage/v1/b/{BUCKET}/o"] = json.dumps({"items": [listed]}).encode()
    with pytest.raises(LoadFailed, match="has the checksum"):
        pull(puller, "m", **params)
    del site.files["/token"]
    with pytest.raises(LoadFailed, match="refuses 'client_email' and 'private_key'"):
        pull(puller, "m", **{**params, "client_email": "another@x"})
    with pytest.raises(LoadFailed, match="not a private key in PEM form") as raised:
        pull(puller, "m", **{**params, "private_key": "S3CRET"})
    assert "S3CRET" not in repr(raised.value)
    with pytest.raises(LoadFailed, match="go together"):
        pull(puller, "m", type="gcs", bucket=BUCKET, client_email="me@x")


ACCOUNT, ACCOUNT_KEY = "devstoreaccount1", base64.b64encode(b"account-key").decode()


def azure_listing(files: dict[str, bytes]) -> bytes:
    """What the List Blobs operation answers (Azure's REST reference)."""
    blobs = "".join(
        f"<Blob><Name>{escape(name)}</Name><Properties>"
        f'<Etag>"{hashlib.sha256(body).hexdigest()}"</Etag><Content-Length>{len(body)}</Content-Length>'
        f"<Content-MD5>{base64.b64encode(hashlib.md5(body).digest()).decode()}</Content-MD5>"
        "<BlobType>BlockBlob</BlobType></Properties></Blob>"
        for name, body in files.items()
    )
    return f'<?xml version="1.0"?><EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>'.encode()


def test_azure_connection_string_lists_and_signs(site: Site, puller: Puller) -> None:
    files = {"m/1/a b.onnx": b"one", "m/config.pbtxt": b"c"}
    base = f"/{ACCOUNT}/{BUCKET}"
    site.files = {f"{base}/{name}": body for name, body in files.items()}
    site.files[base] = azure_listing(files)
    stated = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
        f"BlobEndpoint={site.url}/{ACCOUNT};"
    )
    params = {"type": "azure", "account_name": ACCOUNT, "container": BUCKET, "connection_string": stated}
    assert tree(pull(puller, "m", **params).path) == {"1/a b.onnx": b"one", "config.pbtxt": b"c"}
    listings = [headers for _, path, headers in site.requests if "comp=list" in path]
    fetched = [path for _, path, _ in site.requests if "comp=list" not in path]
    assert all(headers["authorization"].startswith(f"SharedKey {ACCOUNT}:") for headers in listings)
    assert len(fetched) == 2
    assert all("sig=" in path and "sp=r&" in path for path in fetched)
    site.login = "another"
    with pytest.raises(LoadFailed, match=f"azure://{ACCOUNT}/{BUCKET}/m: the store refuses the credentials") as raised:
        pull(puller, "m", **params)
    assert ACCOUNT_KEY not in repr(raised.value)
    with pytest.raises(LoadFailed, match="is not in the right form"):
        pull(puller, "m", **{**params, "connection_string": "no"})


def test_azure_service_principal_brings_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Principal:
        """In the place of a login at Microsoft's own site."""

        def __init__(self, *told: str) -> None:
            assert told == ("tenant", "id", "S3CRET")

        def get_token(self, *scopes: str, **options: object) -> AccessToken:
            assert scopes == ("https://storage.azure.com/.default",)
            return AccessToken("T0KEN", 2**40)

    monkeypatch.setattr(azure, "ClientSecretCredential", Principal)
    parameters = {
        "account_name": "acct", "container": BUCKET,
        "client_id": "id", "client_secret": "S3CRET", "tenant_id": "tenant",
    }  # fmt: skip
    remote = azure.AzureRemote(Place("azure", "m", None, parameters), LIMITS)
    request = remote.request(Blob("m/a b", "a b", 1, "tag"))
    assert request.url == f"https://acct.blob.core.windows.net/{BUCKET}/m/a%20b"
    assert request.headers["authorization"] == "Bearer T0KEN"
    assert "T0KEN" not in repr(request)
    del parameters["tenant_id"]
    with pytest.raises(LoadFailed, match="client_id, client_secret, tenant_id go together"):
        azure.AzureRemote(Place("azure", "m", None, parameters), LIMITS)


def test_azure_public_container_needs_nothing() -> None:
    remote = azure.AzureRemote(Place("azure", "m", None, {"account_name": "acct", "container": BUCKET}), LIMITS)
    assert "authorization" not in remote.request(Blob("m", "m", 1, "tag")).headers
