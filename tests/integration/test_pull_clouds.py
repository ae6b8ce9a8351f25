"""Pulling from Google's and Azure's stores: an emulator of the first, and small sites that ask for their logins."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import create_server

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Pulled, Puller, StorageConfig
from mmcore.storage.azure import AzureRemote
from mmcore.storage.places import Place
from mmcore.storage.remote import Blob
from mmcore.storage.transfer import PullLimits
from tests.serving import command, environment
from tests.stores import BUCKET, Site

pytestmark = pytest.mark.slow

LIMITS = PullLimits(connect_s=2, silence_s=20, tries=2, pause_s=0.01, total_s=60)


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    made = Puller(StorageConfig(None, own_parameters=True), DiskCache(tmp_path / "cache", 10**9), limits=LIMITS)
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


def asked(site: Site, path: str) -> str:
    """The body of the last request for a path."""
    return next(
        body for (_, asked, _), body in reversed([*zip(site.requests, site.bodies, strict=True)]) if asked == path
    )


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


@pytest.fixture
def bucket(site: Site) -> dict[str, str]:
    """A bucket that wants a token, with one model; its parameters."""
    listed = {"name": "m/model.onnx", "size": "5", "generation": "7"}
    site.files = {
        f"/storage/v1/b/{BUCKET}/o": json.dumps({"items": [listed]}).encode(),
        f"/download/storage/v1/b/{BUCKET}/o/m/model.onnx": b"model",
    }
    site.login = "Bearer T0KEN"
    return {"type": "gcs", "bucket": BUCKET, "endpoint_url": site.url, "credentials": "default"}


def test_gcs_default_credentials_are_a_key_in_a_file(
    site: Site, bucket: dict[str, str], puller: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/token"] = b'{"access_token": "T0KEN", "expires_in": 3600}'
    site.open = {"/token"}
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    told = {"type": "service_account", "private_key": key.decode(), "client_email": "me@x"}
    (tmp_path / "key.json").write_text(json.dumps({**told, "token_uri": f"{site.url}/token"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "no.json"))
    with pytest.raises(LoadFailed, match=r"gs://models: no default credentials: .*no.json was not found"):
        pull(puller, "m", **bucket)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    assert tree(pull(puller, "m", **bucket).path) == {"model.onnx": b"model"}
    with pytest.raises(LoadFailed, match="'credentials' must be 'default'"):
        pull(puller, "m", **{**bucket, "credentials": "mine"})


def test_gcs_default_credentials_are_those_of_a_federated_workload(
    site: Site, bucket: dict[str, str], puller: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "urn:ietf:params:oauth:token-type:"
    answer = {"access_token": "FEDERATED", "issued_token_type": f"{kind}access_token", "token_type": "Bearer"}
    account = "/v1/projects/-/serviceAccounts/me@x:generateAccessToken"
    site.files["/sts"] = json.dumps({**answer, "expires_in": 3600}).encode()
    site.files[account] = b'{"accessToken": "T0KEN", "expireTime": "2100-01-01T00:00:00Z"}'
    site.open = {"/sts", account}
    (tmp_path / "token").write_text("a.token.of-the-cluster")
    told = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/pool/providers/mine",
        "subject_token_type": f"{kind}jwt",
        "token_url": f"{site.url}/sts",
        "service_account_impersonation_url": site.url + account,
        "credential_source": {"file": str(tmp_path / "token")},
    }
    (tmp_path / "federation.json").write_text(json.dumps(told))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "federation.json"))
    assert tree(pull(puller, "m", **bucket).path) == {"model.onnx": b"model"}
    assert "subject_token=a.token.of-the-cluster" in asked(site, "/sts")
    del site.files["/sts"]
    with pytest.raises(LoadFailed, match="the token's server refuses the default credentials"):
        pull(puller, "m", **{**bucket, "schema_of": "another connection"})


def test_gcs_default_credentials_are_those_of_the_machine(site: Site, bucket: dict[str, str], tmp_path: Path) -> None:
    machine = Site()
    machine.headers["metadata-flavor"] = "Google"
    account = {"email": "me@x", "scopes": ["https://www.googleapis.com/auth/devstorage.read_only"], "aliases": []}
    machine.files = {
        "/": b"",
        "/computeMetadata/v1/project/project-id": b"project",
        "/computeMetadata/v1/universe/universe-domain": b"googleapis.com",
        "/computeMetadata/v1/instance/service-accounts/default/": json.dumps(account).encode(),
        "/computeMetadata/v1/instance/service-accounts/me@x/token": b'{"access_token": "T0KEN", "expires_in": 3600}',
        "/computeMetadata/v1/instance/service-accounts/default/token": b'{"access_token": "T0KEN", "expires_in": 3600}',
    }
    params = [word for name, value in bucket.items() for word in ("--param", f"{name}={value}")]
    host = machine.url.removeprefix("http://")
    # A process of its own, and a home without anybody's login: the library looks where the machine is but once.
    env = {name: value for name, value in environment(HOME=str(tmp_path)).items() if "GOOGLE" not in name}
    addresses = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "CLOUDSDK_CONFIG": str(tmp_path)}
    done = subprocess.run(
        command("pull", "--path", "m", *params, tmp_path / "dest"),
        capture_output=True, text=True, check=False, timeout=60, env={**env, **addresses},
    )  # fmt: skip
    machine.close()
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "dest") == {"model.onnx": b"model"}
    assert all(headers.get("metadata-flavor") == "Google" for _, _, headers in machine.requests)


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


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def azure(ca: trustme.CA) -> Iterator[Site]:
    """An account and the login of a tenant, at one address: tokens are sent and made over TLS alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    made = Site(context)
    tenant = "/tenant/v2.0/.well-known/openid-configuration"
    token = "/tenant/oauth2/v2.0/token"
    made.files = {
        f"/{BUCKET}": azure_listing({"m/model.onnx": b"model"}),
        f"/{BUCKET}/m/model.onnx": b"model",
        token: json.dumps({"access_token": "T0KEN", "expires_in": 3600, "token_type": "Bearer"}).encode(),
        tenant: json.dumps({
            "issuer": f"{made.url}/tenant/v2.0",
            "token_endpoint": made.url + token,
            "authorization_endpoint": f"{made.url}/tenant/oauth2/v2.0/authorize",
        }).encode(),
    }  # fmt: skip
    made.login, made.open = "Bearer T0KEN", {tenant, token}
    yield made
    made.close()


def account(azure: Site, ca: trustme.CA, **params: str) -> dict[str, str]:
    """The parameters of the account, and how its login is reached."""
    certificate = ca.cert_pem.bytes().decode()
    return {
        "type": "azure", "account_name": "acct", "container": BUCKET, "endpoint_url": azure.url,
        "authority_host": azure.url, "certificate": certificate, **params,
    }  # fmt: skip


def test_azure_service_principal_gets_a_token_from_its_login(azure: Site, ca: trustme.CA, puller: Puller) -> None:
    secrets = {"client_id": "me", "client_secret": "S3CRET", "tenant_id": "tenant"}
    assert tree(pull(puller, "m", **account(azure, ca, **secrets)).path) == {"model.onnx": b"model"}
    assert "client_secret=S3CRET" in asked(azure, "/tenant/oauth2/v2.0/token")
    azure.files["/tenant/oauth2/v2.0/token"] = b'{"error": "invalid_client", "error_description": "S3CRET is wrong"}'
    with pytest.raises(LoadFailed, match="the store refuses the credentials") as raised:
        pull(puller, "m", **account(azure, ca, **{**secrets, "client_id": "another"}))
    assert "S3CRET" not in repr(raised.value)
    with pytest.raises(LoadFailed, match="client_id, client_secret, tenant_id go together"):
        pull(puller, "m", **account(azure, ca, client_id="me", client_secret="S3CRET"))


@pytest.mark.parametrize("credentials", ["workload-identity", "default"])
def test_azure_workload_identity_shows_the_token_of_its_pod(
    azure: Site, ca: trustme.CA, puller: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: str
) -> None:
    with pytest.raises(LoadFailed, match=r"is missing|refuses the credentials"):
        pull(puller, "m", **account(azure, ca, credentials="workload-identity"))
    (tmp_path / "token").write_text("a.token.of-the-cluster")
    monkeypatch.setenv("AZURE_TENANT_ID", "tenant")
    monkeypatch.setenv("AZURE_CLIENT_ID", "me")
    # The default ones are told in this way alone.
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", azure.url)
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(tmp_path / "token"))
    assert tree(pull(puller, "m", **account(azure, ca, credentials=credentials)).path) == {"model.onnx": b"model"}
    assert "client_assertion=a.token.of-the-cluster" in asked(azure, "/tenant/oauth2/v2.0/token")
    assert "client_id=me" in asked(azure, "/tenant/oauth2/v2.0/token")


@pytest.mark.parametrize("credentials", ["managed-identity", "default"])
def test_azure_managed_identity_gets_a_token_from_its_machine(
    azure: Site, ca: trustme.CA, site: Site, puller: Puller, monkeypatch: pytest.MonkeyPatch, credentials: str
) -> None:
    token = {"access_token": "T0KEN", "expires_in": "3600", "expires_on": "4102444800", "token_type": "Bearer"}
    site.files["/metadata/identity/oauth2/token"] = json.dumps(token).encode()
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", site.url)
    stated = account(azure, ca, credentials=credentials, client_id="mine")
    assert tree(pull(puller, "m", **stated).path) == {"model.onnx": b"model"}
    _, path, headers = site.requests[-1]
    assert headers["metadata"] == "true"
    assert "client_id=mine" in path
    assert "resource=https://storage.azure.com" in unquote(path)
    assert "T0KEN" not in repr(puller)


def test_azure_credentials_must_be_known(azure: Site, ca: trustme.CA, puller: Puller) -> None:
    with pytest.raises(LoadFailed, match="must be one of default, managed-identity, workload-identity"):
        pull(puller, "m", **account(azure, ca, credentials="mine"))


def test_azure_public_container_needs_nothing() -> None:
    remote = AzureRemote(Place("azure", "m", None, {"account_name": "acct", "container": BUCKET}), LIMITS)
    assert "authorization" not in remote.request(Blob("m", "m", 1, "tag")).headers
