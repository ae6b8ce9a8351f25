"""The options for TLS that serving commands share, and what they say together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mmcore.cli.parameters import AUTHORITIES, FILE, option
from mmcore.config import RuntimeSettings, TlsFiles

_Command = Callable[..., Any]


def tls_options(ports: str, callers: str) -> Callable[[_Command], _Command]:
    """``--tls-cert``, ``--tls-key`` and ``--tls-client-ca`` of these ports, for those who call there."""
    taken = f"Take only {callers} whose certificate this authority, or one of *.crt in this folder, has signed."

    def add(command: _Command) -> _Command:
        command = option("--tls-client-ca", type=AUTHORITIES, help=taken)(command)
        command = option("--tls-key", type=FILE, help="Its key. Both are read again when they change.")(command)
        return option("--tls-cert", type=FILE, help=f"PEM certificate, with its chain, of {ports}.")(command)

    return add


def runtime_tls_options(flag: str, runtime: str) -> Callable[[_Command], _Command]:
    """Those for TLS with the runtime that the option ``flag`` has the address of."""

    def add(command: _Command) -> _Command:
        command = option(f"{flag}-key", type=FILE, show_default="--tls-key", help="Its key.")(command)
        command = option(
            f"{flag}-cert", type=FILE, show_default="--tls-cert", help="PEM certificate that it is shown then."
        )(command)
        reach = f"Reach {runtime} over TLS; this has signed its certificate."
        return option(f"{flag}-ca", type=FILE, help=reach)(command)

    return add


def runtime_settings(
    flag: str,
    address: str | None,
    files: tuple[Path | None, Path | None, Path | None],
    own: TlsFiles | None,
    capacity_bytes: int | None,
) -> RuntimeSettings | None:
    """What the option ``flag`` and those for its TLS (authority, certificate, key) say of a runtime.

    ``own`` is what is shown to it where it has no certificate of its own.

    Raises:
        click.UsageError: they do not fit each other.
    """
    ca, certificate, key = files
    if (certificate is None) != (key is None):
        raise click.UsageError(f"{flag}-cert and {flag}-key need each other")
    if ca is None and certificate is not None:
        raise click.UsageError(f"{flag}-cert is for TLS, which {flag}-ca asks for")
    if address is None:
        if ca is not None:
            raise click.UsageError(f"{flag}-ca is for a {flag}")
        return None
    if certificate is not None and key is not None:
        own = TlsFiles(certificate, key)
    elif own is not None:
        own = TlsFiles(own.certificate, own.key)
    return RuntimeSettings(address, capacity_bytes, ca, own)


def tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """What the options for TLS say; None for plain text.

    Raises:
        click.UsageError: one goes without another.
    """
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is not None or key is not None or client_ca is not None:
        raise click.UsageError("TLS needs both --tls-cert and --tls-key")
    return None
