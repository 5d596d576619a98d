"""Columns of pairs as arrays: what steps have measured, or what decisions have recorded.

A step decides from these alone, so that it decides in the same way in the filter and in a replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow


class Columns:
    """The columns of n pairs, converted when they are asked for."""

    def __init__(self, columns: Mapping[str, pyarrow.Array | Sequence[Any]], length: int):
        """Takes columns of equal length.

        Args:
            columns: name -> values, where None or null is a value that was not measured.
            length: n.
        """
        self._columns = columns
        self._length = length
        self._arrays: dict[str, pyarrow.Array] = {}
        self._codes: dict[str, tuple[list[str], np.ndarray]] = {}

    def __len__(self) -> int:
        return self._length

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, float64 [n]; NaN where nothing was measured."""
        values = self._array(name).to_numpy(zero_copy_only=False)
        return values.astype(np.float64)

    def has(self, name: str) -> np.ndarray:
        """Mask of the pairs for which a column has a value, bool [n]."""
        return self._array(name).is_valid().to_numpy(zero_copy_only=False)

    def is_text(self, name: str, value: str) -> np.ndarray:
        """Mask of the pairs for which a column has this text, bool [n]."""
        texts, codes = self.codes(name)
        return codes == texts.index(value) if value in texts else np.zeros(self._length, bool)

    def texts(self, name: str) -> dict[str, np.ndarray]:
        """Each text of a column -> mask of its pairs, bool [n]."""
        texts, codes = self.codes(name)
        return {text: codes == number for number, text in enumerate(texts)}

    def reasons(self, stage: str) -> dict[str, np.ndarray]:
        """Each reason of a stage -> mask of its pairs, bool [n].

        The reasons are in a column of the stage's name, or else were recorded as those of the
        stage.
        """
        if stage in self._columns:
            return self.texts(stage)
        is_own = self.is_text("outcome", stage)
        return {reason: is_own & holds for reason, holds in self.texts("reason").items()}

    def codes(self, name: str) -> tuple[list[str], np.ndarray]:
        """The different texts of a column, and their numbers, int64 [n]; -1 for null."""
        if name not in self._codes:
            array = self._array(name)
            if pyarrow.types.is_null(array.type):
                self._codes[name] = [], np.full(self._length, -1)
            else:
                if not pyarrow.types.is_dictionary(array.type):
                    array = array.dictionary_encode()
                codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                self._codes[name] = array.dictionary.to_pylist(), codes.astype(np.int64)
        return self._codes[name]

    def _array(self, name: str) -> pyarrow.Array:
        if name not in self._arrays:
            found = self._columns.get(name)
            if found is None:
                found = pyarrow.nulls(self._length)
            self._arrays[name] = found if isinstance(found, pyarrow.Array) else pyarrow.array(found)
        return self._arrays[name]
