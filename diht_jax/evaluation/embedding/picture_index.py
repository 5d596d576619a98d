"""An on-disk index of embedded pictures with exact search; `index_update.py` creates it.

A part has up to 10,000 pictures. Its `NNNNN.json` describes what the part was made from, with name
and CRC-32 of its Arrow file; it is written last and marks the part as complete. The Arrow file has
key, caption and embedding of each picture, and the end and CRC-32 of its thumbnail in the file next
to it. The Arrow file is verified when the index is opened, and then memory-mapped. A thumbnail is
verified when it is shown.

usearch (Apache-2.0) compares a query with all embeddings, using SIMD code on all cores.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from PIL import Image

from diht_jax.evaluation.embedding.files import SETTINGS_FILE, read_object
from diht_jax.input.transforms import ImageError, decode_rgb, encode, load_rgb, open_image
from diht_jax.readers import image_folder
from diht_jax.records.schema import Pair
from diht_jax.storage import files

Place = tuple[int, int]

LAYOUT = 3  # version of the layout, stored in the settings of an index
# Pixels of the longer side.
THUMBNAIL_SIDE = 160
# Candidates per part for re-ranking in float32, as a multiple of the requested matches: the int8
# comparison also rounds the query.
_CANDIDATES = 4
_THUMBNAILS = ".thumbnails"
_REMEDY = "delete the .json file and bring the index up to date with --input"


class Match(NamedTuple):
    """A picture found by a search."""

    key: str  # its path in the folder, or its key in the source
    caption: str  # its caption in the source, or ""
    similarity: float  # cosine similarity of picture and query
    place: Place  # (part, row) for an index; (unit, entry) for a source


class PictureIndex:
    """The pictures of an index, for searching; thread-safe."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens all parts; later updates are not visible.

        Raises:
            ValueError: there is no index, or it is damaged or partly updated.
        """
        path = f"{os.fspath(folder)}/{SETTINGS_FILE}"
        settings = read_object(path, "make the index again, in another --index")
        if settings is None:
            raise ValueError(f"--index={folder}: no index; --input=SOURCE makes one")
        if settings.get("index") != LAYOUT:
            raise ValueError(f"{path}: expected the settings of an index; make it again")
        self.settings = settings
        folder = pathlib.Path(folder)
        manifests = read_manifests(folder, settings)
        if leftovers := find_leftovers(folder, manifests.values()):
            path, number = leftovers[0], leftovers[0].name.partition("-")[0]
            raise ValueError(
                f"{path}: {number}.json is gone, or an update runs or was interrupted; bring the "
                "index up to date with --input"
            )
        if not manifests:
            raise ValueError(f"--index={folder}: no pictures; --input=SOURCE brings them in")
        with futures.ThreadPoolExecutor() as pool:  # computing a CRC releases the GIL
            parts = pool.map(functools.partial(Part, folder), manifests.values())
            self._parts = dict(zip(manifests, parts, strict=True))

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def check_model(self, model: Any) -> None:
        """Raises ValueError if the index was made with another model (a `LoadedModel`)."""
        made_with = (self.settings.get("model_sha256"), self.settings.get("image_size"))
        if made_with != (model.fingerprint(), model.image_size):
            raise ValueError(
                "--model: the index was made with another model, --image_size or --dim; take "
                "that one, or another --index"
            )

    def search(self, text_emb: np.ndarray, count: int) -> list[list[Match]]:
        """Returns the nearest pictures of each query [q, d], best first; the search is exact."""
        queries = np.asarray(text_emb, np.float32)
        found: list[list[tuple[float, int, int]]] = [[] for _ in queries]
        for number, part in self._parts.items():
            for matches, nearest in zip(found, part.search(queries, count), strict=True):
                matches.extend((-similarity, number, row) for similarity, row in nearest)
        best: list[list[Match]] = [[] for _ in queries]
        for own, matches in zip(best, found, strict=True):
            for negative_similarity, number, row in sorted(matches)[:count]:
                rows = self._parts[number].rows
                key, caption = rows["key"][row].as_py(), rows["caption"][row].as_py()
                own.append(Match(key, caption, -negative_similarity, (number, row)))
        return best

    def picture(self, part: int, row: int) -> bytes | None:
        """Returns a picture's thumbnail as JPEG; None if there is none, or the file is gone."""
        if part not in self._parts or not 0 <= row < len(self._parts[part]):
            return None
        found = self._parts[part]
        folder, key = found.manifest["folder"], found.rows["key"][row].as_py()
        if folder is None:
            return found.thumbnail(row) or None
        path = image_folder.find_picture(folder, key)
        entry = next(image_folder.read_listed(folder, [(path, key, None)]))
        return make_thumbnail(entry.image) or None if isinstance(entry, Pair) else None

    def load_pictures(self, matches: Iterable[Match]) -> dict[Place, Image.Image]:
        """Reads the thumbnails of matches, keyed by place; a white picture if there is none."""
        pictures = {}
        # The index may lack thumbnails, and a file may be gone.
        white = Image.new("RGB", (8, 8), "white")
        for match in matches:
            data = self.picture(*match.place)
            pictures[match.place] = white if data is None else decode_rgb(data)
        return pictures


class Part:
    """The files of one part: its `rows` (see `make_rows`) and the thumbnails."""

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any]):
        """Opens the Arrow file; raises ValueError if it is damaged."""
        self.manifest, path = manifest, folder / manifest["file"]
        self._thumbnails = path.with_suffix(_THUMBNAILS)
        try:
            with pyarrow.memory_map(str(path)) as file:
                data = file.read_buffer()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
        # Verified first, since pyarrow crashes on some damaged files.
        if zlib.crc32(data) != manifest["crc32"]:
            raise ValueError(f"{path}: damaged, its CRC-32 differs; {_REMEDY}")
        self.rows = pyarrow.ipc.open_file(data).read_all()
        column = self.rows["image_emb"]
        values = column.chunk(0).flatten().to_numpy()
        self._image_emb = values.reshape(len(self.rows), column.type.list_size)

    def thumbnail(self, row: int) -> bytes:
        """Returns a picture's thumbnail, empty if there is none; ValueError if it is damaged."""
        ends = self.rows["thumbnail_end"]
        start, stop = ends[row - 1].as_py() if row else 0, ends[row].as_py()
        if start == stop:
            return b""
        data = b""
        with contextlib.suppress(FileNotFoundError), open(self._thumbnails, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if zlib.crc32(data) != self.rows["thumbnail_crc32"][row].as_py():
            raise ValueError(f"{self._thumbnails}: missing, or damaged at byte {start}; {_REMEDY}")
        return data

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: np.ndarray, count: int) -> Iterator[list[tuple[float, int]]]:
        """Yields the nearest rows of each query with their similarities."""
        import_usearch()
        from usearch.index import MetricKind, search

        wanted = min(len(self), _CANDIDATES * count)
        if not wanted:
            yield from ([] for _ in queries)
            return
        stored = quantize(queries, str(self._image_emb.dtype))
        found = search(self._image_emb, stored, wanted, MetricKind.Cos, exact=True)
        for query, rows in zip(queries, np.reshape(found.keys, (len(queries), -1)), strict=True):
            rows = rows.astype(np.int64)
            image_emb = self._image_emb[rows].astype(np.float32)
            lengths = np.linalg.norm(image_emb, axis=1) * np.linalg.norm(query)
            similarities = image_emb @ query / np.maximum(lengths, 1e-12)
            best = np.argsort(-similarities, kind="stable")[:count]
            yield [(float(similarities[i]), int(rows[i])) for i in best]


def import_usearch() -> None:
    """Raises ValueError if usearch is not installed."""
    # A dependency of the package that JAX and Orbax do not bring along.
    try:
        import usearch.index  # noqa: F401
    except ImportError as error:
        raise ValueError("searching an index needs usearch: pip install usearch") from error


def read_manifests(folder: pathlib.Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Reads the manifests of an index's parts, by part number.

    Raises ValueError if a file is damaged or belongs to an index with other settings.
    """
    manifests = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        manifest = read_object(path, "delete it and bring the index up to date with --input")
        number = int(path.stem)
        if manifest is None or (manifest.get("number"), manifest.get("settings")) != (
            number,
            settings,
        ):
            raise ValueError(f"{path}: not part {number} of this index; {_REMEDY}")
        manifests[number] = manifest
    return manifests


def make_rows(notes: Sequence[tuple[str, str, bytes]], stored: np.ndarray) -> pyarrow.Table:
    """Builds the table of a part from (key, caption, thumbnail) and embeddings [n, d]."""
    keys, captions, thumbnails = zip(*notes, strict=True) if notes else ((), (), ())
    values = pyarrow.array(stored.reshape(-1))
    return pyarrow.table(
        {
            "key": pyarrow.array(keys, pyarrow.string()),
            "caption": pyarrow.array(captions, pyarrow.string()),
            "thumbnail_end": np.cumsum([len(data) for data in thumbnails], dtype=np.int64),
            "thumbnail_crc32": np.array([zlib.crc32(data) for data in thumbnails], np.uint32),
            "image_emb": pyarrow.FixedSizeListArray.from_arrays(values, stored.shape[1]),
        }
    )


def write_part(
    folder: pathlib.Path,
    number: int,
    rows: pyarrow.Table,
    manifest: dict[str, Any],
    settings: dict[str, Any],
    thumbnails: Iterable[bytes] = (),
) -> dict[str, Any]:
    """Writes the files of a part, and its manifest last; returns the manifest.

    Thumbnails are in row order. The given manifest describes what the part was made from.
    """
    arrays = [column.combine_chunks() for column in rows.columns]
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, rows.schema) as writer:  # one batch, as the memory map needs
        writer.write_batch(pyarrow.record_batch(arrays, rows.schema))
    data = sink.getvalue()
    crc32 = zlib.crc32(data)
    # Named by content: during a replacement the old manifest still refers to the old file.
    path = folder / f"{number:05d}-{crc32:08x}.arrow"
    if pictures := b"".join(thumbnails):
        files.write_bytes(path.with_suffix(_THUMBNAILS), pictures)
    files.write_bytes(path, data.to_pybytes())
    manifest = manifest | {
        "number": number,
        "settings": settings,
        "pictures": len(rows),
        "file": path.name,
        "crc32": crc32,
    }
    files.write_object(str(folder / f"{number:05d}.json"), manifest, with_checksum=True)
    return manifest


def find_leftovers(folder: pathlib.Path, manifests: Iterable[dict[str, Any]]) -> list[pathlib.Path]:
    """Returns the files that no part refers to, such as those of an interrupted update."""
    named = {manifest["file"].partition(".")[0] for manifest in manifests}
    found = [*folder.glob("[0-9]*.arrow"), *folder.glob(f"[0-9]*{_THUMBNAILS}")]
    return [path for path in sorted(found) if path.stem not in named]


def quantize(embeddings: np.ndarray, dtype: str) -> np.ndarray:
    """Converts embeddings [n, d] to an index's dtype; int8 keeps only the direction of a row."""
    if dtype == "float16":
        return embeddings.astype(np.float16)
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=1e-12)
    return np.rint(embeddings * (127 / largest)).astype(np.int8)


def make_thumbnail(data: bytes) -> bytes:
    """Makes a small JPEG of a picture; empty if it cannot be read, which is counted elsewhere."""
    try:
        image = open_image(data)
        image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image = load_rgb(image)
    except ImageError:
        return b""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    return encode(image, "JPEG", quality=80)
