"""What tests of pulling share: an S3 server, and a proxy in front of it that does harm."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import boto3
from botocore.config import Config

BUCKET = "models"
KEY, SECRET = "AKIAFORTESTS", "secret-that-must-not-show"


class Bucket:
    """A bucket of a real S3 server, and an entry that reaches it."""

    def __init__(self, endpoint: str, *, key: str = KEY, secret: str = SECRET) -> None:
        self.endpoint = endpoint
        self.client: Any = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=key, aws_secret_access_key=secret,
            config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip
        self.entry: dict[str, Any] = {
            "type": "s3", "access_key_id": key, "secret_access_key": secret,
            "endpoint_url": endpoint, "region": "us-east-1", "bucket": BUCKET,
        }  # fmt: skip

    def put(self, key: str, body: bytes) -> str:
        """Store an object and return its MD5."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)
        return hashlib.md5(body).hexdigest()

    def put_in_parts(self, key: str, parts: list[bytes], **checksum: str) -> None:
        """A multipart upload."""
        upload = self.client.create_multipart_upload(Bucket=BUCKET, Key=key, **checksum)["UploadId"]
        done = [
            {
                "PartNumber": number,
                "ETag": self.client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=part)[
                    "ETag"
                ],
            }
            for number, part in enumerate(parts, 1)
        ]
        self.client.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": done})


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The address of a moto server in this process; it keeps no credentials and takes any."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # What it keeps is this process's, whichever server put it there.
        request = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(request, timeout=10).close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class Site:
    """An HTTP server of files in memory, with ranges, validators, redirections and, on demand, TLS.

    Attributes:
        files: bodies by path.
        requests: method, path and headers of all requests, names in lower case.
        bodies: what came with them.
        headers: those of all answers.
        ranges: whether ranges are answered.
        validators: whether entity tags are sent and looked at.
        login: the value of ``authorization`` that is asked for, but for the paths in ``open``.
        redirects: where paths are redirected to.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[str] = []
        self.headers: dict[str, str] = {}
        self.ranges = self.validators = True
        self.login: str | None = None
        self.open: set[str] = set()
        self.redirects: dict[str, str] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                site.answer(self)

            do_POST = do_GET

        self._server = _Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if context else 'http'}://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in to.headers.items()}
        self.bodies.append(to.rfile.read(int(headers.get("content-length", "0"))).decode())
        self.requests.append((to.command, to.path, headers))
        path = unquote(to.path.partition("?")[0])
        if path in self.redirects:
            return self._send(to, 302, b"", {"location": self.redirects[path]})
        if self.login is not None and path not in self.open and headers.get("authorization") != self.login:
            return self._send(to, 401, b"")
        body = self.files.get(path)
        if body is None:
            return self._send(to, 404, b"")
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        said = {"etag": tag} if self.validators else {}
        if self.validators and headers.get("if-match", tag) != tag:
            return self._send(to, 412, b"")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if span is None or not self.ranges:
            return self._send(to, 200, body, said)
        start, stop = int(span[1]), min(int(span[2]) + 1 if span[2] else len(body), len(body))
        said["content-range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return self._send(to, 206, body[start:stop], said)

    def _send(
        self, to: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        to.send_response(status)
        kinds = {b"<": "application/xml", b"{": "application/json"}
        kind = kinds.get(body[:1], "application/octet-stream")
        for name, value in {**self.headers, **headers, "content-length": str(len(body)), "content-type": kind}.items():
            to.send_header(name, value)
        to.end_headers()
        with contextlib.suppress(OSError):
            to.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave, or that speak no TLS, are part of the tests."""


class Proxy:
    """A TCP proxy to ``target`` (``host:port``) that looks at each HTTP request and may spoil its answer.

    ``faults`` are used up, one by one, by requests whose first line ``matches``; each is a function of the client's
    socket and the upstream's whole answer, which it may send, in part or spoiled, before the connection is closed.

    Attributes:
        requests: the first lines of all requests so far.
        heads: the whole heads of these.
    """

    def __init__(self, target: str, matches: Callable[[str], bool] = lambda line: line.startswith("GET")) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._matches = matches
        self.faults: list[Callable[[socket.socket, bytes], None]] = []
        self.always: Callable[[socket.socket, bytes], None] | None = None
        self.requests: list[str] = []
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"http://{host}:{port}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        serving = []
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            thread.start()
            serving.append(thread)
        for thread in serving:
            thread.join(5)

    def _serve(self, client: socket.socket) -> None:
        """One request and its answer; connections are not kept."""
        with client, contextlib.suppress(OSError):
            request = _head(client)
            if not request:
                return
            line = request.split(b"\r\n", 1)[0].decode()
            self.requests.append(line)
            self.heads.append(request.decode())
            with socket.create_connection(self._target) as upstream:
                upstream.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                fault = self.always
                if fault is None and self.faults and self._matches(line):
                    fault = self.faults.pop(0)
                if fault is None:
                    while chunk := upstream.recv(65536):
                        client.sendall(chunk)
                    return
                answer = bytearray()
                while chunk := upstream.recv(65536):
                    answer += chunk
                fault(client, bytes(answer))


def _head(client: socket.socket) -> bytes:
    """The request's head; GET and HEAD have no body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = client.recv(65536)
        if not chunk:
            return b""
        data += chunk
    return data


def cut_after(count: int) -> Callable[[socket.socket, bytes], None]:
    """Send the head and so many bytes of the body, then close."""

    def cut(client: socket.socket, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n" + body[:count])

    return cut


class Stall:
    """Send the head and so many bytes of the body, and then nothing until the client leaves.

    Attributes:
        count: so many bytes; None: not even the head.
        begun, left: whether a client waits, or waited, for the rest, and whether it has gone.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.begun = threading.Event()
        self.left = threading.Event()

    def __call__(self, client: socket.socket, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        if self.count is not None:
            client.sendall(head + b"\r\n\r\n" + body[: self.count])
        self.begun.set()
        client.settimeout(60)
        with contextlib.suppress(ConnectionError):
            client.recv(1)
        self.left.set()


def status(line: str, body: bytes = b"") -> Callable[[socket.socket, bytes], None]:
    """Answer with another status."""

    def refuse(client: socket.socket, answer: bytes) -> None:
        client.sendall(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    return refuse


def flip(client: socket.socket, answer: bytes) -> None:
    """One bit of the body is wrong."""
    client.sendall(answer[:-1] + bytes([answer[-1] ^ 1]))


def trickle(interval_s: float) -> Callable[[socket.socket, bytes], None]:
    """A byte now and then, for as long as the client is there."""

    def drip(client: socket.socket, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        wait = threading.Event()
        for one in body:
            client.sendall(bytes([one]))
            wait.wait(interval_s)

    return drip
