"""What was recorded about pairs, as arrays, for steps that decide anew by other limits.

The columns are those of `filtering.decisions`. A step answers for n pairs with an int64 [n]: a code
of this file, or n >= 1 for the n-th of its reasons.
"""

from __future__ import annotations

import numpy as np
import pyarrow

PASSES = 0
NOT_KNOWN = -1  # more would have to be known of the pair than was recorded
AS_RECORDED = -2  # as the step decided then; not known of a pair that did not come to it


class Recorded:
    """Some rows of a file of decisions."""

    def __init__(self, rows: pyarrow.RecordBatch):
        """Takes rows of `decisions.read_decisions`."""
        self._rows = rows
        self._numbers: dict[str, np.ndarray] = {}
        self._codes: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._rows.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, float64 [n]; NaN where nothing was measured."""
        if name not in self._numbers:
            values = self._rows[name].to_numpy(zero_copy_only=False)
            self._numbers[name] = values.astype(np.float64)
        return self._numbers[name]

    def is_text(self, name: str, value: str) -> np.ndarray:
        """Where a column of texts has this one, bool [n]."""
        names = self._rows[name].dictionary.to_pylist()
        if value not in names:
            return np.zeros(len(self), bool)
        return self.codes(name) == names.index(value)

    def codes(self, name: str) -> np.ndarray:
        """The texts of a column by their numbers in its dictionary, int64 [n]; -1 for null."""
        if name not in self._codes:
            codes = self._rows[name].indices.fill_null(-1).to_numpy(zero_copy_only=False)
            self._codes[name] = codes.astype(np.int64)
        return self._codes[name]

    def texts(self, name: str) -> list[str]:
        """The dictionary of a column."""
        return self._rows[name].dictionary.to_pylist()
