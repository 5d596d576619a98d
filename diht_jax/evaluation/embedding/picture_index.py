"""An index of embedded pictures on disk: built once, updated by what is new, searched exactly.

A part holds up to 10,000 pictures in three files: `NNNNN.npy` with the embeddings, which are read
through a memory map, `NNNNN.arrow` with key, caption and thumbnail of each, and last `NNNNN.json`
with what the part was made of; without it the part does not exist. Of a part of a folder whose
pictures were removed since, `NNNNN.removed.npy` says which.

usearch (Apache-2.0) compares a query with every embedding, in vector code and on all cores.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import filelock
import numpy as np
import pyarrow
from PIL import Image

from diht_jax.data import retries
from diht_jax.data.atomic_file import temporary_path, write_atomically
from diht_jax.data.images.decode import ImageError, load_rgb, open_image
from diht_jax.data.readers import image_folder, registry
from diht_jax.data.readers.base import Skipped, SourceShard
from diht_jax.data.records.remote import refuse_url
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding.encoding import encode_images
from diht_jax.evaluation.embedding.files import (
    PICTURES,
    SETTINGS_FILE,
    Peekable,
    claim,
    read_object,
)
from diht_jax.evaluation.sources.entry_counts import EntryProgress

DTYPES = ("float16", "int8")
# Pictures a part: what an interruption can cost.
PART_ROWS = 10_000
# Pixels, of the longer side.
THUMBNAIL_SIDE = 160
# Of each part, so many times the requested matches are compared again in float32: the comparison
# in eight bits rounds the query, too.
_CANDIDATES = 4
_SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("caption", pyarrow.string()), ("thumbnail", pyarrow.binary())]
)


@dataclasses.dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        part, row: where it stands in the index.
        key: its path in the folder, or its key in the source.
        caption: that the source has for it, or "".
        similarity: cosine of the angle between picture and query.
    """

    part: int
    row: int
    key: str
    caption: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Update:
    """What `update_index` did.

    Attributes:
        added, removed, kept: numbers of pictures.
        dropped: reason -> entries that were left out, in this update and before.
    """

    added: int
    removed: int
    kept: int
    dropped: dict[str, int]


def update_index(
    model: Any,
    shards: Sequence[SourceShard],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    batch_size: int = 256,
    num_threads: int | None = None,
    thumbnails: bool = True,
) -> Update:
    """Makes the index of a source, or brings it up to date.

    Pictures that were added to a folder are embedded, and those that were changed again; of any
    other source a shard is the unit. What is no longer in the source leaves the index. An update
    that is interrupted loses the part that it was making.

    Args:
        model: a `LoadedModel`.
        shards: of `files.list_inputs`.
        folder: of the index; is made.
        dtype: of the stored embeddings, one of `DTYPES`.
        batch_size: pictures a batch, over all devices.
        num_threads: decoding threads; None is one per core.
        thumbnails: keep a small picture of each entry. Those of a folder of pictures are read
            from there instead.

    Raises:
        ValueError: the folder holds the index of another model or dtype, or another process is
            updating it.
    """
    refuse_url(folder, "index")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)} for an index")
    folder = pathlib.Path(folder)
    settings = {
        "index": 1,
        "model_sha256": model.fingerprint(),
        "image_size": model.image_size,
        "dtype": dtype,
    }
    claim(folder, settings)
    encode = functools.partial(
        encode_images, model, batch_size=batch_size, num_threads=num_threads, allow_empty=True
    )
    with _only_one_update(folder):
        return _Updater(folder, dtype, model.embed_dim, encode, thumbnails).run(shards)


@contextlib.contextmanager
def _only_one_update(folder: pathlib.Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--index={folder}: another process is updating it; wait for it") from None
    try:
        yield
    finally:
        lock.release()


class _Updater:
    """One update of an index."""

    def __init__(
        self, folder: pathlib.Path, dtype: str, dim: int, encode: Any, thumbnails: bool
    ) -> None:
        self._folder, self._dtype, self._dim = folder, dtype, dim
        self._encode = encode
        self._thumbnails = thumbnails
        self._manifests = _read_manifests(folder)
        self._added = self._removed = 0

    def run(self, shards: Sequence[SourceShard]) -> Update:
        identities = {_unit(shard): shard.identity() for shard in shards}
        for number, manifest in list(self._manifests.items()):
            identity = identities.get(manifest["unit"])
            is_folder = manifest["identity"]["kind"] == PICTURES
            if identity is None or not (is_folder or identity == manifest["identity"]):
                self._remove_part(number)
        with EntryProgress(shards) as progress:
            for shard in shards:
                add = self._add_pictures if shard.kind == PICTURES else self._add_shard
                add(shard, identities[_unit(shard)], progress)
                progress.finish_shard()
        dropped: collections.Counter[str] = collections.Counter()
        for manifest in self._manifests.values():
            dropped.update(manifest["dropped"])
        rows = len(PictureIndex(self._folder)) if self._manifests else 0
        return Update(self._added, self._removed, rows - self._added, dict(dropped))

    def _add_shard(
        self, shard: SourceShard, identity: dict[str, Any], progress: EntryProgress
    ) -> None:
        """Adds the parts of a shard that are missing."""
        done = [m for m in self._manifests.values() if m["unit"] == _unit(shard)]
        progress.update(sum(manifest["entries"] for manifest in done))
        if any(manifest["is_last"] for manifest in done):
            return
        entries = Peekable(registry.read_pairs(shard))
        # Entries of finished parts; images are not decoded.
        collections.deque(
            itertools.islice(entries, sum(manifest["entries"] for manifest in done)), maxlen=0
        )
        is_last = False
        while not is_last:
            taken = itertools.islice(entries, PART_ROWS)
            is_last = self._add_part(shard, identity, taken, progress, entries.is_exhausted)

    def _add_pictures(
        self, shard: SourceShard, identity: dict[str, Any], progress: EntryProgress
    ) -> None:
        """Adds the pictures of a folder that are new or changed, and marks those that are gone."""
        listed = list(image_folder.list_pictures(shard.path))
        states = {
            key: _file_state(path) if reason is None else reason for path, key, reason in listed
        }
        known = set()
        for number, manifest in list(self._manifests.items()):
            if manifest["unit"] == _unit(shard):
                current = {key for key, state in manifest["states"] if states.get(key) == state}
                if self._keep_rows(number, current):
                    known |= current
        new = [entry for entry in listed if entry[1] not in known]
        progress.update(len(listed) - len(new))
        for first in range(0, len(new), PART_ROWS):
            chunk = new[first : first + PART_ROWS]
            entries = image_folder.read_listed(shard.path, chunk)
            of_part = [(key, states[key]) for _, key, _ in chunk]
            self._add_part(shard, identity, entries, progress, lambda: True, of_part)

    def _keep_rows(self, number: int, keys: set[str]) -> bool:
        """Marks the rows of a folder's part with other keys as removed; returns if any is left."""
        part = _Part(self._folder, number)
        removed = np.array([key not in keys for key in part.rows["key"].to_pylist()], bool)
        if removed.all():
            self._remove_part(number)
            return False
        if (removed != part.removed).any():
            self._removed += int(removed.sum()) - int(part.removed.sum())
            write_atomically(self._folder / f"{number:05d}.removed.npy", _to_npy(removed))
        return True

    def _remove_part(self, number: int) -> None:
        part = _Part(self._folder, number)
        self._removed += len(part.rows) - int(part.removed.sum())
        del part, self._manifests[number]
        for suffix in ("json", "removed.npy", "arrow", "npy"):  # what makes it a part goes first
            (self._folder / f"{number:05d}.{suffix}").unlink(missing_ok=True)

    def _add_part(
        self,
        shard: SourceShard,
        identity: dict[str, Any],
        entries: Iterable[Pair | Skipped],
        progress: EntryProgress,
        is_last: Callable[[], bool],
        states: Sequence[tuple[str, str]] = (),
    ) -> bool:
        """Writes a part; returns what `is_last` says behind its last entry."""
        count = 0

        def counted() -> Iterator[Pair | Skipped]:
            nonlocal count
            for entry in entries:
                count += 1
                progress.update(1)
                yield entry

        keeps_thumbnails = self._thumbnails and shard.kind != PICTURES
        encoded = self._encode(
            counted(),
            lambda pair: (
                *(pair.key, pair.caption),
                _thumbnail(pair.image) if keeps_thumbnails else b"",
            ),
        )
        number = max(self._manifests, default=-1) + 1
        image_emb = encoded.image_emb.reshape(len(encoded.notes), self._dim)
        manifest = {
            "unit": _unit(shard),
            "identity": identity,
            "entries": count,
            "is_last": is_last(),
            "dropped": encoded.dropped,
            "states": list(states),
        }
        write_part(self._folder, number, quantize(image_emb, self._dtype), encoded.notes, manifest)
        self._manifests[number] = manifest
        self._added += len(image_emb)
        return manifest["is_last"]


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
    path = folder / f"{number:05d}"
    write_atomically(path.with_suffix(".npy"), _to_npy(stored))
    _write_rows(path.with_suffix(".arrow"), notes)
    write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())


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
        manifests = _read_manifests(folder)
        self._parts = {number: _Part(folder, number) for number in sorted(manifests)}
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
                "--model: the index was made with another model, or another --image_size; take "
                "that one, or another --index"
            )

    def search(self, text_emb: np.ndarray, count: int) -> list[list[Hit]]:
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
        return [[self._hit(*match) for match in sorted(matches)[:count]] for matches in found]

    def picture(self, part: int, row: int) -> bytes | None:
        """The thumbnail of a picture, a JPEG file.

        Returns:
            None where there is none, such as of a file that was removed since.
        """
        if part not in self._parts or not 0 <= row < len(self._parts[part].rows):
            return None
        rows = self._parts[part].rows
        if part not in self._folders:
            return rows["thumbnail"][row].as_py() or None
        key = rows["key"][row].as_py()
        root = self._folders[part]
        entry = next(image_folder.read_listed(root, [(os.path.join(root, key), key, None)]))
        return _thumbnail(entry.image) or None if isinstance(entry, Pair) else None

    def _hit(self, negative_similarity: float, number: int, row: int) -> Hit:
        rows = self._parts[number].rows
        key, caption = rows["key"][row].as_py(), rows["caption"][row].as_py()
        return Hit(number, row, key, caption, -negative_similarity)


class _Part:
    """The files of one part.

    Attributes:
        rows: table of key, caption and thumbnail.
        removed: bool [n], the rows that are no longer in the source.
    """

    def __init__(self, folder: pathlib.Path, number: int):
        path = folder / f"{number:05d}"
        try:
            self._image_emb = np.load(path.with_suffix(".npy"), mmap_mode="r")
            with pyarrow.memory_map(str(path.with_suffix(".arrow"))) as file:
                self.rows = pyarrow.ipc.open_file(file).read_all()
            marks = path.with_suffix(".removed.npy")
            self.removed = np.load(marks) if marks.exists() else np.zeros(len(self.rows), bool)
        except (ValueError, OSError, EOFError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{path}.*: damaged part of an index ({error}); delete {path.name}.json to have "
                "it made again"
            ) from error
        if not len(self._image_emb) == len(self.rows) == len(self.removed):
            raise ValueError(f"{path}.*: files of different lengths; delete {path.name}.json")

    def search(self, queries: np.ndarray, count: int) -> Iterator[list[tuple[float, int]]]:
        """For each query the rows nearest to it, with their similarities."""
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


def _unit(shard: SourceShard) -> str:
    return f"{shard.kind}:{shard.path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _file_state(path: str) -> str:
    status = retries.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _read_manifests(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """The manifests of all parts, by number."""
    manifests = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        manifest = read_object(str(path)) or {}
        if not {"unit", "identity", "entries", "is_last", "states"} <= manifest.keys():
            raise ValueError(f"{path}: no manifest of a part of an index; delete it")
        manifest["states"] = [tuple(state) for state in manifest["states"]]
        manifests[int(path.stem)] = manifest
    return manifests


def _thumbnail(data: bytes) -> bytes:
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


def _write_rows(path: pathlib.Path, notes: Sequence[tuple[str, str, bytes]]) -> None:
    columns = list(zip(*notes, strict=True)) or [(), (), ()]
    table = pyarrow.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
    temporary = temporary_path(path)
    try:
        with (
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_file(file, _SCHEMA) as to,
        ):
            to.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
