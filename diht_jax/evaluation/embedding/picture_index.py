"""An index of embedded pictures on disk, searched exactly; `index_update.py` makes it.

A part holds up to 10,000 pictures in three files: `NNNNN.npy` with the embeddings, which are read
through a memory map, `NNNNN.arrow` with key, caption and thumbnail of each, and last `NNNNN.json`
with what the part was made of and the rows that were removed since; without it the part does not
exist.

usearch (Apache-2.0) compares a query with every embedding, in vector code and on all cores.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
from PIL import Image

from diht_jax.evaluation.embedding.files import SETTINGS_FILE, read_object
from diht_jax.evaluation.embedding.inputs import PICTURES
from diht_jax.input.decode import ImageError, load_rgb, open_image
from diht_jax.readers import image_folder
from diht_jax.records.schema import Pair
from diht_jax.storage.files import write_bytes

Place = tuple[int, int]

DTYPES = ("float16", "int8")
# Pixels, of the longer side.
THUMBNAIL_SIDE = 160
# Matches of each part that are compared again in float32, as a multiple of the requested ones: the
# comparison in eight bits rounds the query, too.
_CANDIDATES = 4
_MANIFEST_KEYS = {"unit", "identity", "part", "is_last", "entries", "dropped", "states", "removed"}
_SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("caption", pyarrow.string()), ("thumbnail", pyarrow.binary())]
)


@dataclasses.dataclass(frozen=True)
class Match:
    """A picture that was found.

    Attributes:
        key: its path in the folder, or its key in the source.
        caption: that the source has for it, or "".
        similarity: cosine of the angle between picture and query.
        place: of an index the part and the row; else of the source the unit and the entry in it.
    """

    key: str
    caption: str
    similarity: float
    place: Place


def write_part(
    folder: pathlib.Path,
    number: int,
    stored: np.ndarray,
    notes: Sequence[tuple[str, str, bytes]],
    manifest: dict[str, Any],
) -> None:
    """Writes the files of a part.

    Args:
        folder: of the index.
        number: of the part.
        stored: of `quantize`, [n, d].
        notes: key, caption and thumbnail of each of the n pictures.
        manifest: what it was made of.
    """
    path, buffer = folder / f"{number:05d}", io.BytesIO()
    np.save(buffer, stored)
    write_bytes(path.with_suffix(".npy"), buffer.getvalue())
    columns = list(zip(*notes, strict=True)) or [(), (), ()]
    table = pyarrow.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
    buffer = io.BytesIO()
    with pyarrow.ipc.new_file(buffer, _SCHEMA) as to:
        to.write_table(table)
    write_bytes(path.with_suffix(".arrow"), buffer.getvalue())
    write_manifest(folder, number, manifest)


def write_manifest(folder: pathlib.Path, number: int, manifest: dict[str, Any]) -> None:
    """Writes what a part was made of: the last of its files."""
    write_bytes(folder / f"{number:05d}.json", json.dumps(manifest).encode())


class PictureIndex:
    """The pictures of an index, for searching; may be used by several threads."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens all parts; an update that comes later is not seen.

        Raises:
            ValueError: there is no index, or it is damaged.
        """
        folder = pathlib.Path(folder)
        settings = read_object(str(folder / SETTINGS_FILE))
        if settings is None:
            raise ValueError(f"--index={folder}: no index; --input=SOURCE makes one")
        self.settings = settings
        manifests = read_manifests(folder)
        self._parts = {number: Part(folder, number, found) for number, found in manifests.items()}
        self._folders = {
            number: manifest["identity"]["path"]
            for number, manifest in manifests.items()
            if manifest["identity"]["kind"] == PICTURES
        }

    def __len__(self) -> int:
        return sum(len(part.rows) - int(part.removed.sum()) for part in self._parts.values())

    def check_model(self, model: Any) -> None:
        """Raises ValueError where the index was made with another model, a `LoadedModel`."""
        made_with = (self.settings.get("model_sha256"), self.settings.get("image_size"))
        if made_with != (model.fingerprint(), model.image_size):
            raise ValueError(
                "--model: the index was made with another model, --image_size or --dim; take "
                "that one, or another --index"
            )

    def search(self, text_emb: np.ndarray, count: int) -> list[list[Match]]:
        """The pictures nearest to each query, all pictures compared.

        Args:
            text_emb: float [q, d].
            count: matches a query, or all pictures where there are fewer.

        Returns:
            For each query its matches, the best first.

        Raises:
            ValueError: usearch is not installed.
        """
        queries = np.asarray(text_emb, np.float32)
        found: list[list[tuple[float, int, int]]] = [[] for _ in queries]
        for number, part in self._parts.items():
            for matches, nearest in zip(found, part.search(queries, count), strict=True):
                matches.extend((-similarity, number, row) for similarity, row in nearest)
        return [[self._match(*match) for match in sorted(matches)[:count]] for matches in found]

    def picture(self, part: int, row: int) -> bytes | None:
        """The thumbnail of a picture, a JPEG file.

        Returns:
            None where there is none, such as for a file that was removed since.
        """
        if part not in self._parts or not 0 <= row < len(self._parts[part].rows):
            return None
        rows = self._parts[part].rows
        if part not in self._folders:
            return rows["thumbnail"][row].as_py() or None
        key = rows["key"][row].as_py()
        root = self._folders[part]
        entry = next(image_folder.read_listed(root, [(os.path.join(root, key), key, None)]))
        return make_thumbnail(entry.image) or None if isinstance(entry, Pair) else None

    def _match(self, negative_similarity: float, number: int, row: int) -> Match:
        rows = self._parts[number].rows
        key, caption = rows["key"][row].as_py(), rows["caption"][row].as_py()
        return Match(key, caption, -negative_similarity, (number, row))


class Part:
    """The files of one part.

    Attributes:
        rows: table of key, caption and thumbnail.
        removed: bool [n], the rows that are no longer in the source.
    """

    def __init__(self, folder: pathlib.Path, number: int, manifest: dict[str, Any]):
        """Opens the files of a part with its manifest."""
        path = folder / f"{number:05d}"
        try:
            self._image_emb = np.load(path.with_suffix(".npy"), mmap_mode="r")
            with pyarrow.memory_map(str(path.with_suffix(".arrow"))) as file:
                self.rows = pyarrow.ipc.open_file(file).read_all()
            self.removed = np.zeros(len(self.rows), bool)
            self.removed[manifest["removed"]] = True
        except (ValueError, OSError, EOFError, IndexError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{path}.*: damaged part of an index ({error}); delete {path.name}.json to have "
                "it made again"
            ) from error
        if len(self._image_emb) != len(self.rows):
            raise ValueError(f"{path}.*: files of different lengths; delete {path.name}.json")

    def search(self, queries: np.ndarray, count: int) -> Iterator[list[tuple[float, int]]]:
        """Yields the rows nearest to each query, with their similarities."""
        # With the package, since JAX and Orbax need none of it.
        try:
            from usearch.index import MetricKind, search
        except ImportError as error:
            raise ValueError("searching an index needs usearch: pip install usearch") from error
        wanted = min(len(self.rows), _CANDIDATES * count + int(self.removed.sum()))
        if not wanted:
            yield from ([] for _ in queries)
            return
        stored = quantize(queries, str(self._image_emb.dtype))
        found = search(self._image_emb, stored, wanted, MetricKind.Cos, exact=True)
        for query, rows in zip(queries, np.reshape(found.keys, (len(queries), -1)), strict=True):
            rows = rows[~self.removed[rows]].astype(np.int64)
            image_emb = self._image_emb[rows].astype(np.float32)
            lengths = np.linalg.norm(image_emb, axis=1) * np.linalg.norm(query)
            similarities = image_emb @ query / np.maximum(lengths, 1e-12)
            best = np.argsort(-similarities, kind="stable")[:count]
            yield [(float(similarities[i]), int(rows[i])) for i in best]


def quantize(embeddings: np.ndarray, dtype: str) -> np.ndarray:
    """Embeddings [n, d] in an index's dtype; of int8, only the direction of a row is kept."""
    if dtype == "float16":
        return embeddings.astype(np.float16)
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=1e-12)
    return np.rint(embeddings * (127 / largest)).astype(np.int8)


def read_manifests(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Reads the manifests of all parts, by number."""
    manifests = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        manifest = read_object(str(path)) or {}
        if not manifest.keys() >= _MANIFEST_KEYS:
            raise ValueError(f"{path}: no manifest of a part of an index; delete it")
        manifests[int(path.stem)] = manifest
    return manifests


def make_thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture; nothing where it cannot be read, which is counted elsewhere."""
    try:
        image = open_image(data)
        image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image = load_rgb(image)
    except ImageError:
        return b""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
