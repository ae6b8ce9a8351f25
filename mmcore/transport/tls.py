"""TLS for listeners and channels, from files that are read again when they have changed.

Each handshake looks whether the files are still those that were read: three calls of the system, and a certificate
that was renewed counts from the next connection on. Files that cannot be read, or do not fit each other while they are
being replaced, leave what was there in force.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mmcore.config import TlsFiles
from mmcore.errors import InvalidSetting
from mmcore.file_stamp import file_stamp

log = logging.getLogger(__name__)

#: Of a folder of authorities, the files that count: what a mounted secret calls its certificates.
_AUTHORITIES: Final = "*.crt"

#: What a listener offers by ALPN (RFC 7301): gRPC's, and REST's.
HTTP_2: Final = ("h2",)
HTTP_1: Final = ("http/1.1",)


class _Kept:
    """A context, made anew when a file behind it has changed."""

    def __init__(self, files: Sequence[Path], make: Callable[[], ssl.SSLContext]) -> None:
        self._files = files
        self._make = make
        self._stamps = self._look()
        try:
            self._context = make()
        except (OSError, ValueError) as error:
            raise InvalidSetting(f"TLS: {self._named(error)}") from None

    def __call__(self) -> ssl.SSLContext:
        stamps = self._look()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._context = self._make()
            except (OSError, ValueError) as error:
                log.error("TLS: %s; what was read before stays in force", self._named(error))
            else:
                log.info("TLS: read again: %s", ", ".join(map(str, self._files)))
        return self._context

    def _look(self) -> list[tuple[int, int, int, int] | None]:
        files = [one for file in self._files for one in (file, *sorted(file.glob(_AUTHORITIES)))]
        return [file_stamp(file) for file in files]

    def _named(self, error: Exception) -> str:
        """OpenSSL does not say which file it stumbled over."""
        return f"{', '.join(map(str, self._files))}: {error}"


def server_context(files: TlsFiles, protocols: Sequence[str] = HTTP_2) -> ssl.SSLContext:
    """A listener's context; with ``files.client_ca`` it takes only clients with a certificate signed by that.

    Raises:
        InvalidSetting: a file cannot be read, or key and certificate do not belong together.
    """

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A session taken up again would pass by a certificate that was withdrawn; connections are few and last.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
        if files.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            _trust(context, files.client_ca)
        context.set_alpn_protocols(list(protocols))
        return context

    current = _Kept(_existing(files), make)
    context = current()

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = current()

    # Called in each handshake, whether or not the client names a server.
    context.sni_callback = choose
    return context


def client_context(ca: Path | None, files: TlsFiles | None = None) -> Callable[[], ssl.SSLContext]:
    """What gives a channel its context: servers signed by ``ca`` (None: whom the system trusts), with their names
    checked; ``files`` hold the client's own certificate.

    Raises:
        InvalidSetting: as above.
    """

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if files is not None:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        return context

    return _Kept([*([ca] if ca else []), *(_existing(files) if files else [])], make)


def peer_context(ca: Path, files: TlsFiles) -> Callable[[], ssl.SSLContext]:
    """What gives the channels between instances their context: whoever ``ca`` has signed is an instance.

    Names are not checked, since instances know each other by addresses that come and go.

    Raises:
        InvalidSetting: as above.
    """

    def make() -> ssl.SSLContext:
        context = _peer()
        _trust(context, ca)
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
        return context

    return _Kept([ca, files.certificate, files.key], make)


def peer_context_of(certificate: bytes, key: bytes, authorities: bytes) -> ssl.SSLContext:
    """The same of what the files would hold, PEM, for one who is told it; nothing of it comes to a disk.

    Raises:
        InvalidSetting: as above.
    """
    context = _peer()
    descriptor = os.memfd_create("tls")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(certificate + b"\n" + key)
        # OpenSSL reads keys from files alone.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_no_password)
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"TLS: {error}") from None
    finally:
        os.close(descriptor)
    return context


def _peer() -> ssl.SSLContext:
    """What instances and those who manage them have in common; it trusts nobody yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _trust(context: ssl.SSLContext, authorities: Path) -> None:
    """Trust whom a file's certificates have signed, or those in a folder's ``*.crt``, and these themselves."""
    found = sorted(authorities.glob(_AUTHORITIES)) if authorities.is_dir() else [authorities]
    if not found:
        raise ValueError(f"no {_AUTHORITIES} in {authorities}")
    for file in found:
        context.load_verify_locations(file)
    # A certificate that another has signed is trusted without that one too, as Java's trust stores do.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _existing(files: TlsFiles) -> list[Path]:
    return [file for file in (files.certificate, files.key, files.client_ca) if file is not None]


def _no_password() -> str:
    """In place of a prompt on the terminal."""
    raise ValueError("the key is encrypted; a server needs one without a password")
