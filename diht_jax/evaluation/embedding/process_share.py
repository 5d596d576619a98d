"""The processes of a job that embed together: who has which rows of a batch, and what they tell.

Everything here is called by all processes alike, in the same order.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_FAILED = -1


@dataclasses.dataclass(frozen=True)
class JobProcess:
    """A process of a job whose processes work side by side, each with a model of its own.

    Attributes:
        index: of this process.
        count: of processes.
        together: calls a function in every process, and returns what it has returned in this one
            when all are through; where it has failed in one, it raises in all of them.
    """

    index: int = 0
    count: int = 1
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()

    def first(self, work: Callable[[], object]) -> None:
        """As `together`, of what one process does for all."""
        self.together(work if self.index == 0 else lambda: None)


ALONE = JobProcess()


@dataclasses.dataclass(frozen=True)
class ProcessShare:
    """One process among several.

    Attributes:
        index: of this process.
        rows: bool [processes, batch], who embeds which rows of a batch; everybody some.
        gather: of an array of each process, equal in shape, all: [processes, ...].
    """

    index: int
    rows: np.ndarray
    gather: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, model: Any, batch_size: int) -> ProcessShare | None:
        """None where this process has all rows, and so all the work.

        A batch has `batch_size` rows, or twice as many again and again until everybody has some.
        """
        find_rows = getattr(model, "own_rows", None)
        if find_rows is None or find_rows(batch_size) is None:
            return None
        return cls.create(jax.process_index(), batch_size, find_rows, _gather)

    @classmethod
    def create(
        cls,
        index: int,
        batch_size: int,
        find_rows: Callable[[int], np.ndarray],
        gather: Callable[[np.ndarray], np.ndarray],
    ) -> ProcessShare:
        """As `of`, whatever the processes are.

        Args:
            index: of this process.
            batch_size: the least number of rows.
            find_rows: this process's rows of a batch of a size, as `LoadedModel.own_rows`.
            gather: see the class.
        """
        rows = np.asarray(gather(find_rows(batch_size)))
        while not rows.any(axis=1).all():
            rows = np.asarray(gather(find_rows(2 * rows.shape[1])))
        return cls(index, rows, gather)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self.rows)

    @property
    def batch_size(self) -> int:
        """Rows of a batch, of all processes together."""
        return self.rows.shape[1]

    @property
    def own_rows(self) -> np.ndarray:
        """bool [batch]."""
        return self.rows[self.index]

    def agree(self, filled: int, error: Exception | None) -> np.ndarray:
        """int [processes], how many rows each has filled this time.

        Raises:
            Exception: the own error.
            ValueError: one of another process, with its message.
        """
        counts = self.gather(np.array([_FAILED if error else filled], np.int64))[:, 0]
        if (counts == _FAILED).any():
            messages = self.gather_objects(None if error is None else f"{error}")
            if error is not None:
                raise error
            failed = int(np.flatnonzero(counts == _FAILED)[0])
            raise ValueError(f"process {failed} of {self.count}: {messages[failed]}")
        return counts

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process. They travel pickled, between processes of one job."""
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self.gather(np.array([len(data)], np.int64))[:, 0]
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = data
        rows = self.gather(padded)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _gather(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(array))
