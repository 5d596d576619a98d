"""A teacher's embeddings of shards, kept so that they are computed only once.

`embeddings/NAME.tfrecord` has one record for each record of the shard NAME, in its order: a
`tf.train.Example` with the features

    key                of the record
    embedding_float16  [d], little-endian; or `embedding_float32`
    missing            why the teacher gave no embedding, in place of it

The models are in `data_prep.teachers`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.jobs import shards
from data_prep.jobs.crash_search import WorkRecord
from data_prep.jobs.engine import Report
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.base import Embedded, Teacher
from data_prep.teachers.registry import open_teacher
from diht_jax.readers.registry import Skipped, SourceShard, read_pairs
from diht_jax.records.format import read_records
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.labels.shards import (
    decode_features,
    decode_key,
    encode_features,
    encode_key,
)
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.storage import files
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote

FOLDER = "embeddings"
DTYPES = ("float16", "float32")

_FORMAT_VERSION = 2
_KEY, _EMBEDDING, _MISSING = "key", "embedding_", "missing"
_GB = 10**9


class ShardEmbeddings:
    """The embeddings of a shard.

    Attributes:
        keys: of all n records.
        rows: int64 [m], positions of the m records that have an embedding, ascending.
        embeddings: [m, d], theirs.
        missing: why each of the others has none.
    """

    def __init__(self, keys: list[str], results: Sequence[Embedded], dtype: str):
        """Takes what a teacher gave of each record."""
        found = {i: result for i, result in enumerate(results) if not isinstance(result, str)}
        self.keys = keys
        self.rows = np.array(list(found), np.int64)
        self.embeddings = np.stack([*found.values()]) if found else np.zeros((0, 0))
        self.embeddings = self.embeddings.astype(dtype)
        self.missing = [result for result in results if isinstance(result, str)]

    def count_missing(self) -> dict[str, int]:
        """Reason -> records that have no embedding because of it."""
        return dict(sorted(collections.Counter(self.missing).items()))

    def encode(self) -> Iterator[bytes]:
        """The n records of its file."""
        dtype, missing = self.embeddings.dtype, iter(self.missing)
        stored = self.embeddings.astype(dtype.newbyteorder("<"))
        vectors = dict(zip(self.rows.tolist(), stored, strict=True))
        for row, key in enumerate(self.keys):
            if row in vectors:
                value = {_EMBEDDING + dtype.name: vectors[row].tobytes()}
            else:
                value = {_MISSING: next(missing).encode()}
            yield encode_features({_KEY: encode_key(key), **value})


def load_embeddings(task: shards.ShardTask, copies: LocalCopies | None = None) -> ShardEmbeddings:
    """Reads the embeddings of one shard.

    Args:
        task: that has made them.
        copies: where a copy may be.

    Raises:
        ValueError: the file is missing, damaged, or not the one that was written.
    """
    path = (copies and copies.find(task.output)) or task.output
    keys, results, dtype = [], [], DTYPES[0]
    hashed = shards.RecordHash()
    try:
        for data in read_records(path):
            hashed.update(data)
            features = decode_features(data)
            keys.append(decode_key(features[_KEY]))
            if _MISSING in features:
                results.append(features[_MISSING].decode())
                continue
            dtype = next((name for name in DTYPES if _EMBEDDING + name in features), dtype)
            little_endian = np.dtype(dtype).newbyteorder("<")
            results.append(np.frombuffer(features[_EMBEDDING + dtype], little_endian))
        if hashed.digest() != shards.read_json(task.stats_path)["output"]["digest"]:
            raise ValueError("its records are not those that were written")
        return ShardEmbeddings(keys, results, dtype)
    except StorageError:  # the file may be good
        raise
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a whole file of embeddings ({error}); delete it and run data_prep.label "
            "again"
        ) from error


@dataclasses.dataclass(frozen=True)
class LocalCopies:
    """A folder on the local disk with copies of what a run will read again from a store.

    The heads learn from some shards, whose embeddings are computed, read for the training, and read
    once more for the labels; where labels are merged, so are their records. Workers on this machine
    leave copies here.

    Attributes:
        folder: of the copies.
        max_bytes: once they are larger, no more is kept (by a file for each worker at most).
    """

    folder: str
    max_bytes: float

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: ml_collections.ConfigDict, *paths: str) -> Iterator[LocalCopies | None]:
        """A folder of the driver for a run, removed at its end.

        Args:
            config: of `labelling.config.default_config`.
            *paths: of the output, and of the input where it is read again.

        Yields:
            None where it would save nothing, since none of the paths is in a store.
        """
        if not any(map(is_remote, paths)) or not config.scratch_gb:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="diht_label_") as folder:
            yield cls(folder, config.scratch_gb * _GB)

    def reserve(self, path: str, num_bytes: int = 0) -> str | None:
        """The path for a copy of a file; None where there is no room for it."""
        with os.scandir(self.folder) as entries:
            kept = sum(entry.stat().st_size for entry in entries)
        return None if kept + num_bytes > self.max_bytes else self._copy_of(path)

    def find(self, path: str) -> str | None:
        """The copy of a path; None where there is none."""
        return self._copy_of(path) if os.path.exists(self._copy_of(path)) else None

    def _copy_of(self, path: str) -> str:
        digest = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, f"{digest}.tfrecord")


def hash_embeddings(identity: dict[str, Any], dtype: str) -> str:
    """The fingerprint of all that decides the embeddings of a shard.

    Args:
        identity: of the teacher.
        dtype: of the files, one of `DTYPES`.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"config.embedding_dtype='{dtype}'; expected {' or '.join(DTYPES)}")
    settings = {"format_version": _FORMAT_VERSION, "teacher": identity, "dtype": dtype}
    return shards.hash_config(settings)


def embed_shard(
    task: LabelTask,
    report: Report,
    *,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    copies: LocalCopies | None = None,
    keeps_records: bool = False,
) -> None:
    """Embeds one shard, and leaves a copy of the embeddings, or of the records as well.

    Arguments and errors of `compute_embeddings`.
    """
    records_copy = None
    if copies is not None and keeps_records:
        records_copy = copies.reserve(task.source.path, files.size(task.source.path) or 0)
    found = compute_embeddings(task, report, teacher, dtype, records_copy=records_copy)
    if copies is not None and (copy := copies.reserve(task.output)):
        with TFRecordWriter(copy) as writer:
            for data in found.encode():
                writer.write(data)


def compute_embeddings(
    task: LabelTask,
    report: Report,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    *,
    work_output: str | None = None,
    records_copy: str | None = None,
) -> ShardEmbeddings:
    """Embeds one shard and writes its file.

    Args:
        task: of `tasks.plan_outputs`.
        report: called with the number of records that are done.
        teacher: config section of `teachers.registry.default_teacher`.
        dtype: of the file.
        work_output: output of the task whose worker may die of a record; None is this task's.
        records_copy: path of a TFRecord file that gets the records that were read.

    Raises:
        ValueError: a damaged shard, a teacher that gives no proper embeddings, or values that
            float16 cannot hold.
    """
    found: ShardEmbeddings | None = None

    def process(source: SourceShard, writer: RecordWriter) -> dict[str, Any]:
        nonlocal found
        keys, results = [], []
        with TFRecordWriter(records_copy) if records_copy else contextlib.nullcontext() as copy:
            embedded = embed_records(
                dataclasses.replace(task, output=work_output or task.output),
                report,
                open_teacher(teacher),
                teacher.batch_size,
            )
            for record, result in embedded:
                keys.append(record.key)
                results.append(result if isinstance(result, str) else result.astype(dtype))
                if copy is not None:
                    copy.write(encode_record(record))
        found = ShardEmbeddings(keys, results, dtype)
        if not np.isfinite(found.embeddings).all():
            raise ValueError(
                f"{source}: an embedding is too large for {dtype}; set "
                "config.embedding_dtype='float32'"
            )
        for data in found.encode():
            writer.write(data)
        return {"embedded": len(found.rows), "missing": found.count_missing()}

    shards.run_task(task, process)
    return found


def embed_records(
    task: LabelTask, report: Report, teacher: Teacher, batch_size: int
) -> Iterator[tuple[Record, Embedded]]:
    """Yields each record of a shard, with its embedding or why it has none.

    Once a worker has died of the task, it looks for the record that ends it.

    Args:
        task: whose shard it is, and next to whose output is recorded what is worked on.
        report: called with the number of records that are done.
        teacher: that embeds them.
        batch_size: records that are embedded at once in a search.
    """
    waiting: collections.deque[Record] = collections.deque()

    def read() -> Iterator[Record]:
        for record in read_shard(task.source):
            waiting.append(record)
            yield record

    with WorkRecord(task.output, task.search) as work:
        batches: Iterable[list[Embedded]]
        if task.search is None:
            batches = teacher.embed(read())
        else:
            batches = _embed_surviving(read(), teacher, batch_size, work)
        for batch in batches:
            for result in batch:
                yield waiting.popleft(), result
            report(len(batch))


def _embed_surviving(
    records: Iterator[Record], teacher: Teacher, batch_size: int, work: WorkRecord
) -> Iterator[list[Embedded]]:
    """Like `Teacher.embed`, without the records that have ended their worker."""
    while batch := list(itertools.islice(records, batch_size)):
        entries = work.begin(batch, lambda record: teacher.embed_all([record]))
        found = iter(teacher.embed_all([entry for entry in entries if isinstance(entry, Record)]))
        yield [next(found) if isinstance(entry, Record) else entry.reason for entry in entries]


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


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """uint64 [n]: 64 bits that belong to each key."""
    digests = (hashlib.blake2b(encode_key(key), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), "<u8")


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
