"""Certificates for tests: an authority, and servers and clients that it has signed; made by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

#: Keys, as the command is told of them.
ELLIPTIC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
RSA = ("-newkey", "rsa:2048")


@dataclass(frozen=True, slots=True)
class Signed:
    """Files of a certificate and its key, PEM."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of its own.

    Attributes:
        certificate: the file to trust.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.certificate = folder / "ca.pem"
        self._key = folder / "ca.key"
        _openssl(
            "req", "-x509", *ELLIPTIC, "-nodes", "-days", "2",
            "-subj", "/CN=test authority", "-keyout", self._key, "-out", self.certificate,
        )  # fmt: skip

    def sign(self, name: str, *alternatives: str, key: tuple[str, ...] = ELLIPTIC) -> Signed:
        """A certificate for ``name``, good for the alternatives (``DNS:…``, ``IP:…``) too."""
        signed = Signed(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request = self._folder / f"{name}.csr"
        _openssl("req", *key, "-nodes", "-subj", f"/CN={name}", "-keyout", signed.key, "-out", request)
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={','.join((f'DNS:{name}', *alternatives))}\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
            "-days", "2", "-extfile", extensions, "-out", signed.certificate,
        )  # fmt: skip
        return signed


def self_signed(folder: Path, name: str) -> Signed:
    """A certificate for ``name`` that nobody else has signed."""
    signed = Signed(folder / f"{name}.self.pem", folder / f"{name}.self.key")
    _openssl(
        "req", "-x509", *ELLIPTIC, "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
        "-keyout", signed.key, "-out", signed.certificate,
    )  # fmt: skip
    return signed


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
