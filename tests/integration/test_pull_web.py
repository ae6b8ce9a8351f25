"""Pulling from HTTP servers: ranges, TLS both ways, logins, redirections, archives."""

from __future__ import annotations

import io
import json
import os
import ssl
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Pulled, Puller, StorageConfig
from mmcore.storage.transfer import PullLimits
from tests.stores import Proxy, Site, cut_after

pytestmark = pytest.mark.slow

LIMITS = PullLimits(connect_s=2, silence_s=20, tries=3, pause_s=0.01, total_s=60)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    made = Puller(StorageConfig(None), DiskCache(tmp_path / "cache", 10**9), limits=LIMITS)
    yield made
    made.close()


def pull(puller: Puller, uri: str, **params: str) -> Pulled:
    return puller.pull(ModelInfo("", uri, json.dumps({"storage_params": params})))


def tree(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_file_comes_and_is_asked_for_again_only_when_it_changed(site: Site, puller: Puller) -> None:
    site.files["/m/a b.onnx"] = b"one"
    first = pull(puller, f"{site.url}/m/a%20b.onnx")
    assert tree(first.path) == {"a b.onnx": b"one"}
    site.requests.clear()
    assert pull(puller, f"{site.url}/m/a%20b.onnx").path == first.path
    assert [headers["range"] for _, _, headers in site.requests] == ["bytes=0-0"]
    site.files["/m/a b.onnx"] = b"two"
    assert tree(pull(puller, f"{site.url}/m/a%20b.onnx").path) == {"a b.onnx": b"two"}


def test_large_file_comes_in_ranges_and_a_broken_one_is_taken_up(site: Site, puller: Puller) -> None:
    body = os.urandom(17 * 2**20)
    site.files["/big.onnx"] = body
    proxy = Proxy(site.url.removeprefix("http://"), lambda line: line.startswith("GET"))
    try:
        proxy.faults = [cut_after(1), cut_after(100_000), cut_after(100_000)]
        assert tree(pull(puller, f"{proxy.address}/big.onnx").path) == {"big.onnx": body}
        assert puller.received_bytes == len(body)
    finally:
        proxy.close()


def test_server_without_ranges_or_validators_is_asked_for_all_of_it_each_time(site: Site, puller: Puller) -> None:
    site.ranges = site.validators = False
    body = site.files["/big.onnx"] = os.urandom(17 * 2**20)
    proxy = Proxy(site.url.removeprefix("http://"))
    try:
        proxy.faults = [cut_after(1), cut_after(500_000)]
        assert tree(pull(puller, f"{proxy.address}/big.onnx").path) == {"big.onnx": body}
        assert tree(pull(puller, f"{proxy.address}/big.onnx").path) == {"big.onnx": body}
    finally:
        proxy.close()
    assert puller.received_bytes == 2 * len(body)


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer T0KEN"}, {"Authorization": ["Bearer T0KEN"]}])
def test_headers_of_the_entry_are_sent(site: Site, tmp_path: Path, headers: dict[str, Any]) -> None:
    site.login = "Bearer T0KEN"
    site.files["/base/m.onnx"] = b"x"
    (tmp_path / "config").mkdir()
    entry = {"type": "http", "url": f"{site.url}/base?sig=S1G", "headers": headers}
    (tmp_path / "config/site").write_text(json.dumps(entry))
    puller = Puller(StorageConfig(tmp_path / "config"), DiskCache(tmp_path / "cache", 10**9), limits=LIMITS)
    info = ModelInfo("", "m.onnx", json.dumps({"storage_key": "site"}))
    assert tree(puller.pull(info).path) == {"m.onnx": b"x"}
    assert {path for _, path, _ in site.requests} == {"/base/m.onnx?sig=S1G"}
    site.login = "another"
    with pytest.raises(LoadFailed, match="refuses the credentials") as raised:
        puller.pull(info)
    assert "T0KEN" not in str(raised.value)
    assert "S1G" not in str(raised.value)
    puller.close()


def test_login_in_a_url_is_used_and_not_shown(site: Site, puller: Puller) -> None:
    site.login = "Basic dXNlcjpwYXNz"
    site.files["/m.onnx"] = b"x"
    uri = site.url.replace("http://", "http://user:pass@")
    assert tree(pull(puller, f"{uri}/m.onnx").path) == {"m.onnx": b"x"}
    with pytest.raises(LoadFailed, match="does not exist") as raised:
        pull(puller, f"{uri}/other.onnx")
    assert "pass" not in str(raised.value)


def test_redirection_is_followed_without_our_headers(site: Site, puller: Puller) -> None:
    other = Site()
    try:
        other.files["/real"] = b"x"
        site.redirects["/m.onnx"] = f"{other.url}/real"
        assert tree(pull(puller, f"{site.url}/m.onnx", **{"headers.X-Secret": "T0KEN"}).path) == {"m.onnx": b"x"}
        assert all("x-secret" not in headers for _, _, headers in other.requests)
        assert all(headers["x-secret"] == "T0KEN" for _, _, headers in site.requests)
        site.redirects["/m.onnx"] = "/m.onnx"
        with pytest.raises(LoadFailed, match="redirects again and again"):
            pull(puller, f"{site.url}/m.onnx")
    finally:
        other.close()


def test_tls_with_a_ca_of_its_own_and_client_certificates(puller: Puller, tmp_path: Path) -> None:
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    client = ca.issue_cert("client")
    trust = ca.cert_pem.bytes().decode()
    certificate = b"".join(one.bytes() for one in client.cert_chain_pems).decode()
    key = client.private_key_pem.bytes().decode()
    site = Site(context)
    try:
        site.files["/m.onnx"] = b"x"
        uri = f"{site.url}/m.onnx"
        known = {"certificate": trust, "client_certificate": certificate, "client_key": key}
        assert tree(pull(puller, uri, **known).path) == {"m.onnx": b"x"}
        with pytest.raises(LoadFailed, match=r"certificate is not trusted.*give its CA as 'certificate'"):
            pull(puller, uri)
        with pytest.raises(LoadFailed, match="tried 3 times"):
            pull(puller, uri, certificate=trust)
        with pytest.raises(LoadFailed, match="go together"):
            pull(puller, uri, client_key=key)
        with pytest.raises(LoadFailed, match="not in PEM form") as raised:
            pull(puller, uri, certificate="no", client_certificate=certificate, client_key="K3Y")
        assert "K3Y" not in repr(raised.value)
    finally:
        site.close()


def test_missing_file_and_missing_server_are_named(site: Site, puller: Puller) -> None:
    with pytest.raises(LoadFailed, match=rf"{site.url}/no.onnx does not exist \(HTTP 404\)"):
        pull(puller, f"{site.url}/no.onnx")
    with pytest.raises(LoadFailed, match=r"the connection failed.*refused.*tried 3 times"):
        pull(puller, "http://127.0.0.1:1/m.onnx")


def test_archive_is_unpacked_and_a_harmful_one_leaves_nothing(site: Site, puller: Puller, tmp_path: Path) -> None:
    def packed(name: str) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        return stream.getvalue()

    site.files["/good.tar.gz"] = packed("1/model.onnx")
    site.files["/bad.tar.gz"] = packed("../../evil")
    assert tree(pull(puller, f"{site.url}/good.tar.gz").path) == {"1/model.onnx": b"x"}
    with pytest.raises(LoadFailed, match=r"bad.tar.gz: '../../evil' is no path inside the archive"):
        pull(puller, f"{site.url}/bad.tar.gz")
    assert not list(tmp_path.rglob("evil"))
    assert puller.cache.used_bytes == 1
