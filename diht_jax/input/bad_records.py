"""What the training input does about a record that it cannot use: an error, or another record.

What makes a record bad is decided where it is read: `records/tfrecord.py` for its frame,
`records/schema.py` for its fields, `images/decode.py` for its picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from diht_jax.records.tfrecord import DamagedRecordError, TFRecordError
from diht_jax.storage.retries import StorageError

MODES = ("error", "skip")
# In an example and its batch, when bad records are skipped: how many were, to find this one.
SKIPPED_RECORDS = "skipped_records"
# Records tried for one row of a batch. If all are bad, more than single records is damaged.
MAX_IN_A_ROW = 100
# Records that are read before the first of their pictures is decoded. Few enough for their memory.
_GROUP_ROWS = 32


class CheckedExamples(Sequence[dict[str, np.ndarray]]):
    """The examples of an endless order, with good records in place of the bad ones.

    A bad record is replaced by the one whose index in the order is larger by `stride`. With a
    multiple of the batch size as stride, the replacement is never in the same batch (where the same
    pair twice would be each other's negative), unless the data set is smaller than that. The choice
    is a function of the index alone, so that it is the same on any number of hosts and workers, and
    after a restart.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, np.ndarray]],
        locate: Callable[[int], str],
        *,
        mode: str,
        stride: int,
        record_number: Callable[[int], Hashable] = int,
    ):
        """Reads nothing yet.

        Args:
            examples: index in the order -> decoded example; raises ValueError where it is bad.
                `rows` needs its `plan`, as of `RandomExamples`.
            locate: index in the order -> file and number of its record, or "".
            mode: one of `MODES`.
            stride: added to the index of a bad record until a good one is found.
            record_number: index in the order -> what identifies its record, in every epoch.

        Raises:
            ValueError: another mode.
        """
        if mode not in MODES:
            raise ValueError(
                f"config.data.on_bad_record='{mode}': expected {' or '.join(map(repr, MODES))}"
            )
        self._examples = examples
        self._locate = locate
        self._skips = mode == "skip"
        self._stride = stride
        self._record_number = record_number
        self._excluded: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The example at an index, or the one that replaces it.

        Raises:
            ValueError: the record is bad, or too many in a row are; names file and record.
        """
        if not self._skips:
            return self._decode(index)
        example, count = self._find(index)
        return self._with_count(example, count)

    def rows(self, indices: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """The examples at indices, one after the other, each as `self[index]` gives it.

        Each step before the pixels is done for a group of them at once: see `RandomExamples.plan`.
        """
        for first in range(0, len(indices), _GROUP_ROWS):
            group = indices[first : first + _GROUP_ROWS]
            excludes = self._excluded and any(map(self._is_excluded, group))
            plans = [None] * len(group) if excludes else self._examples.plan(group)
            for index, decode_pixels in zip(group, plans, strict=True):
                example = None
                if decode_pixels is not None:
                    with contextlib.suppress(ValueError):  # self[index] raises it as well
                        example = decode_pixels()
                if example is None:
                    yield self[index]
                else:
                    yield self._with_count(example, 0) if self._skips else example

    def exclude(self, index: int, problem: str) -> None:
        """Makes the record at an index a bad one, which nobody decodes any more."""
        self._excluded[self._record_number(index)] = problem

    def _is_excluded(self, index: int) -> bool:
        return self._record_number(index) in self._excluded

    def tried_indices(self, index: int) -> Iterator[int]:
        """Decodes what the example at an index needs; yields each index before that is done."""
        for count in range(MAX_IN_A_ROW if self._skips else 1):
            tried = index + count * self._stride
            yield tried
            try:
                self._decode(tried)
            except StorageError:
                raise
            except ValueError:
                continue
            return

    def skipped_indices(self, index: int, count: int) -> Iterator[int]:
        """The indices of the `count` bad records that were skipped for the example at an index."""
        return iter(range(index, index + count * self._stride, self._stride))

    def used_index(self, index: int) -> int:
        """The index of the record that the example at an index really comes from."""
        return index + self._find(index)[1] * self._stride if self._skips else index

    def explain(self, index: int) -> str:
        """Why a record is bad."""
        try:
            self._decode(index)
        except ValueError as error:
            return str(error)
        return f"{self._locate(index)}: could be read at the second attempt"

    def _find(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        for count in range(MAX_IN_A_ROW):
            try:
                return self._decode(index + count * self._stride), count
            except DamagedRecordError as error:
                last = error
            except (TFRecordError, StorageError):
                raise  # not of one record, but of a whole shard or of the disk
            except ValueError as error:
                last = error
        raise ValueError(
            f"{MAX_IN_A_ROW} records in a row are bad, more than config.data.on_bad_record='skip' "
            f"replaces; the last one: {last}"
        )

    @staticmethod
    def _with_count(example: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        return {**example, SKIPPED_RECORDS: np.int32(count)}

    def _decode(self, index: int) -> dict[str, Any]:
        try:
            if self._excluded and self._is_excluded(index):
                raise ValueError(self._excluded[self._record_number(index)])
            return self._examples[index]
        except (TFRecordError, StorageError):
            raise  # names file and record
        except ValueError as error:
            where = self._locate(index)
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
