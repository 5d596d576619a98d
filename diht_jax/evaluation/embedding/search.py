"""Text-to-image search: a page of the matches, and a server with a search field.

The server is Python's `http.server`. A browser can send a query, a number of matches and picture
numbers; it cannot name a file. A request whose Host is not this machine is refused, because it
comes from a foreign page whose name was made to resolve to this machine (DNS rebinding).
"""

from __future__ import annotations

import functools
import http.server
import ipaddress
import json
import os
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from diht_jax.evaluation.embedding.encoding import Batching, EmbeddingModel, EncodedImages, Encoder
from diht_jax.evaluation.embedding.entries import read_again
from diht_jax.evaluation.embedding.inputs import input_units
from diht_jax.evaluation.embedding.picture_index import Match, PictureIndex, Place
from diht_jax.evaluation.protocols.base import CAPTION_SLOT, fill_caption_template
from diht_jax.input.transforms import decode_rgb
from diht_jax.pages.render import render, thumbnail
from diht_jax.readers.base import SourceShard
from diht_jax.terminal import escape

_MOST_SHOWN = 1000  # characters shown of a key or caption


def search_pictures(
    model: EmbeddingModel,
    shards: Sequence[SourceShard],
    queries: Sequence[str],
    *,
    count: int = 8,
    template: str = CAPTION_SLOT,
    batching: Batching | None = None,
) -> tuple[dict[str, list[Match]], EncodedImages]:
    """Finds the pictures of `inputs.list_inputs` closest to each query, at most `count`.

    Duplicate queries count once. `template` is a prompt around the query.

    Returns:
        The matches of each query, best first, with ties in source order; and the encoded
        pictures.
    """
    texts = fill_queries(queries, template)
    encoder = Encoder(model, input_units(shards), batching, name="pictures")
    encoded = encoder.images(lambda pair: (pair.key, pair.caption))
    text_emb = encoder.texts(list(texts.values()))
    matches = {}
    for query, row in zip(texts, text_emb @ encoded.image_emb.T, strict=True):
        order = np.argsort(-row, kind="stable")[:count]
        matches[query] = [
            Match(*encoded.notes[i], similarity=float(row[i]), place=encoded.orders[i])
            for i in order
        ]
    return matches, encoded


def fill_queries(queries: Sequence[str], template: str) -> dict[str, str]:
    """Maps each distinct query to the text to embed; a blank query is a ValueError."""
    if not queries or not all(map(str.strip, queries)):
        raise ValueError(f"expected at least one query with words in it, got {list(queries)}")
    return {query: fill_caption_template(template, query) for query in queries}


def load_pictures(
    source: Sequence[SourceShard], matches: Iterable[Match]
) -> dict[Place, Image.Image]:
    """Reads the pictures of matches, keyed by place; opens only the units that hold them.

    Raises ValueError if the source has changed and a place has another picture.
    """
    key_of = {match.place: match.key for match in matches}
    found = read_again(input_units(source), key_of)
    for place, entry in found.items():
        if entry.key != key_of[place]:
            raise ValueError(
                f"the source has changed since it was read: '{key_of[place]}' has become "
                f"'{entry.key}'"
            )
    return {place: decode_rgb(entry.image) for place, entry in found.items()}


def draw_matches(
    matches_of: Mapping[str, Sequence[Match]],
    pictures: Mapping[Place, Image.Image],
    path: str | os.PathLike[str],
    *,
    title: str,
    note: str,
) -> None:
    """Writes an HTML page with the matches of every query, best first."""
    uris = {place: thumbnail(picture) for place, picture in pictures.items()}
    queries = []
    for query, matches in matches_of.items():
        tiles = []
        for rank, match in enumerate(matches, start=1):
            text = (match.caption or match.key)[:_MOST_SHOWN]
            tiles.append((uris[match.place], f"{rank}   {match.similarity:.3f}", text))
        queries.append((query, tiles))
    render("search.html", path, title=title, note=note, queries=queries)


def format_matches(matches_of: Mapping[str, Sequence[Match]]) -> str:
    """Formats matches for a terminal: rank, similarity, key and caption, escaped."""
    lines = []
    for query, matches in matches_of.items():
        lines.append(escape(query))
        for rank, match in enumerate(matches, start=1):
            label = escape(f"{match.key}  {match.caption}".strip()[: _MOST_SHOWN + 1])
            shown = label if len(label) <= _MOST_SHOWN else f"{label[:_MOST_SHOWN]}…"
            lines.append(f"{rank:>4}  {match.similarity:6.3f}  {shown}")
    return "\n".join(lines)


_NUM_MATCHES, _MOST_MATCHES = 24, 200  # default and maximum per query
_LONGEST_QUERY = 1000  # characters
_POLICY = "default-src 'none'; img-src 'self'; connect-src 'self'; form-action 'self'"


def make_server(
    index: PictureIndex,
    encode_text: Callable[[list[str]], np.ndarray],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    clock: Callable[[], float],
) -> http.server.ThreadingHTTPServer:
    """Creates a server of the search page; `serve_forever` runs it.

    Calls of `encode_text` are serialised. The default host is reachable from this machine alone.
    Port 0 picks a free port (see `server_port`); an unavailable port is a ValueError.
    """
    encoding = threading.Lock()

    def search(query: str, count: int) -> dict[str, Any]:
        start = clock()
        with encoding:
            text_emb = np.asarray(encode_text([query]), np.float32)
        matches = [match._asdict() for match in index.search(text_emb, count)[0]]
        return {"matches": matches, "pictures": len(index), "seconds": clock() - start}

    handler = functools.partial(_Handler, index, search, host)
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); choose another port"
        ) from error


def is_own_host(header: str, served: str) -> bool:
    """Returns whether a Host header, such as "localhost:8000", names this server.

    The port is ignored, since a forwarded connection may have another one. `served` is the name or
    address that the server listens on.
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
    # A foreign page has a host name; an address cannot be made to resolve elsewhere.
    return address.is_loopback or served not in ("localhost", "127.0.0.1")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/`, `/search?q=` and `/picture?part=&row=`."""

    def __init__(
        self,
        index: PictureIndex,
        search: Callable[[str, int], dict[str, Any]],
        host: str,
        *args: Any,
    ):
        self._index, self._find, self._host = index, search, host
        super().__init__(*args)  # this also answers the request

    def do_GET(self) -> None:
        if not is_own_host(self.headers.get("Host", ""), self._host):
            self._send(403, "text/plain", b"Host: expected a name or address of this server")
            return
        url = urllib.parse.urlsplit(self.path)
        fields = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/":
            # Allows only this page's own scripts and styles: captions and keys cannot add any.
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
            count = int(fields.get("count", _NUM_MATCHES))
        except ValueError:
            count = 0
        if not 0 < len(query) <= _LONGEST_QUERY or not 0 < count <= _MOST_MATCHES:
            error = f"expected q, 1 to {_LONGEST_QUERY} characters, and count, 1 to {_MOST_MATCHES}"
            status, answer = 400, {"error": error}
        else:
            try:
                status, answer = 200, self._find(query, count)
            except Exception as error:  # the server keeps running
                logging.exception("query %r", query)
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send_picture(self, fields: dict[str, str]) -> None:
        try:
            place = int(fields["part"]), int(fields["row"])
        except (KeyError, ValueError):
            place = -1, -1
        try:
            data = self._index.picture(*place)
        except ValueError as error:  # the server keeps running
            logging.error("%s", error)
            self._send(500, "text/plain", b"damaged index")
            return
        if data is None:
            self._send(404, "text/plain", b"no such picture")
        else:
            self._send(200, "image/jpeg", data)

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
