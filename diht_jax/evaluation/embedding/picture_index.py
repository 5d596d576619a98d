"""An index of embedded pictures on disk, searched exactly; `index_update.py` makes it.

A part holds up to 10,000 pictures in one Arrow file, `NNNNN.arrow`, which is read through a memory
map: key, caption, thumbnail and embedding of each, and as metadata of the schema, in JSON, what the
part was made of.

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
_MANIFEST = b"diht_jax.part"
_MANIFEST_KEYS = {"unit", "identity", "part", "is_last", "entries", "dropped", "states"}


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


class PictureIndex:
    """The pictures of an index, for searching; may be used by several threads."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens all parts; an update that comes later is not seen.

        Raises:
            ValueError: there is no index, or it is damaged.
        """
        settings = read_object(f"{os.fspath(folder)}/{SETTINGS_FILE}")
        if settings is None:
            raise ValueError(f"--index={folder}: no index; --input=SOURCE makes one")
        self.settings = settings
        self._parts = read_parts(pathlib.Path(folder))

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

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
        if part not in self._parts or not 0 <= row < len(self._parts[part]):
            return None
        rows, identity = self._parts[part].rows, self._parts[part].manifest["identity"]
        if identity["kind"] != PICTURES:
            return rows["thumbnail"][row].as_py() or None
        root, key = identity["path"], rows["key"][row].as_py()
        entry = next(image_folder.read_listed(root, [(os.path.join(root, key), key, None)]))
        return make_thumbnail(entry.image) or None if isinstance(entry, Pair) else None

    def _match(self, negative_similarity: float, number: int, row: int) -> Match:
        rows = self._parts[number].rows
        key, caption = rows["key"][row].as_py(), rows["caption"][row].as_py()
        return Match(key, caption, -negative_similarity, (number, row))


class Part:
    """The file of one part.

    Attributes:
        rows: table of key, caption, thumbnail and image_emb.
        manifest: what the part was made of, see `index_update`.
    """

    def __init__(self, path: pathlib.Path):
        """Opens the file; raises ValueError where it is damaged."""
        try:
            with pyarrow.memory_map(str(path)) as file:
                self.rows = pyarrow.ipc.open_file(file).read_all()
            self.manifest = json.loads(self.rows.schema.metadata[_MANIFEST])
            if not self.manifest.keys() >= _MANIFEST_KEYS:
                raise ValueError("no whole manifest")
            column = self.rows["image_emb"]
            values = column.chunk(0).flatten().to_numpy()
            self._image_emb = values.reshape(len(self.rows), column.type.list_size)
        except (
            ValueError, OSError, KeyError, TypeError, AttributeError, pyarrow.ArrowException,
        ) as error:  # fmt: skip
            raise ValueError(
                f"{path}: damaged part of an index ({error}); delete it to have it made again"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: np.ndarray, count: int) -> Iterator[list[tuple[float, int]]]:
        """Yields the rows nearest to each query, with their similarities."""
        # With the package, since JAX and Orbax need none of it.
        try:
            from usearch.index import MetricKind, search
        except ImportError as error:
            raise ValueError("searching an index needs usearch: pip install usearch") from error
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


def read_parts(folder: pathlib.Path) -> dict[int, Part]:
    """Opens all parts of an index, by number."""
    return {int(path.stem): Part(path) for path in sorted(folder.glob("[0-9]*.arrow"))}


def make_rows(notes: Sequence[tuple[str, str, bytes]], stored: np.ndarray) -> pyarrow.Table:
    """The table of a part, from key, caption and thumbnail of n pictures, and [n, d] embeddings."""
    keys, captions, thumbnails = zip(*notes, strict=True) if notes else ((), (), ())
    values = pyarrow.array(stored.reshape(-1))
    return pyarrow.table(
        {
            "key": pyarrow.array(keys, pyarrow.string()),
            "caption": pyarrow.array(captions, pyarrow.string()),
            "thumbnail": pyarrow.array(thumbnails, pyarrow.binary()),
            "image_emb": pyarrow.FixedSizeListArray.from_arrays(values, stored.shape[1]),
        }
    )


def write_part(
    folder: pathlib.Path, number: int, rows: pyarrow.Table, manifest: dict[str, Any]
) -> None:
    """Writes a part, whole or not at all."""
    rows, buffer = rows.replace_schema_metadata({_MANIFEST: json.dumps(manifest)}), io.BytesIO()
    arrays = [pyarrow.concat_arrays(column.chunks) for column in rows.columns]
    with pyarrow.ipc.new_file(buffer, rows.schema) as to:
        to.write_batch(pyarrow.record_batch(arrays, rows.schema))  # one, for the memory map
    write_bytes(part_path(folder, number), buffer.getvalue())


def part_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """The file of a part."""
    return folder / f"{number:05d}.arrow"


def quantize(embeddings: np.ndarray, dtype: str) -> np.ndarray:
    """Embeddings [n, d] in an index's dtype; of int8, only the direction of a row is kept."""
    if dtype == "float16":
        return embeddings.astype(np.float16)
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=1e-12)
    return np.rint(embeddings * (127 / largest)).astype(np.int8)


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
