"""Decoding of a run's examples in sub-batches, with replacement of bad records.

A host's batch may have ten gigabytes. One worker would need a minute for it, and several batches in
each worker's queue would exceed the memory. A sub-batch of 256 rows has about 40 MB.

A bad record is replaced by the one at the index plus a stride in the order. The stride is a
multiple of the batch size, so the replacement is never in the same batch, unless the data set is
smaller; the same pair twice would be its own negative. The choice depends only on the index, so it
is the same on any number of hosts and workers, and after a restart. The readers decide which
records are bad: `records/shard_files.py` by framing, `records/schema.py` by fields, and
`transforms.py` by image.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import ml_collections
import numpy as np

from diht_jax.input.mixing import Mixture
from diht_jax.input.workers import start_worker
from diht_jax.records.shard_files import TFRecordError, is_of_one_record
from diht_jax.storage.stores import StorageError

# Field of a batch: for each row, the number of bad records skipped to find it.
SKIPPED_RECORDS = "skipped_records"
# Largest number of rows of a part.
MAX_ROWS = 256
# Records tried for one row of a batch. If all are bad, the damage is not limited to single records.
MAX_IN_A_ROW = 100
# Records that are read before their images are decoded; limits the memory.
_GROUP_ROWS = 32


@dataclasses.dataclass(eq=False, repr=False)
class SubBatches(Sequence[dict[str, np.ndarray]]):
    """The sequence of parts (sub-batches) of a host's batches, as a grain data source.

    Part i of the run has the host's rows [i * rows, (i + 1) * rows). An example is a function of
    the seed and of its index in the run's order.

    Attributes:
        rows: rows of a part.
        parts_per_batch: parts of this host's batch.
        skips: whether bad records are replaced.
    """

    # For these, see `pipeline.TrainIterator`.
    records: Mixture
    data: dataclasses.InitVar[ml_collections.ConfigDict]
    seed: int = dataclasses.field(kw_only=True)
    process_index: int = 0
    process_count: int = 1
    record_ids: bool = False

    def __post_init__(self, data: ml_collections.ConfigDict):
        """Reads nothing yet.

        Raises:
            ValueError: the batch size is not divisible by the hosts.
        """
        batch_size = self._batch_size = data.batch_size
        if batch_size % self.process_count:
            raise ValueError(
                f"config.data.batch_size={batch_size} is no multiple of the {self.process_count} "
                "processes; choose a multiple"
            )
        self._key = np.random.Philox(self.seed).state["state"]["key"]
        self.skips = data.on_bad_record == "skip"
        self._stride = batch_size * self.records.same_source_batches
        self._first_example = 0
        self._ahead = 0
        self._excluded: dict[Hashable, str] = {}
        local = batch_size // self.process_count
        self.rows = next(n for n in range(min(MAX_ROWS, local), 0, -1) if local % n == 0)
        self.parts_per_batch = local // self.rows

    def starting_at(self, first_example: int, ahead: int = 0) -> SubBatches:
        """Returns the same examples with part 0 starting at an index of the order.

        `ahead` is the read-ahead distance in parts; see `InFlight.plan_blocks`.
        """
        other = copy.copy(self)
        other._first_example, other._ahead = first_example, ahead
        return other

    def __len__(self) -> int:
        """Practically endless; bounded only because grain needs an integer."""
        return sys.maxsize // (self.rows * self.process_count) // 2

    def __repr__(self) -> str:
        return f"SubBatches(rows={self.rows}, first_example={self._first_example})"

    def batch(self, first_example: int) -> range:
        """Returns this host's indices of the batch that starts at an index of the order."""
        end = first_example + self._batch_size
        return range(first_example + self.process_index, end, self.process_count)

    def indices(self, part: int) -> range:
        """Returns the indices in the run's order of the examples of a part."""
        stride = self.process_count
        first = self._first_example + self.process_index + part * self.rows * stride
        return range(first, first + self.rows * stride, stride)

    def __getitem__(self, part: int) -> dict[str, np.ndarray]:
        """Decodes a part as arrays [rows, ...].

        Raises:
            ValueError: a record is bad, or too many in a row are; names file and record.
            StorageError: the disk or the store fails.
        """
        if self._ahead:
            later = part + self._ahead
            # No earlier part has requested the blocks of the first parts.
            for wanted in (part, later) if part < self._ahead else (later,):
                self.records.request(self.indices(wanted))
        arrays: dict[str, np.ndarray] = {}
        for row, example in enumerate(self._examples(self.indices(part))):
            for name, value in example.items():
                if not row:
                    arrays[name] = np.empty((self.rows, *np.shape(value)), np.asarray(value).dtype)
                arrays[name][row] = value
        return arrays

    def exclude(self, index: int, problem: str) -> None:
        """Marks the record at an index as bad, so it is no longer decoded."""
        self._excluded[self.records.find(index)] = problem

    def candidates(self, index: int) -> range:
        """Returns the indices whose records are tried for an index, in order."""
        last = index + (MAX_IN_A_ROW if self.skips else 1) * self._stride
        return range(index, last, self._stride)

    def explain(self, index: int) -> str:
        """Returns the reason why the record at an index is bad."""
        try:
            self.decode(index)
        except ValueError as error:
            return str(error)
        path, record = self.records.locate(index)
        return f"{path}: record {record}: could be read at the second attempt"

    def find(self, index: int) -> tuple[dict[str, Any], int]:
        """Returns the first good example among the candidates for an index, and its index."""
        for tried in self.candidates(index):
            try:
                return self.decode(tried), tried
            except ValueError as error:
                if not self.skips or not is_of_one_record(error):
                    raise
                last = error
        raise ValueError(
            f"{MAX_IN_A_ROW} records in a row are bad, more than config.data.on_bad_record='skip' "
            f"replaces; the last one: {last}"
        )

    def decode(self, index: int) -> dict[str, Any]:
        """Decodes the example at an index, without replacing a bad record.

        Raises:
            ValueError: the record is bad; names file and record.
        """
        try:
            return self._plan(index)()
        except (TFRecordError, StorageError):
            raise  # the message already names file and record
        except ValueError as error:
            path, record = self.records.locate(index)
            raise ValueError(f"{path}: record {record}: {error}") from error

    def _examples(self, indices: range) -> Iterator[dict[str, Any]]:
        """Yields the examples at indices; prepares a group of them before decoding their pixels.

        Decoding an image evicts everything else from the CPU's caches. Interleaved with decoding,
        the other steps would take twice as long.
        """
        for first in range(0, len(indices), _GROUP_ROWS):
            group = indices[first : first + _GROUP_ROWS]
            plans: dict[int, Callable[[], dict[str, Any]]] = {}
            for index in group:
                try:
                    plans[index] = self._plan(index, fetch=True)
                except ValueError as error:
                    if not is_of_one_record(error):
                        raise
            for index in group:
                try:
                    example, used = plans[index](), index
                except (KeyError, ValueError):  # retried for its error or its replacement
                    example, used = self.find(index)
                if self.record_ids:
                    example["record_ids"] = np.int32(self.records.record_id(used))
                if self.skips:
                    example[SKIPPED_RECORDS] = np.int32((used - index) // self._stride)
                yield example

    def _plan(self, index: int, *, fetch: bool = False) -> Callable[[], dict[str, Any]]:
        """Prepares an example except for its pixels, which the returned function decodes."""
        if self._excluded:
            problem = self._excluded.get(self.records.find(index))
            if problem is not None:
                raise ValueError(problem)
        source, record = self.records.read(index, fetch=fetch)
        return source.decode.plan(record, self._generator(index), index)

    def _generator(self, index: int) -> np.random.Generator:
        """Returns this thread's generator in the state of an index; a new one reads entropy."""
        rng = getattr(_kept, "rng", None)
        if rng is None:
            rng = _kept.rng = np.random.Generator(np.random.Philox(0))
        rng.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, 0, index], np.uint64), "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return rng


_kept = threading.local()


def find_crashing_index(examples: SubBatches, indices: Iterable[int]) -> int | None:
    """Returns the index of a record that reproducibly crashes its decoding process, or None.

    A crash in a codec kills the whole worker, which cannot report the image. Therefore a new
    process decodes the records in question, and their possible replacements, one by one. A record
    that crashes it is decoded again, alone in another process. Only if this crashes as well, the
    record is the cause, and not, for example, a lack of memory.
    """
    suspect = _index_at_death(examples, indices)
    if suspect is not None and _index_at_death(examples, [suspect]) == suspect:
        return suspect
    return None


def _index_at_death(examples: SubBatches, indices: Iterable[int]) -> int | None:
    """Returns the index that a new process was decoding when it died; None if it did not die."""
    context = multiprocessing.get_context("spawn")  # as grain starts its workers
    arguments = (os.getpid(), examples)
    tried = None
    with futures.ProcessPoolExecutor(1, context, _start_search, arguments) as process:
        try:
            process.submit(os.getpid).result()  # waits until it has started
            for index in indices:
                for tried in examples.candidates(index):
                    if process.submit(_is_good, tried).result():
                        break
        except BrokenProcessPool:
            return tried
    return None


def _start_search(parent: int, examples: SubBatches) -> None:
    start_worker(parent, None)
    _kept.examples = examples


def _is_good(index: int) -> bool:
    try:
        _kept.examples.decode(index)
    except StorageError:
        raise
    except ValueError:
        return False
    return True
