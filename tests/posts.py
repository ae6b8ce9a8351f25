"""An HTTP server that takes what is posted to it, for tests of what instances send."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Post(NamedTuple):
    path: str
    content_type: str
    body: bytes


class Posts:
    """Listens on a free port of loopback; ``taken`` is what came. While ``held`` is set, answers wait."""

    def __init__(self) -> None:
        self.taken: list[Post] = []
        self.free = threading.Event()
        self.free.set()
        self._changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.free.wait(30)
                with outer._changed:
                    outer.taken.append(Post(self.path, self.headers["content-type"], body))
                    outer._changed.notify_all()
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def wait_for(self, number: int, timeout_s: float = 20.0) -> list[Post]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.taken) >= number, timeout_s), len(self.taken)
            return list(self.taken)

    def close(self) -> None:
        self.free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
