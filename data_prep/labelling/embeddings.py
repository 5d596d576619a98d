"""A teacher's embeddings of shards: one npz per shard, kept, so that they are computed only once.

The models are in `data_prep.teachers`. A file holds

    embeddings  float16 or float32 [m, d], of the m records that have one
    rows        int32 [m], their positions in the shard, ascending
    key_hashes  uint64 [n], of all n records; they divide the records into training and held-out
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.jobs import fingerprint, shards
from data_prep.jobs.crash_search import BATCH, PAIR, CrashSearch, WorkRecord, without_crashed
from data_prep.jobs.engine import Report
from data_prep.labelling.scratch import Scratch
from data_prep.teachers.base import Embedded, Teacher
from data_prep.teachers.registry import open_teacher
from diht_jax.readers.registry import Skipped, SourceShard, read_pairs
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.storage import files
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import StoreEnd, is_remote

FOLDER = "embeddings"
DTYPES = ("float16", "float32")

_FORMAT_VERSION = 1
# Where fewer embeddings than one in so many are wanted, they are read one by one.
_SPARSE = 8
# Of `rows` and `key_hashes` for each record, and of what a zip archive needs around them.
_KEY_BYTES, _DIRECTORY_BYTES = 12, 2**11


@dataclasses.dataclass(frozen=True)
class ShardEmbeddings:
    """What a file holds.

    Attributes:
        embeddings: [m, d].
        rows: int64 [m].
        key_hashes: uint64 [n].
        stats: the statistics beside it, where it was just written.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    key_hashes: np.ndarray
    stats: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingTask(shards.ShardTask):
    """A task whose output is a file of embeddings.

    Attributes:
        shard: name, records, bytes and digest of what is embedded, as in a `Fingerprint`; None
            where they are not known.
    """

    shard: tuple[str, int, int, str] | None = None


def plan_embeddings(
    label_tasks: Sequence[shards.ShardTask],
    identity: dict[str, Any],
    dtype: str,
    identified: Sequence[tuple[str, int, int, str] | None] | None = None,
) -> list[EmbeddingTask]:
    """The embedding task of every labelling task, in the folder `embeddings` of its output.

    Args:
        label_tasks: shards in, labelled shards out.
        identity: of the teacher.
        dtype: of the files, one of `DTYPES`.
        identified: the `shard` of each task.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"config.embedding_dtype='{dtype}'; expected {' or '.join(DTYPES)}")
    config_hash = hash_embeddings(identity, dtype)
    for folder in {os.path.dirname(task.output) for task in label_tasks}:
        files.make_folder(files.join(folder, FOLDER))
    identified = identified or [None] * len(label_tasks)
    return [
        EmbeddingTask(task.source, embedding_path(task.output), config_hash, shard=shard)
        for task, shard in zip(label_tasks, identified, strict=True)
    ]


def hash_embeddings(identity: dict[str, Any], dtype: str) -> str:
    """The fingerprint of all that decides the embeddings of a shard.

    Args:
        identity: of the teacher.
        dtype: of the files.
    """
    settings = {"format_version": _FORMAT_VERSION, "teacher": identity, "dtype": dtype}
    return shards.hash_config(settings)


def embedding_path(labelled_shard: str) -> str:
    """Where the embeddings of a labelled shard lie."""
    folder, name = os.path.split(labelled_shard)
    return files.join(folder, FOLDER, f"{name}.npz")


def embed_shard(
    task: shards.ShardTask,
    report: Report,
    *,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    scratch: Scratch | None = None,
    keeps_records: bool = False,
) -> dict[str, Any]:
    """Embeds one shard; arguments and errors as of `compute_embeddings`.

    Args:
        task, report, teacher, dtype: as there.
        scratch: gets a copy of the file.
        keeps_records: whether it gets a copy of the records as well.

    Returns:
        The statistics, as they lie beside the file.
    """
    keep = copy = None
    if scratch is not None:
        keep = scratch.keep
        if keeps_records:
            copy = scratch.reserve(task.source.path, files.size(task.source.path) or 0)
    found = compute_embeddings(
        task, report, teacher=teacher, dtype=dtype, keep=keep, records_copy=copy
    )
    return found.stats


def embed_for_driver(
    task: shards.ShardTask, report: Report, *, teacher: ml_collections.ConfigDict, dtype: str
) -> list[tuple[str, bytes]]:
    """Embeds one shard on another machine; arguments and errors as of `compute_embeddings`.

    Returns:
        Path and contents of the file, which the driver keeps a copy of.
    """
    written: list[tuple[str, bytes]] = []
    compute_embeddings(
        task, report, teacher=teacher, dtype=dtype, keep=lambda *file: written.append(file)
    )
    return written


def compute_embeddings(
    task: EmbeddingTask,
    report: Report,
    *,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    record_beside: str | None = None,
    keep: Callable[[str, bytes], None] | None = None,
    records_copy: str | None = None,
) -> ShardEmbeddings:
    """Embeds one shard and writes its file.

    Args:
        task: of `plan_embeddings`.
        report: called with the number of records that are done.
        teacher: config section of `teachers.registry.default_teacher`.
        dtype: of the file.
        record_beside: output of the task whose worker may die of a record; None is this task's.
        keep: called with path and contents of the file.
        records_copy: path of a TFRecord file that gets the records that were read.

    Returns:
        What lies in the file.

    Raises:
        ValueError: a damaged shard, a teacher that gives no proper embeddings, or values that
            float16 cannot hold.
    """
    files.remove(task.stats_path)
    described = fingerprint.describe(task.source, task.identity)
    key_hashes: list[int] = []

    def read_hashing_keys() -> Iterator[Record]:
        for record in read_shard(task.source):
            key_hashes.append(hash_key(record.key))
            if copy is not None:
                copy.write(encode_record(record))
            yield record

    vectors, rows, missing, position = [], [], {}, 0
    with (
        WorkRecord(record_beside or task.output, task.search) as work,
        TFRecordWriter(records_copy) if records_copy else contextlib.nullcontext() as copy,
    ):
        opened = open_teacher(teacher)
        for results in embed_surviving(
            read_hashing_keys(), opened, teacher.batch_size, task.search, work
        ):
            for result in results:
                if isinstance(result, str):
                    missing[result] = missing.get(result, 0) + 1
                else:
                    vectors.append(result.astype(dtype))
                    rows.append(position)
                position += 1
            report(len(results))
    embeddings = np.stack(vectors) if vectors else np.zeros((0, 0), dtype)
    if not np.isfinite(embeddings).all():
        raise ValueError(
            f"{task.source}: an embedding is too large for {dtype}; set "
            "config.embedding_dtype='float32'"
        )
    buffer = io.BytesIO()
    arrays = {"rows": np.array(rows, np.int32), "key_hashes": np.array(key_hashes, np.uint64)}
    np.savez(buffer, embeddings=embeddings, **arrays)
    files.write_bytes(task.output, buffer.getvalue())
    if keep is not None:
        keep(task.output, buffer.getvalue())
    counts = {"embedded": len(rows), "missing": dict(sorted(missing.items())), "shard": task.shard}
    stats = shards.finish_task(task, described, counts, len(key_hashes))
    return ShardEmbeddings(embeddings, np.array(rows, np.int64), arrays["key_hashes"], stats)


def embed_surviving(
    records: Iterator[Record],
    teacher: Teacher,
    batch_size: int,
    search: CrashSearch | None,
    work: WorkRecord,
) -> Iterator[list[Embedded]]:
    """What `Teacher.embed` yields; looks for the record that ends the worker once one has died.

    Args:
        records: of a shard.
        teacher: that embeds them.
        batch_size: records that are embedded at once in a search.
        search, work: see `jobs.crash_search`.
    """
    if search is None:
        yield from teacher.embed(records)
        return
    first, entries = 0, without_crashed(records, search.crashed)
    while chunk := list(itertools.islice(entries, batch_size)):
        batch = first, first + len(chunk)
        if search.suspects == batch:
            for number, entry in enumerate(chunk, first):
                if isinstance(entry, Record):
                    work.write(PAIR, number, number + 1)
                    teacher.embed_all([entry])
        work.write(BATCH, *batch)
        found = iter(teacher.embed_all([entry for entry in chunk if isinstance(entry, Record)]))
        yield [next(found) if isinstance(entry, Record) else entry.reason for entry in chunk]
        first += len(chunk)


def load_embeddings(path: str) -> ShardEmbeddings:
    """Reads one file.

    Raises:
        ValueError: it is missing or damaged.
    """
    return _load(
        path,
        lambda file: ShardEmbeddings(
            file["embeddings"], file["rows"].astype(np.int64), file["key_hashes"]
        ),
    )


def load_keys(path: str, num_records: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` and `key_hashes` of a file; the embeddings are not read.

    Args:
        path: of the file.
        num_records: n; of a file in a store the end that holds as many is fetched first.

    Raises:
        ValueError: it is missing or damaged.
    """
    is_stored, end = is_remote(os.fspath(path)), _KEY_BYTES * num_records + _DIRECTORY_BYTES
    with _explain_damage(path):
        opened = io.BufferedReader(StoreEnd(path, end), 2**16) if is_stored else path
        # `np.load` would read the start of the file as well.
        with zipfile.ZipFile(opened) as archive:
            arrays = []
            for name in ("rows", "key_hashes"):
                with archive.open(f"{name}.npy") as member:
                    arrays.append(np.lib.format.read_array(member, allow_pickle=False))
    return arrays[0].astype(np.int64), arrays[1]


def open_embeddings(
    path: str,
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """`rows` and `key_hashes` of a file, and what gives some of its embeddings by their numbers.

    Of a file in a store all is read at once, of a local one no more than is asked for. Errors as of
    `load_embeddings`.
    """
    if is_remote(os.fspath(path)):
        found = load_embeddings(path)
        return found.rows, found.key_hashes, found.embeddings.__getitem__
    return *load_keys(path, 0), functools.partial(load_some, path)


def load_some(path: str, numbers: np.ndarray) -> np.ndarray:
    """Some embeddings of a local file; the others are not read where these are few.

    Args:
        path: of the file.
        numbers: int [k], in [0, m).

    Raises:
        ValueError: the file is missing or damaged.
    """

    def read(file: Any) -> np.ndarray:
        if len(numbers) * _SPARSE > len(file["rows"]):
            return file["embeddings"][numbers]
        return _read_rows(path, numbers)

    return _load(path, read)


def _read_rows(path: str, rows: np.ndarray) -> np.ndarray:
    """Rows of the embeddings of a local file, by one read each."""
    with zipfile.ZipFile(path) as archive, open(path, "rb", buffering=0) as file:
        member = archive.getinfo("embeddings.npy")
        file.seek(member.header_offset + 26)  # the lengths of its name and extra field
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        with archive.open(member) as array:
            np.lib.format.read_magic(array)
            shape, _, dtype = np.lib.format.read_array_header_1_0(array)
            start += array.tell()
        size = shape[1] * dtype.itemsize
        data = b"".join(os.pread(file.fileno(), size, start + row * size) for row in rows.tolist())
    return np.frombuffer(data, dtype).reshape(len(rows), shape[1])


def _load(path: str, read: Callable[[Any], Any]) -> Any:
    with _explain_damage(path):
        opened = io.BytesIO(files.read_bytes(path)) if is_remote(os.fspath(path)) else path
        with np.load(opened, allow_pickle=False) as file:
            return read(file)


@contextlib.contextmanager
def _explain_damage(path: str) -> Iterator[None]:
    try:
        yield
    except StorageError:  # the file may be good
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a whole file of embeddings ({error}); delete it and run data_prep.label "
            "again"
        ) from error


def read_shard(source: SourceShard) -> Iterator[Record]:
    """The records of a shard of any format.

    Raises:
        ValueError: a damaged shard or record; names it.
    """
    for number, entry in enumerate(read_pairs(source)):
        if isinstance(entry, Skipped):
            raise ValueError(
                f"{source}: record {number} ('{entry.key}') is no pair: {entry.reason} "
                f"({entry.detail}); filter the shard again"
            )
        if not isinstance(entry, Record):
            entry = Record(entry.key, entry.image, entry.caption, entry.metadata)
        yield entry


def hash_key(key: str) -> int:
    """64 bits that belong to a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def key_ranks(key_hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each key: the same in any shard, order and run.

    Args:
        key_hashes: uint64 [n].
        seed: another one gives independent numbers.
    """
    # The finaliser of splitmix64 (Steele et al. 2014).
    x = key_hashes + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
