"""Columns of Arrow tables: read with an error that names what is there, and appended.

What the columns mean is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa


def read_column(table: pa.Table, name: str, setting: str) -> list[Any]:
    """The values of a column.

    Raises:
        ValueError: there is no such column.
    """
    if name not in table.column_names:
        raise ValueError(
            f"{setting}='{name}': no such column; the table has {', '.join(table.column_names)}"
        )
    return table.column(name).to_pylist()


def append_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """The table with more columns; one of the same name is replaced."""
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, values)
    return table
