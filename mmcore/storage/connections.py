"""HTTP connections to stores on urllib3: pooled, with the store's own trust and client certificates.

A body is handed on as it arrives, so that whoever reads it can look at the clock between any two pieces.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from mmcore.errors import LoadFailed
from mmcore.storage.cancellation import ended_by
from mmcore.storage.remote import Interrupted, Request, refusal

CHUNK_BYTES: Final = 2**20
#: Of the body of an error so much is read, to find the store's code in it.
_ERROR_BYTES: Final = 4096
#: Connections kept for each host: as many as any download uses at once.
_KEPT: Final = 32
_REDIRECTIONS: Final = 5


class Answer:
    """The answer to a GET.

    Attributes:
        headers: its headers, names in lower case.
        ranged: whether it has the bytes asked for alone.
        size: bytes of the whole object, None where the answer does not tell.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse, start: int, stop: int | None, what: str) -> None:
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self.ranged = response.status == 206
        self._response = response
        self._what = what
        self._skip, self.size = _place(response.status, self.headers, start, what)
        self._left = None if stop is None else stop - start

    def end(self) -> None:
        """From another thread: let no read of the body wait any longer; what it still gives may not be the body's."""
        # It raises where the connection has just been given back, or was never one of a socket.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.shutdown()

    def chunks(self) -> Iterator[bytes]:
        """The bytes asked for, as they arrive and no more of them than that; fewer when the answer is short.

        Raises:
            Interrupted: the connection broke, or was silent for too long.
        """
        while self._left is None or self._left > 0:
            with _translated(self._what):
                chunk = self._response.read1(CHUNK_BYTES)
            if not chunk:
                return
            if self._skip:
                passed = min(self._skip, len(chunk))
                self._skip -= passed
                chunk = chunk[passed:]
            if self._left is not None:
                chunk = chunk[: self._left]
                self._left -= len(chunk)
            yield chunk


def _place(status: int, headers: Mapping[str, str], start: int, what: str) -> tuple[int, int | None]:
    """How many bytes of the body are to be passed over to be at ``start``, and the size of the whole object."""
    length = headers.get("content-length")
    stated = headers.get("content-range")
    if status != 206 and stated is None:
        # The whole object: the server knows no ranges.
        return start, int(length) if length and length.isdigit() else None
    unit, _, rest = (stated or "").partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) > start:
        raise LoadFailed(f"{what}: the store answers another range than the one asked for")
    return start - int(first), int(total) if total.isdigit() else None


class _Ending(HTTPConnection):
    """A connection on which nobody waits for an answer whose work is to end."""

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 does itself
        with ended_by(self._end):
            return super().getresponse()

    def _end(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


class _EndingTls(_Ending, HTTPSConnection):
    """The same with TLS."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Ending


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _EndingTls


ManagerT = TypeVar("ManagerT", bound=urllib3.PoolManager)


def _ending(manager: ManagerT) -> ManagerT:
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


class Connections:
    """The connections to one store, for any number of threads.

    ``ca`` is a bundle of certificates to trust instead of the system's, ``certificate`` and ``private_key`` say who we
    are; all in PEM. ``connect_s`` is how long a connection may take, ``silence_s`` how long a store may say nothing.

    Raises:
        LoadFailed: a certificate or key is none.
    """

    def __init__(
        self,
        *,
        connect_s: float,
        silence_s: float,
        ca: str | None = None,
        certificate: str | None = None,
        private_key: str | None = None,
    ) -> None:
        self._timeout = urllib3.Timeout(connect=connect_s, read=silence_s)
        self._context = _context(ca, certificate, private_key)
        self._direct = _ending(urllib3.PoolManager(maxsize=_KEPT, ssl_context=self._context))
        self._proxies = getproxies()
        self._proxied: dict[str, urllib3.ProxyManager] = {}

    @contextmanager
    def get(self, request: Request, what: str, *, start: int = 0, stop: int | None = None) -> Iterator[Answer]:
        """Ask for the bytes from ``start`` up to ``stop``, or all from there; ``what`` names the object in errors.

        The body is read within the context; what is left of it is given up.

        Raises:
            LoadFailed: the store will not give it; the text tells the cause.
            Interrupted: the same request may succeed later.
            Changed: the object is not the one asked for any more.
        """
        headers = {"accept-encoding": "identity", **request.headers}
        if start or stop is not None:
            headers["range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self._send(request.url, headers, what, follow=request.follow)
        whole = False
        try:
            if response.status >= 300:
                with _translated(what):
                    text = response.read(_ERROR_BYTES).decode("utf-8", "replace")
                raise refusal(response.status, text, what)
            yield Answer(response, start, stop, what)
            whole = not response.length_remaining
        finally:
            if whole:
                response.release_conn()
            else:
                response.close()

    def _send(self, url: str, headers: dict[str, str], what: str, *, follow: bool) -> urllib3.BaseHTTPResponse:
        """The answer's head, after redirections where these are followed; another site does not get our headers."""
        for _ in range(_REDIRECTIONS):
            with _translated(what):
                response = self._pool(url).request(
                    "GET", url, headers=headers, timeout=self._timeout,
                    retries=False, redirect=False, preload_content=False, decode_content=False,
                )  # fmt: skip
            target = response.headers.get("location")
            if not follow or target is None or response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            before, url = url, urljoin(url, target)
            if urlsplit(before)[:2] != urlsplit(url)[:2]:
                headers = {name: value for name, value in headers.items() if name in ("accept-encoding", "range")}
        raise LoadFailed(f"{what}: the store redirects again and again")

    def read(self, request: Request, what: str, limit: int) -> bytes:
        """The whole body of a small answer; raises as :meth:`get` does, LoadFailed when it is above ``limit``."""
        body = bytearray()
        with self.get(request, what) as answer, ended_by(answer.end):
            for chunk in answer.chunks():
                body += chunk
                if len(body) > limit:
                    raise LoadFailed(f"{what}: the store answers with more than {limit} bytes")
        return bytes(body)

    @property
    def pool(self) -> urllib3.PoolManager:
        """What other libraries send their requests with."""
        return self._direct

    def close(self) -> None:
        """Close the connections that are not in use."""
        for pool in (self._direct, *self._proxied.values()):
            pool.clear()

    def _pool(self, url: str) -> urllib3.PoolManager:
        """The pool for a URL: through a proxy where the system's settings say so."""
        if not self._proxies:
            return self._direct
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme)
        if not proxy or not parts.hostname or proxy_bypass(parts.hostname):
            return self._direct
        if proxy not in self._proxied:
            made = urllib3.ProxyManager(proxy, maxsize=_KEPT, ssl_context=self._context)
            self._proxied[proxy] = _ending(made)
        return self._proxied[proxy]


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Our errors instead of urllib3's, whose texts may show URLs with credentials."""
    try:
        yield
    except SSLError as error:
        cause = error.args[0] if error.args else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise LoadFailed(
                f"{what}: the store's certificate is not trusted: {cause.verify_message};"
                " give its CA as 'certificate' in the storage entry"
            ) from None
        reason = cause.reason if isinstance(cause, ssl.SSLError) and cause.reason else "TLS failed"
        raise Interrupted(f"{what}: {reason.lower().replace('_', ' ')}") from None
    except NameResolutionError:
        raise Interrupted(f"{what}: the host's name is not known") from None
    except NewConnectionError as error:
        raise Interrupted(f"{what}: the connection failed ({_root(error)})") from None
    except (ConnectTimeoutError, ReadTimeoutError, TimeoutError):
        raise Interrupted(f"{what}: timeout: the store is silent") from None
    except LocationParseError:
        raise LoadFailed(f"{what}: the address is no URL") from None
    except (HTTPError, OSError) as error:
        raise Interrupted(f"{what}: the connection failed ({_root(error)})") from None


def _root(error: BaseException) -> str:
    """What the system says, else the kind of error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def trusted_file(ca: str, owner: object) -> str:
    """The path of a file of certificates, for a library that reads them from one alone; it goes with its owner."""
    descriptor, path = tempfile.mkstemp(suffix=".pem")
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(ca)
    weakref.finalize(owner, Path(path).unlink, missing_ok=True)
    return path


def _context(ca: str | None, certificate: str | None, private_key: str | None) -> ssl.SSLContext:
    if bool(certificate) != bool(private_key):
        raise LoadFailed("storage: 'client_certificate' and 'client_key' go together")
    try:
        context = ssl.create_default_context(cadata=ca)
        if certificate and private_key:
            # The library reads these from a file alone.
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
                file.write(f"{certificate}\n{private_key}\n")
                file.flush()
                context.load_cert_chain(file.name)
    except (ssl.SSLError, ValueError):
        raise LoadFailed("storage: 'certificate', 'client_certificate' or 'client_key' is not in PEM form") from None
    return context
