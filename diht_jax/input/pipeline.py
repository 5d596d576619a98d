"""The training input (grain): record shards -> shuffled, decoded, tokenized uint8 batches.

The order of examples is a function of (seed, position) only. It does not depend on workers, hosts
or devices, so a run can be resumed on other machines.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags, logging

from diht_jax.input import workers
from diht_jax.input.blocks import BlockStore
from diht_jax.input.in_flight import InFlight, Joiner
from diht_jax.input.mixing import Mixture, Source
from diht_jax.input.order import BlockOrder, derived_seed
from diht_jax.input.sub_batches import SKIPPED_RECORDS, SubBatches, find_crashing_index
from diht_jax.storage.stores import is_remote

# Restarts of dead workers at the same batch before the run fails.
MAX_RESTARTS = 3
# Bad records that are named in the log; further ones are only counted.
_MAX_NAMED = 100
# Files that a message names.
_MAX_FILES = 3
# Depth of the random crops below the seed in the earlier grain graph; see `derived_seed`.
_CROP_DEPTH = 3


class StoppedWaiting(Exception):
    """A stop was requested while the batch at `position`, from `get_state`, did not arrive."""

    def __init__(self, position: dict[str, int]):
        super().__init__("the input stalls")
        self.position = position


@dataclasses.dataclass(eq=False)
class TrainIterator:
    """An endless iterator over this process's part of the global batches.

    Batch i of the run has the examples [i * N, (i + 1) * N) of an endless order with each record
    once an epoch. Process p of P takes every P-th of them.

    Raises:
        ValueError: inconsistent numbers in the config, or too little memory.

    Attributes:
        skipped_records: number of this process's bad records so far, each replaced by another.
        block_stores: read-ahead of each source in an object store; empty for local data.
    """

    records: Mixture
    data: dataclasses.InitVar[ml_collections.ConfigDict]
    seed: int = dataclasses.field(kw_only=True)  # of cropping
    process_index: int = 0  # index of this host among `process_count`
    process_count: int = 1
    record_ids: bool = False  # whether batches have the ids of the records, int32 [b]

    def __post_init__(self, data: ml_collections.ConfigDict):
        """Builds the graph; reading starts with the first batch."""
        num_workers = data.num_workers
        if num_workers is None:
            num_workers = workers.default_num_workers()
        if num_workers:
            workers.claim_mark(workers.SHARED_MEMORY)  # frees the memory of ended runs
        sources = [_with_blocks(each, data, num_workers) for each in self.records.sources]
        self.block_stores = [each.blocks for each in sources if each.blocks]
        self.records = Mixture(sources, self.records.weights)
        self._examples = SubBatches(
            self.records,
            data,
            seed=derived_seed(self.seed, _CROP_DEPTH),
            process_index=self.process_index,
            process_count=self.process_count,
            record_ids=self.record_ids,
        )
        self._parts = self._examples
        self._num_workers = num_workers
        self._batch_size = data.batch_size
        self._next_example = 0
        self._in_flight = InFlight(
            num_workers=num_workers,
            num_threads=min(16, workers.usable_cores()),
            prefetch_batches=data.prefetch_batches,
            rows=self._examples.rows,
            parts_per_batch=self._examples.parts_per_batch,
            example_bytes=self.records.example_bytes,
        )
        self._in_flight.check(data.max_in_flight_gib)
        plan_blocks = self._in_flight.plan_blocks
        stores = self.block_stores
        self._parts_ahead = plan_blocks(stores, data, self.process_count) if stores else 0
        requested = self._in_flight.begun_parts + self._parts_ahead
        self._batches_requested = -(-requested // self._examples.parts_per_batch)
        self._streams = slice(self.process_index, None, self.process_count)  # of this host
        self.skipped_records = 0
        self._parts_taken = 0  # since the workers were started
        self._abandoned = False
        self._batches: Any = None
        self._joiner = Joiner(self._next_part, self._examples.parts_per_batch)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns `images` uint8 [b, h, w, 3] and `tokens` int32 [b, t] of this process.

        Their memory is reused once nothing refers to them or to views of them.

        Dead decoding workers (a crash in a codec, the kernel's out-of-memory killer) are restarted
        at the next batch. A record that crashes the decoder is searched for, and then treated as a
        bad record.

        Raises:
            ValueError: there is a bad record, and bad records are not skipped.
            RuntimeError: workers die repeatedly at the same batch; the message names it.
        """
        deaths = 0
        requested = self._next_example + self._batches_requested * self._batch_size
        self.records.keep(self._next_example, requested, self._streams)
        while True:
            if self._batches is None:
                self._batches = self._start()
            try:
                batch = self._joiner.take()
            except RuntimeError as error:
                if self._abandoned or not workers.has_died(error):
                    raise
                deaths = self._handle_death(error, deaths + 1)
                continue
            if SKIPPED_RECORDS in batch:
                self._count_bad_records(batch.pop(SKIPPED_RECORDS))
            self._next_example += self._batch_size
            return batch

    def take(
        self,
        stop_requested: Callable[[], bool],
        *,
        poll_secs: float = 1.0,
        warn_after_secs: float = 60.0,
        grace_secs: float = 5.0,
    ) -> dict[str, np.ndarray]:
        """Returns the next batch; logs a stalled input, and stops waiting for it on request.

        The batch is fetched in a thread, while the main thread checks time and signals. Time is
        counted in polls, so changes of the clock have no effect.

        Args:
            stop_requested: returns whether to stop waiting.
            poll_secs: interval of calls of `stop_requested`; does not delay an available batch.
            warn_after_secs: waiting time before the log describes what is missing; doubles after
                each message.
            grace_secs: how long to wait for the batch after a stop was requested.

        Raises:
            StoppedWaiting: waiting was stopped; the iterator can no longer be used.
        """
        position = self.get_state()
        fetched = workers.run_in_thread(self.__next__, "next_batch")
        try:
            waited = stopping = 0.0
            while not futures.wait([fetched], poll_secs).done:
                waited += poll_secs
                if stop_requested():
                    stopping += poll_secs
                    if stopping >= grace_secs:
                        raise StoppedWaiting(position)
                if waited >= warn_after_secs:
                    warn_after_secs *= 2
                    logging.warning("no batch for %.0f s: %s", waited, self._describe_awaited())
        except BaseException:  # also a second ^C
            self._abandoned = True  # makes the thread of the batch end with an error
            self._stop_reading()
            workers.kill_workers()
            futures.wait([fetched], grace_secs)
            raise
        return fetched.result()

    def keys(self, first_example: int, most: int | None = None) -> list[str]:
        """Returns the keys of this process's (first `most`) records in the batch at an index.

        If bad records are skipped, the keys are those of their replacements; finding these requires
        decoding the images.
        """
        indices = self._examples.batch(first_example)[:most]
        if self._examples.skips:
            indices = [self._examples.find(index)[1] for index in indices]
        return [self.records.read(index)[1].key for index in indices]

    def get_state(self) -> dict[str, int]:
        """Returns the position in the global order, as a JSON-serialisable dict."""
        return {"next_example": self._next_example}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position from `get_state`, possibly of a run on other hosts."""
        self.close()
        self._next_example = int(state["next_example"])

    def _describe_awaited(self) -> str:
        """Describes the next batch, the files of its records, and the state of the workers."""
        text = f"waiting for examples {self._batch_text(self._next_example)}"
        located = map(self.records.locate, self._examples.batch(self._next_example))
        paths = list(dict.fromkeys(path for path, _ in located))
        more = len(paths) - _MAX_FILES
        text += f", in {', '.join(paths[:_MAX_FILES])}"
        text += f" and {more} more files" if more > 0 else ""
        text += "".join(f"; {store.describe()}" for store in self.block_stores)
        if not self._num_workers:
            return f"{text}; they are read in threads of this process"
        number = self._parts_taken % self._num_workers
        return f"{text}, from worker {number} of {self._num_workers}; {workers.describe_workers()}"

    def close(self) -> None:
        """Ends the workers and deletes their blocks; the next batch starts them again."""
        self._stop_reading()  # first: threads may wait for a block
        self._close_batches()

    def _stop_reading(self) -> None:
        for store in self.block_stores:
            store.stop()

    def _close_batches(self) -> None:
        self._joiner.close()
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _batch_text(self, first_example: int) -> str:
        return f"{first_example} to {first_example + self._batch_size - 1} of the run's order"

    def _handle_death(self, error: RuntimeError, deaths: int) -> int:
        """Logs the death of a worker and searches for its cause; the next batch starts new workers.

        Returns the number of consecutive deaths without a known cause.
        """
        logging.warning(
            "examples %s: %s; the workers are started again",
            self._batch_text(self._next_example),
            error,
        )
        self._close_batches()  # keeps the fetched blocks
        # The first death without a crash may have an external cause.
        if deaths > 1 or workers.has_crashed(error):
            logging.warning("looking for a picture that crashes its decoder, in another process")
            # The worker was ahead of the batch, and finished parts may have been lost with it.
            parts = range(self._parts_taken, sys.maxsize, self._num_workers)
            near = parts[: self._in_flight.queue_parts + 2]
            suspects = [index for part in near for index in self._parts.indices(part)]
            while (index := find_crashing_index(self._parts, suspects)) is not None:
                key = self.records.read(index)[1].key
                self._examples.exclude(index, f"record '{key}': its picture crashes its decoder")
                if not self._examples.skips:
                    raise ValueError(self._examples.explain(index)) from error
                deaths = 0
        if deaths > MAX_RESTARTS:
            raise RuntimeError(
                f"decoding workers died {deaths} times in a row at examples "
                f"{self._batch_text(self._next_example)}, and none of its pictures is the cause; "
                "if memory is short, lower config.data.num_workers or config.data.prefetch_batches"
            ) from error
        return deaths

    def _count_bad_records(self, skipped: np.ndarray) -> None:
        """Counts and names the records that were skipped for the rows of a batch."""
        indices = self._examples.batch(self._next_example)
        for row in np.flatnonzero(skipped):
            index = indices[row]
            for bad in self._examples.candidates(index)[: skipped[row]]:
                self.skipped_records += 1
                if self.skipped_records <= _MAX_NAMED:
                    logging.warning(
                        "skipped (%d so far): %s", self.skipped_records, self._examples.explain(bad)
                    )
        if np.any(skipped) and self.skipped_records > _MAX_NAMED:
            logging.warning("%d bad records skipped so far", self.skipped_records)

    def _next_part(self) -> dict[str, np.ndarray]:
        """Returns the next decoded sub-batch."""
        batches = self._batches
        part = next(batches)
        if batches is self._batches:  # else it was closed meanwhile
            self._parts_taken += 1
        return part

    def _start(self) -> Any:
        for store in self.block_stores:
            store.start()
        self._parts = self._examples.starting_at(self._next_example, self._parts_ahead)
        self._parts_taken = 0
        in_flight = self._in_flight
        # Sub-batches are formed before the work is divided, so the examples of a batch do not
        # depend on the number of workers or threads. A worker decodes in its main thread, and
        # its queue is its only prefetching.
        options = (0, 0) if self._num_workers else (in_flight.num_threads, in_flight.thread_parts)
        dataset = grain.MapDataset.source(self._parts).to_iter_dataset(
            grain.ReadOptions(num_threads=options[0], prefetch_buffer_size=options[1])
        )
        if self._num_workers:
            # grain passes absl's flags to its workers, even if no command has parsed them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=in_flight.queue_parts
                ),
                worker_init_fn=functools.partial(
                    workers.start_worker,
                    os.getpid(),
                    workers.claim_mark(workers.SHARED_MEMORY),
                    folders=[store.folder for store in self.block_stores if store.folder],
                ),
            )
        return iter(dataset)


def _with_blocks(source: Source, data: ml_collections.ConfigDict, num_workers: int) -> Source:
    """Returns the source, with a block store if it is remote and has a block order."""
    if not isinstance(source.order, BlockOrder):
        return source
    # Files in fsspec's memory exist only in this process.
    paths = source.records.paths
    if not any(is_remote(path) and not path.startswith("memory://") for path in paths):
        return source
    blocks = BlockStore(source.records, source.order, data, num_processes=num_workers)
    return dataclasses.replace(source, blocks=blocks)
