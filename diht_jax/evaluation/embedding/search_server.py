"""One web page for searching an index of pictures: a search field, and the pictures found.

Python's own HTTP server. What a browser sends is a query, a number of matches, and numbers of
pictures; it can name no file. A request whose Host is another name than this machine's is refused:
it comes from a foreign page whose name was made to point here (DNS rebinding).
"""

from __future__ import annotations

import dataclasses
import functools
import http.server
import ipaddress
import json
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from diht_jax.evaluation.embedding.picture_index import PictureIndex
from diht_jax.pages.render import render

_MOST_MATCHES = 200
_LONGEST_QUERY = 1000  # characters
_POLICY = "default-src 'none'; img-src 'self'; connect-src 'self'; form-action 'self'"


def make_server(
    index: PictureIndex,
    encode_text: Callable[[list[str]], np.ndarray],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_matches: int = 24,
    clock: Callable[[], float],
) -> http.server.ThreadingHTTPServer:
    """A server of the page; its `serve_forever` answers until it is stopped.

    Args:
        index: what is searched.
        encode_text: texts -> float [n, d]; called by one thread at a time.
        host, port: to listen at. The default is reached from this machine alone; port 0 is any that
            is free, see `server_port`.
        num_matches: pictures for a query that asks for no number.
        clock: seconds, from any start.

    Raises:
        ValueError: the port cannot be had.
    """
    encoding = threading.Lock()

    def search(query: str, count: int) -> dict[str, Any]:
        start = clock()
        with encoding:
            text_emb = np.asarray(encode_text([query]), np.float32)
        matches = [dataclasses.asdict(match) for match in index.search(text_emb, count)[0]]
        return {"matches": matches, "pictures": len(index), "seconds": clock() - start}

    handler = functools.partial(_Handler, index, search, num_matches, host)
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); choose another port"
        ) from error


def is_own_host(header: str, served: str) -> bool:
    """Tells whether a Host header names this server.

    Its port does not matter, and may be another where the connection is forwarded.

    Args:
        header: of a request, such as "localhost:8000".
        served: the name or address that the server listens at.
    """
    try:
        name = urllib.parse.urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if name in {"localhost", served.lower(), socket.gethostname().lower()}:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == socket.getfqdn().lower()
    # A foreign page has a name: an address cannot be made to point elsewhere.
    return address.is_loopback or served not in ("localhost", "127.0.0.1")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/`, `/search?q=` and `/picture?part=&row=`."""

    def __init__(
        self,
        index: PictureIndex,
        search: Callable[[str, int], dict[str, Any]],
        num_matches: int,
        host: str,
        *args: Any,
    ):
        self._index, self._find, self._num_matches = index, search, num_matches
        self._host = host
        super().__init__(*args)  # answers

    def do_GET(self) -> None:
        if not is_own_host(self.headers.get("Host", ""), self._host):
            self._send(403, "text/plain", b"Host: expected a name or address of this server")
            return
        url = urllib.parse.urlsplit(self.path)
        fields = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/":
            # Scripts and styles of this page alone: a caption or key cannot bring any.
            nonce = secrets.token_urlsafe()
            page = render("search_server.html", nonce=nonce).encode()
            policy = f"{_POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
            self._send(200, "text/html; charset=utf-8", page, policy)
        elif url.path == "/search":
            self._search(fields)
        elif url.path == "/picture":
            self._send_picture(fields)
        else:
            self._send(404, "text/plain", b"no such page")

    def _search(self, fields: dict[str, str]) -> None:
        query = fields.get("q", "").strip()
        try:
            count = int(fields.get("count", self._num_matches))
        except ValueError:
            count = 0
        if not 0 < len(query) <= _LONGEST_QUERY or not 0 < count <= _MOST_MATCHES:
            error = f"expected q, 1 to {_LONGEST_QUERY} characters, and count, 1 to {_MOST_MATCHES}"
            self._send_json(400, {"error": error})
            return
        try:
            self._send_json(200, self._find(query, count))
        except Exception as error:  # the server goes on
            logging.exception("query %r", query)
            self._send_json(500, {"error": f"{type(error).__name__}: {error}"})

    def _send_picture(self, fields: dict[str, str]) -> None:
        try:
            place = int(fields["part"]), int(fields["row"])
        except (KeyError, ValueError):
            place = -1, -1
        try:
            data = self._index.picture(*place)
        except ValueError as error:  # the server goes on
            logging.error("%s", error)
            self._send(500, "text/plain", b"damaged index")
            return
        if data is None:
            self._send(404, "text/plain", b"no such picture")
        else:
            self._send(200, "image/jpeg", data)

    def _send_json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes, policy: str = _POLICY) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logging.vlog(1, format, *args)
