"""A web server of this process, with the faults of real ones."""

from __future__ import annotations

import http.server
import re
import socket
import threading
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves some files, by their names, in any folder; a context.

    Attributes:
        files: name -> content.
        url: its address.
        asked_ranges: the `Range` of each request, or None.
        asked_paths: the path of each request.
        breaks: how many of the next connections break off half-way.
        ranges: whether it can send a part of a file.
    """

    def __init__(self, files: dict[str, bytes], *, breaks: int = 0, ranges: bool = True):
        """Takes what the attributes are; it listens from now on."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.breaks, self.ranges = files, breaks, ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked_ranges: list[str | None] = []
        self.asked_paths: list[str] = []

    def __enter__(self) -> FileServer:
        """Begins to answer."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the server."""
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
    """Of a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
