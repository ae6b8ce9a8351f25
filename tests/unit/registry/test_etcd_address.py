"""Addresses of etcd: URLs, and the connection file of ModelMesh Serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcore.registry.etcd_address import EtcdAddress, parse_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("etcd://h:1/p", EtcdAddress(("h:1",), "p")),
        ("etcd://h", EtcdAddress(("h:2379",), "mmcore")),
        ("etcd://h1:1,h2,[::1]:3,[::1]/a/b/", EtcdAddress(("h1:1", "h2:2379", "[::1]:3", "[::1]:2379"), "a/b")),
        ("etcds://h:1/p", EtcdAddress(("h:1",), "p", tls=True)),
    ],
)
def test_urls(url: str, address: EtcdAddress) -> None:
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "url", ["etcd://", "etcd:", "etcd:///p", "etcd://h:1,/p", "etcd://u:p@h:1/p", "etcd://h/p?x=1"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match="etcd"):
        parse_address(url)


def write(folder: Path, content: object) -> str:
    file = folder / "etcd_connection"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"etcd:{file}"


def test_the_quickstart_connection_file(tmp_path: Path) -> None:
    content = {"endpoints": "http://etcd.ns:2379", "root_prefix": "modelmesh-serving"}
    assert parse_address(write(tmp_path, content)) == EtcdAddress(("etcd.ns:2379",), "modelmesh-serving")


def test_all_of_a_connection_file_and_files_before_texts(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("CA FILE")
    (tmp_path / "key").write_text("KEY FILE")
    content = {
        "endpoints": "https://a:1, https://b:2/",
        "userid": "root",
        "password": "secret",
        "root_prefix": "/top/mm_ns/ns/",
        "certificate": "CA TEXT",
        "certificate_file": "ca.crt",
        "client_key_file": str(tmp_path / "key"),
        "client_certificate": "CERTIFICATE TEXT",
        "override_authority": "etcd.example",
    }
    address = parse_address(write(tmp_path, content))
    assert address == EtcdAddress(
        ("a:1", "b:2"),
        "top/mm_ns/ns",
        tls=True,
        certificate=b"CA FILE",
        client_key=b"KEY FILE",
        client_certificate=b"CERTIFICATE TEXT",
        user="root",
        password="secret",
        authority="etcd.example",
    )
    assert "secret" not in repr(address)
    assert "KEY FILE" not in repr(address)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "etcd_connection: Expecting"),
        ([], "expected a JSON object of texts"),
        ({"endpoints": ["h:1"]}, "expected a JSON object of texts"),
        ({}, "'endpoints' is missing"),
        ({"endpoints": "h:1", "user": "x"}, "unknown field 'user'; known are certificate, "),
        ({"endpoints": "h:1", "client_key": "k"}, "client_key and client_certificate come together"),
        ({"endpoints": "h:1", "certificate_file": "none"}, "certificate_file: .*No such file"),
        ({"endpoints": "h:1,,h:2"}, "an etcd endpoint is empty"),
    ],
)
def test_what_a_connection_file_must_say(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_address(write(tmp_path, content))


def test_a_connection_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        parse_address(f"etcd:{tmp_path}/none")
