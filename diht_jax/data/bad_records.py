"""What the training input does about a record that it cannot use: an error, or another record.

Called by `pipeline.py`. What makes a record bad is decided where it is read: `tfrecord.py` for its
frame, `schema.py` for its fields, `images.py` for its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diht_jax.data.records.tfrecord import DamagedRecordError, TFRecordError

MODES = ("error", "skip")
# In an example and its batch, when bad records are skipped: how many were, to find this one.
PASSED_OVER = "passed_over"
# Of one place of a batch, looked at in turn. So many bad ones are no matter of single records.
MAX_IN_A_ROW = 100


class CheckedExamples(Sequence[dict[str, np.ndarray]]):
    """The examples of an endless order, none of them bad.

    A bad record's place is taken by the record `stride` places on. With the batch size as stride,
    the stand-in is never in the same batch (where the same pair twice would be each other's
    negative), unless the data set is smaller than that. The choice is a function of the place
    alone, so that it is the same on any number of hosts and workers, and after a restart.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, np.ndarray]],
        locate: Callable[[int], str],
        *,
        mode: str,
        stride: int,
    ):
        """Reads nothing yet.

        Args:
            examples: place of the order -> decoded example; raises ValueError where it is bad.
            locate: place of the order -> file and number of its record, or "".
            mode: one of `MODES`.
            stride: places from a bad record to its stand-in.

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

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        """The example at a place, or in the place of a bad one.

        Raises:
            ValueError: the record is bad, or too many in a row are; names file and record.
        """
        if not self._skips:
            return self._decode(place)
        example, count = self._find(place)
        return {**example, PASSED_OVER: np.int32(count)}

    def places_of(self, place: int, count: int) -> Iterator[int]:
        """The places of `count` bad records that were passed over for a place."""
        return iter(range(place, place + count * self._stride, self._stride))

    def place_used(self, place: int) -> int:
        """Where the example at a place really comes from."""
        return place + self._find(place)[1] * self._stride if self._skips else place

    def explain(self, place: int) -> str:
        """Why a record is bad."""
        try:
            self._decode(place)
        except ValueError as error:
            return str(error)
        return f"{self._locate(place)}: could be read at the second attempt"

    def _find(self, place: int) -> tuple[dict[str, np.ndarray], int]:
        for count in range(MAX_IN_A_ROW):
            try:
                return self._decode(place + count * self._stride), count
            except DamagedRecordError as error:
                last = error
            except TFRecordError:
                raise  # not of one record, but of a whole shard
            except ValueError as error:
                last = error
        raise ValueError(
            f"{MAX_IN_A_ROW} records in a row are bad, more than config.data.on_bad_record='skip' "
            f"passes over; the last one: {last}"
        )

    def _decode(self, place: int) -> dict[str, Any]:
        try:
            return self._examples[place]
        except TFRecordError:
            raise  # says where
        except ValueError as error:
            where = self._locate(place)
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
