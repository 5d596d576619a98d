"""Embeddings of a teacher for every shard, stored to be computed only once.

`embeddings/NAME.tfrecord` has one record for each record of the shard NAME, in the same order: a
`tf.train.Example` with the features

    key                key of the record
    embedding_float16  [d], little-endian; or `embedding_float32`
    missing            the reason if there is no embedding, in place of it

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
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from data_prep.jobs import shards
from data_prep.jobs.engine import Report, WorkRecord
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.base import Embedded, Teacher
from data_prep.teachers.registry import open_teacher
from diht_jax.readers.registry import Skipped, SourceShard, read_pairs
from diht_jax.records.formats import TFRecordWriter
from diht_jax.records.labels.shards import decode_features, decode_key, encode_features, encode_key
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.shard_files import RecordHash, RecordWriter, read_records
from diht_jax.storage import files
from diht_jax.storage.stores import StorageError, is_remote

FOLDER = "embeddings"
DTYPES = ("float16", "float32")

_FORMAT_VERSION = 2
_KEY, _EMBEDDING, _MISSING = "key", "embedding_", "missing"


class ShardEmbeddings(NamedTuple):
    """Embeddings of a shard.

    Attributes:
        keys: keys of all n records.
        rows: int64 [m], positions of the m records that have an embedding, ascending.
        embeddings: [m, d], the embeddings of these records.
        missing: reason -> number of records without an embedding.
    """

    keys: list[str]
    rows: np.ndarray
    embeddings: np.ndarray
    missing: dict[str, int]


@dataclasses.dataclass(frozen=True)
class LocalCopies:
    """Copies on the local disk of remote files that are read again soon.

    Workers on this machine copy the embeddings used for training the heads, which labelling reads
    again, and the records if labels are merged.

    Attributes:
        folder: folder of the copies; None disables copies.
        max_bytes: no file is added above this size (each worker may exceed it by one file).
        with_records: whether records are copied in addition to embeddings.
    """

    folder: str | None = None
    max_bytes: float = 0
    with_records: bool = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, max_bytes: float, with_records: bool) -> Generator[LocalCopies]:
        """Makes a temporary folder for copies, which is removed at the end."""
        with tempfile.TemporaryDirectory(prefix="diht_label_") as folder:
            yield cls(folder, max_bytes, with_records)

    @contextlib.contextmanager
    def write(self, path: str) -> Generator[Callable[[bytes], None] | None]:
        """Opens the copy of a file of records for writing.

        Yields:
            A function that writes one record; None if the file is local, or if there is no space.
        """
        copy = self._copy_of(path)
        if copy is None or self._num_bytes() >= self.max_bytes:
            yield None
            return
        with TFRecordWriter(copy) as writer:
            yield writer.write

    def find(self, path: str) -> str | None:
        """Returns the path of a file's copy; None if there is none."""
        found = self._copy_of(path)
        return found if found and os.path.exists(found) else None

    def _copy_of(self, path: str) -> str | None:
        if self.folder is None or not is_remote(path):
            return None
        digest = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, f"{digest}.tfrecord")

    def _num_bytes(self) -> int:
        if self.folder is None:
            return 0
        names = files.list_names(self.folder)
        return sum(files.size(files.join(self.folder, name)) or 0 for name in names)


NO_COPIES = LocalCopies()


def load_embeddings(task: shards.ShardTask, copies: LocalCopies = NO_COPIES) -> ShardEmbeddings:
    """Reads the embeddings of one shard.

    Raises:
        ValueError: the file is missing or damaged, or differs from the one that was written.
    """
    path = copies.find(task.output) or task.output
    keys, rows, vectors, dtype = [], [], [], DTYPES[0]
    missing: collections.Counter[str] = collections.Counter()
    hashed = RecordHash()
    try:
        for row, data in enumerate(read_records(path)):
            hashed.update(data)
            features = decode_features(data)
            keys.append(decode_key(features[_KEY]))
            if _MISSING in features:
                missing[features[_MISSING].decode()] += 1
                continue
            rows.append(row)
            dtype = next((name for name in DTYPES if _EMBEDDING + name in features), dtype)
            little_endian = np.dtype(dtype).newbyteorder("<")
            vectors.append(np.frombuffer(features[_EMBEDDING + dtype], little_endian))
        if hashed.digest() != shards.read_json(task.stats_path)["output"]["digest"]:
            raise ValueError("its records are not those that were written")
        embeddings = (np.stack(vectors) if vectors else np.zeros((0, 0))).astype(dtype)
        return ShardEmbeddings(
            keys, np.array(rows, np.int64), embeddings, dict(sorted(missing.items()))
        )
    except StorageError:  # the file itself may be good
        raise
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a whole file of embeddings ({error}); delete it and run data_prep.label "
            "again"
        ) from error


def hash_embeddings(identity: dict[str, Any], dtype: str) -> str:
    """Hashes all settings that determine the embeddings of a shard."""
    settings = {"format_version": _FORMAT_VERSION, "teacher": identity, "dtype": dtype}
    return shards.hash_config(settings)


def embed_shard(
    task: LabelTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    copies: LocalCopies = NO_COPIES,
) -> None:
    """Embeds one shard, writes the embeddings, and makes local copies of files read again soon.

    Raises:
        ValueError: the shard is damaged, the teacher returns invalid embeddings, or their values
            exceed the range of float16.
    """
    made = dataclasses.replace(task.embedding, search=task.search)

    def process(source: SourceShard, writer: RecordWriter) -> dict[str, Any]:
        encoded: list[bytes] = []
        missing: collections.Counter[str] = collections.Counter()
        of_records = copies if copies.with_records else NO_COPIES
        teacher = open_teacher(config.teacher)
        embedded = embed_records(task, report, teacher, config.teacher.batch_size)
        with of_records.write(source.path) as copy:
            for record, result in embedded:
                if isinstance(result, str):
                    missing[result] += 1
                encoded.append(_encode(record.key, result, config.embedding_dtype, source))
                if copy is not None:
                    copy(encode_record(record))
        with copies.write(made.output) as copy:
            for data in encoded:
                writer.write(data)
                if copy is not None:
                    copy(data)
        return {
            "embedded": len(encoded) - missing.total(),
            "missing": dict(sorted(missing.items())),
        }

    shards.run_task(made, process)


def _encode(key: str, result: Embedded, dtype: str, source: SourceShard) -> bytes:
    """Encodes one record; raises ValueError if the embedding exceeds the range of the dtype."""
    if isinstance(result, str):
        return encode_features({_KEY: encode_key(key), _MISSING: result.encode()})
    stored = result.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.isfinite(stored).all():
        raise ValueError(
            f"{source}: an embedding is too large for {dtype}; set config.embedding_dtype='float32'"
        )
    return encode_features({_KEY: encode_key(key), _EMBEDDING + dtype: stored.tobytes()})


def embed_records(
    task: LabelTask, report: Report, teacher: Teacher, batch_size: int
) -> Iterator[tuple[Record, Embedded]]:
    """Yields each record of a shard with its embedding, or the reason why it has none.

    After a worker has died of the task, it searches for the record that kills the worker.
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
    """Like `Teacher.embed`, but skips the records that killed their worker."""
    while batch := list(itertools.islice(records, batch_size)):
        entries = work.begin(batch, lambda record: teacher.embed_all([record]))
        found = iter(teacher.embed_all([entry for entry in entries if isinstance(entry, Record)]))
        yield [next(found) if isinstance(entry, Record) else entry.reason for entry in entries]


def read_shard(source: SourceShard) -> Iterator[Record]:
    """Yields the records of a shard of any format.

    Raises:
        ValueError: the shard or a record is damaged; the message names it.
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


def key_ranks(key_hashes: np.ndarray, seed: int) -> np.ndarray:
    """Returns a pseudo-random number in [0, 1) per key, independent of shard, order and run.

    Different seeds give independent numbers.
    """
    # The finaliser of splitmix64 (Steele et al. 2014).
    x = key_hashes + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
