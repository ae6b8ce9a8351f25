"""Where an etcd is and who may use it: read from ``--registry`` or from the JSON file that ModelMesh Serving mounts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: Keys are put under this where nothing else is said.
DEFAULT_PREFIX: Final = "mmcore"
DEFAULT_PORT: Final = 2379

_URL: Final = re.compile(r"(etcds?)://([^/?#@]+)(/[^?#]*)?")
#: What the connection file may hold; with ``_file``, the name of a file beside it, which counts before the text itself.
_TEXTS: Final = ("certificate", "client_key", "client_certificate")
_FIELDS: Final = frozenset(
    (
        "endpoints",
        "userid",
        "password",
        "root_prefix",
        "override_authority",
        *_TEXTS,
        *(f"{one}_file" for one in _TEXTS),
    )
)


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """How to reach an etcd.

    Attributes:
        endpoints: ``host:port`` of its members, in the order in which they are tried.
        prefix: first part of all keys, without slashes around it.
        tls: whether connections are encrypted.
        certificate: PEM text of the authorities to trust; None for the common ones.
        client_key, client_certificate: PEM texts that show who we are.
        user, password: with which a token is asked for.
        authority: the name that the server's certificate must have, where it is not the endpoint's.
        files: what it was read from.
    """

    endpoints: tuple[str, ...]
    prefix: str = DEFAULT_PREFIX
    tls: bool = False
    certificate: bytes | None = None
    client_key: bytes | None = field(default=None, repr=False)
    client_certificate: bytes | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    authority: str = ""
    files: tuple[Path, ...] = field(default=(), compare=False)


def parse_address(url: str) -> EtcdAddress:
    """``etcd://host:port[,host:port]/prefix``, ``etcds://`` with TLS, or ``etcd:FILE`` with a connection file.

    Raises:
        ValueError: the text is none of these, or the file does not say what it must; the text tells.
    """
    if (match := _URL.fullmatch(url)) is not None:
        scheme, hosts, prefix = match.groups()
        return EtcdAddress(_endpoints(hosts.split(",")), _prefix(prefix), tls=scheme == "etcds")
    if (file := connection_file(url)) is not None:
        return read_connection(file)
    raise ValueError(f"{url!r} is not an address of etcd; write etcd://host:port[,host:port]/prefix or etcd:FILE")


def connection_file(url: str) -> Path | None:
    """The file that ``etcd:FILE`` names; None for another text."""
    if url.startswith("etcd:") and not url.startswith("etcd://") and url != "etcd:":
        return Path(url.removeprefix("etcd:"))
    return None


def read_connection(file: Path) -> EtcdAddress:
    """The address in a connection file, a JSON object (ModelMesh Serving, secret ``model-serving-etcd``).

    TLS is on if the first endpoint starts with ``https://`` or a certificate is given.

    Raises:
        ValueError: it cannot be read, or does not say what it must.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"etcd connection file {file}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"etcd connection file {file}: expected a JSON object of texts")
    if unknown := sorted(content.keys() - _FIELDS):
        raise ValueError(
            f"etcd connection file {file}: unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}"
        )
    if not content.get("endpoints"):
        raise ValueError(f"etcd connection file {file}: 'endpoints' is missing")
    certificate, client_key, client_certificate = (_pem(content, name, file) for name in _TEXTS)
    if (client_key is None) != (client_certificate is None):
        raise ValueError(f"etcd connection file {file}: client_key and client_certificate come together")
    urls = [one.strip() for one in content["endpoints"].split(",")]
    return EtcdAddress(
        _endpoints([one.removeprefix("https://").removeprefix("http://").rstrip("/") for one in urls]),
        _prefix(content.get("root_prefix")),
        tls=urls[0].startswith("https://") or certificate is not None or client_certificate is not None,
        certificate=certificate,
        client_key=client_key,
        client_certificate=client_certificate,
        user=content.get("userid", ""),
        password=content.get("password", ""),
        authority=content.get("override_authority", ""),
        files=(file, *(file.parent / content[name] for one in _TEXTS if content.get(name := f"{one}_file"))),
    )


def _endpoints(hosts: list[str]) -> tuple[str, ...]:
    endpoints = []
    for one in hosts:
        host = one.strip()
        if not host:
            raise ValueError("an etcd endpoint is empty")
        has_port = re.search(r":\d+$", host) is not None and (host.count(":") == 1 or "]" in host)
        endpoints.append(host if has_port else f"{host}:{DEFAULT_PORT}")
    return tuple(endpoints)


def _prefix(text: str | None) -> str:
    return (text or "").strip("/") or DEFAULT_PREFIX


def _pem(content: dict[str, str], name: str, file: Path) -> bytes | None:
    if path := content.get(f"{name}_file"):
        try:
            return (file.parent / path).read_bytes()
        except OSError as error:
            raise ValueError(f"etcd connection file {file}: {name}_file: {error}") from None
    text = content.get(name)
    return text.encode() if text else None
