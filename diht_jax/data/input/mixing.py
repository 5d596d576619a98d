"""The records of a run at its positions: read, located and decoded there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diht_jax.data.input.order import BlockOrder, GlobalOrder
from diht_jax.data.records import schema


class OrderedRecords(Sequence[bytes]):
    """The records of a source in an endless order."""

    def __init__(self, records: Sequence[bytes], order: GlobalOrder | BlockOrder):
        """Reads nothing yet.

        Args:
            records: number of the record -> its bytes.
            order: position -> number of the record.
        """
        self._records = records
        self._order = order
        # Of the form that the source's elements have.
        self.decode = getattr(records, "decode", schema.decode_record)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> bytes:
        """The bytes of the record at a position."""
        return self._records[self._order[position]]

    def key(self, position: int) -> str:
        """The key of the record at a position."""
        return self.decode(self[position]).key

    def record_number(self, position: int) -> int:
        """The number of the record in the whole source."""
        return self._order[position]

    def path(self, position: int) -> str:
        """The file of the record, as far as the source knows it, else ""."""
        if not hasattr(self._records, "locate"):
            return ""
        return self._records.locate(self._order[position])[0]

    def describe(self, position: int) -> str:
        """File and number within it of the record, as far as the source knows them, else ""."""
        if not hasattr(self._records, "locate"):
            return ""
        path, record = self._records.locate(self._order[position])
        return f"{path}: record {record}"
