"""A web server in this process that can reproduce the faults of real servers."""

from __future__ import annotations

import http.server
import re
import socket
import threading
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves files by name, from any folder of the URL; use as a context manager.

    Attributes:
            files: Maps file name -> content.
            url: Address of the server.
            asked_ranges: The `Range` header of each request, or None.
            asked_paths: The path of each request.
            breaks: How many of the next connections break off half-way.
            ranges: Whether the server supports range requests.
    """

    def __init__(self, files: dict[str, bytes], *, breaks: int = 0, ranges: bool = True):
        """Sets the attributes and starts listening."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.breaks, self.ranges = files, breaks, ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked_ranges: list[str | None] = []
        self.asked_paths: list[str] = []

    def __enter__(self) -> FileServer:
        """Starts to answer requests."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stops the server."""
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked_ranges.append(asked)
        server.asked_paths.append(self.path)
        content = server.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        start = 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_error(416)
                return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def free_address() -> str:
    """Returns the address of a free local port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
