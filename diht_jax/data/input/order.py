"""The order of examples: which record stands at a position of the run.

A position counts examples from the start of the run, over all hosts and epochs. The record there is
a function of (seed, position) alone.
"""

from __future__ import annotations

import grain


class GlobalOrder:
    """Every epoch is a permutation of all records, drawn anew."""

    def __init__(self, num_records: int, seed: int):
        """Draws nothing yet.

        Args:
            num_records: of the source, n.
            seed: of the permutations.
        """
        self._numbers = grain.MapDataset.range(num_records).seed(seed).shuffle().repeat()

    def __getitem__(self, position: int) -> int:
        """The number of the record, in [0, n), at a position from 0."""
        return int(self._numbers[position])
