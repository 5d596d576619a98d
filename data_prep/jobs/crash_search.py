"""Finds the pairs of a shard that end the process which works on them.

A crash in a library takes the whole worker with it, and nobody is left to name the pair. So a shard
whose worker has died is run again, and records in a small file next to its output which batch of
pairs it works on. When it dies again, the next run takes the pairs of that batch one by one, only
to see whether it survives them, before it works on the batch. A pair that ends this run as well is
left out of the next. What is done to a pair is not known here.

One death begins the search, and two more find each pair: one in its batch, one at itself. Only
where they agree a pair is blamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from data_prep.jobs.workers import ProcessDeath
from diht_jax.readers.registry import Skipped
from diht_jax.storage import files

BATCH, PAIR = "batch", "pair"  # what a run records: it works on a batch, or tries one pair of it

CRASHED = "crashed"  # the reason of pairs that are left out

_MAX_CRASHED = 20  # pairs of a shard; where there are more, they are not the reason
_MAX_UNEXPLAINED = 2  # deaths of a shard that lead to no pair


@dataclasses.dataclass(frozen=True)
class CrashSearch:
    """Knowledge after deaths of a worker; entries are numbered from 0, skipped ones too.

    Attributes:
        crashed: entries that end their worker, and are left out.
        suspects: first and last (exclusive) of the batch whose pairs are tried one by one.
        unexplained: deaths that led to no pair.
    """

    crashed: tuple[int, ...] = ()
    suspects: tuple[int, int] | None = None
    unexplained: int = 0

    def after(self, record: dict[str, Any] | None) -> CrashSearch | None:
        """Adds one more death; None where the search is given up.

        Args:
            record: the last one of the run; None where it had not begun a batch.
        """
        if record is not None:
            stage, batch = record["stage"], (record["first"], record["last"])
            if stage == PAIR and len(self.crashed) < _MAX_CRASHED:
                return CrashSearch((*self.crashed, batch[0]), None, self.unexplained)
            if stage == BATCH and self.suspects != batch:
                return dataclasses.replace(self, suspects=batch)
        # Outside of all pairs, or of a batch although each of its pairs alone did no harm.
        if self.unexplained < _MAX_UNEXPLAINED:
            return dataclasses.replace(self, unexplained=self.unexplained + 1)
        return None


class WorkRecord:
    """The file in which a run records what it works on, once a worker has died of the shard."""

    def __init__(self, output: str, search: CrashSearch | None):
        """Begins a record next to an output, or none at all where no worker has died of it."""
        self._path = None if search is None else _record_path(output)
        self._search = search or CrashSearch()
        self._first = 0

    def begin(self, entries: Sequence[Any], try_one: Callable[[Any], object]) -> list[Any]:
        """Records that a run works on the next entries of its source.

        Args:
            entries: `Skipped`, or something with a `key`.
            try_one: does to one of them what will be done to all, to no effect; called for each
                suspect, and may end this process.

        Returns:
            The entries; those that ended their worker before are skipped.
        """
        batch = self._first, self._first + len(entries)
        self._first = batch[1]
        found = list(entries)
        for number in set(self._search.crashed) & set(range(*batch)):
            entry = entries[number - batch[0]]
            detail = "the worker process died whenever it worked on it"
            found[number - batch[0]] = Skipped(entry.key, CRASHED, detail)
        if self._search.suspects == batch:
            for number, entry in enumerate(found, batch[0]):
                if not isinstance(entry, Skipped):
                    self._write(PAIR, number, number + 1)
                    try_one(entry)
        self._write(BATCH, *batch)
        return found

    def _write(self, stage: str, first: int, last: int) -> None:
        if self._path is not None:
            record = {"stage": stage, "first": first, "last": last}
            files.write_bytes(self._path, json.dumps(record).encode())

    def __enter__(self) -> WorkRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the file at the end of a run, unless that is a death."""
        is_death = kind is not None and issubclass(kind, ProcessDeath)
        if self._path is not None and not is_death:
            files.remove(self._path)


def after_death(task: Any, may_be_blamed: bool) -> Any:
    """The `ShardTask` to run when the worker of one has died, or None; an `engine.AfterDeath`."""
    path = _record_path(task.output)
    record = None
    with contextlib.suppress(OSError):
        record = files.read_object(path)
    with contextlib.suppress(OSError):
        files.remove(path)
    if task.search is None or not may_be_blamed:
        return dataclasses.replace(task, search=task.search or CrashSearch())
    search = task.search.after(record)
    if search is None:
        return None
    for number in set(search.crashed) - set(task.search.crashed):
        logging.warning("%s: entry %d ends its worker, and is left out", task.source, number)
    return dataclasses.replace(task, search=search)


def _record_path(output: str) -> str:
    # Named as a temporary file of the output, so that a later run removes what a killed one left.
    folder, name = os.path.split(output)
    return files.join(folder, f".{name}.work.0-00000000.tmp")
