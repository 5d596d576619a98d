"""What was decided about each entry of the input of a part: a parquet file with a row for each.

Rows stand in the order of the input; those that were kept are the records of the part, in order.
`COLUMNS` describes the columns, and each score of a filter step is one more, of float32. A value is
null where it was not measured, since an earlier step had dropped the pair. Without keys, uids and
scores a row takes some 2 bytes (docs/benchmarks.md).

The file of `parts/NAME` is `parts/NAME.decisions.parquet`. The output of a filtered table is itself
a table, and has its file in a folder of its own, so that nobody reads it as a part of the output:
`OUTPUT/decisions/NAME.parquet` for `OUTPUT/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from diht_jax.storage import files

SUFFIX = ".decisions.parquet"
FOLDER = "decisions"  # of those of tables
KEPT = "kept"

COLUMNS: dict[str, pyarrow.DataType] = {
    "key": pyarrow.string(),
    "uid": pyarrow.binary(16),  # DataComp's, from its 32 hexadecimal digits
    "outcome": pyarrow.string(),  # "kept", or the stage that dropped the pair
    "reason": pyarrow.string(),  # of the stage; null for what was kept
    # Why the first caption was refused before the parse, where `reason` does not have it.
    "gate": pyarrow.string(),
    "captions": pyarrow.uint8(),  # of the pair; 0 of an entry that is no pair
    # Of the first caption, where it was parsed. These and other small numbers stop at 255.
    "complexity": pyarrow.uint8(),
    "actions": pyarrow.uint8(),
    # The highest of all captions, and of those with an action; null for a pair with one caption.
    "best_complexity": pyarrow.uint8(),
    "best_active_complexity": pyarrow.uint8(),
    "width": pyarrow.uint32(),  # px, as the image is stored
    "height": pyarrow.uint32(),
    "format": pyarrow.string(),  # of the image of a kept pair, such as "JPEG"
    # Of the captions that passed the steps before text-spotting, how many the picture shows.
    "matches": pyarrow.uint8(),
    # Of a pair that text-spotting dropped: the text that repeats its first caption, and the
    # greatest `spotter.min_chars` that would have dropped the pair by the same texts.
    "match": pyarrow.string(),
    "match_chars": pyarrow.uint8(),
    "match_confidence": pyarrow.float32(),
}

_TABLES = (".parquet", ".jsonl")
_UID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
_ROWS = 2**16  # of a row group
# Keys of a shard often begin alike; what repeats is written once.
_ENCODINGS = {"key": "DELTA_BYTE_ARRAY", "uid": "PLAIN"}
_TEXTS = ("outcome", "reason", "gate", "format", "match")


def decisions_path(output: str) -> str:
    """Where the decisions about an input lie.

    Args:
        output: path or URL of the part, or of the filtered table.
    """
    if not output.endswith(_TABLES):
        return output + SUFFIX
    folder, slash, name = output.rpartition("/")
    return files.join(f"{folder}{slash}" or ".", FOLDER, f"{name}.parquet")


class DecisionLog:
    """Collects the rows of one part."""

    def __init__(self, scores: Sequence[str] = ()):
        """Begins without rows.

        Args:
            scores: names of the steps' scores.
        """
        self._schema = make_schema(scores)
        self._rows: list[tuple] = []
        self._numbers: list[int] = []
        self._tables: list[pyarrow.Table] = []

    def add(self, row: int | None, values: Mapping[str, Any]) -> None:
        """Takes a row.

        Args:
            row: its number in the input; None for the one after the last that was taken.
            values: those of its columns that are not null.
        """
        self._numbers.append(len(self._numbers) if row is None else row)
        self._rows.append(tuple(values.get(name) for name in self._schema.names))
        if len(self._rows) == _ROWS:
            self._tables.append(self._pack())

    def write(self, path: str) -> None:
        """Writes the file; equal rows give equal bytes, in whatever order they came."""
        table = pyarrow.concat_tables([*self._tables, self._pack()])
        order = np.argsort(np.array(self._numbers, np.int64), kind="stable")
        if (np.diff(order) != 1).any():
            table = table.take(pyarrow.array(order))
        sink = pyarrow.BufferOutputStream()
        # Without Arrow's own schema: the types are those of parquet, and small files stay small.
        with pyarrow.parquet.ParquetWriter(
            sink,
            self._schema,
            compression="zstd",
            use_dictionary=[name for name in self._schema.names if _is_small(self._schema, name)],
            column_encoding=_ENCODINGS | dict.fromkeys(_floats(self._schema), "BYTE_STREAM_SPLIT"),
            write_statistics=False,
            store_schema=False,
        ) as writer:
            writer.write_table(table, row_group_size=_ROWS)
        files.make_folder(path.rpartition("/")[0] or ".")
        files.write_bytes(path, sink.getvalue().to_pybytes())

    def _pack(self) -> pyarrow.Table:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        self._rows = []
        arrays = [
            pyarrow.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        return pyarrow.Table.from_arrays(arrays, schema=self._schema)


def make_schema(scores: Sequence[str] = ()) -> pyarrow.Schema:
    """The columns of a file, with those of the steps' scores.

    Raises:
        ValueError: a score is named like another column.
    """
    for name in scores:
        if name in COLUMNS:
            raise ValueError(f"a filter step has a score '{name}': the decisions have that column")
    return pyarrow.schema([*COLUMNS.items(), *((name, pyarrow.float32()) for name in scores)])


def pack_uid(value: object) -> bytes | None:
    """A uid of DataComp's form as 16 bytes; None for everything else."""
    if isinstance(value, str) and _UID.fullmatch(value):
        return bytes.fromhex(value)
    return None


def read_decisions(
    path: str, columns: Sequence[str] | None = None
) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a file in order, at most 65,536 at a time.

    Args:
        path: of `decisions_path`.
        columns: which; None for all. Texts that repeat come as dictionaries.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    source = pyarrow.BufferReader(files.read_bytes(path))
    try:
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=list(_TEXTS))
        yield from file.iter_batches(_ROWS, columns=columns)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: no whole file of decisions ({error}); filter again") from error


def is_kept(outcome: pyarrow.Array) -> np.ndarray:
    """Which rows were kept, bool [n].

    Args:
        outcome: the column of a batch of `read_decisions`.
    """
    names = outcome.dictionary.to_pylist()
    codes = outcome.indices.to_numpy(zero_copy_only=False)
    return codes == names.index(KEPT) if KEPT in names else np.zeros(len(codes), bool)


def _is_small(schema: pyarrow.Schema, name: str) -> bool:
    return name not in _ENCODINGS and not pyarrow.types.is_floating(schema.field(name).type)


def _floats(schema: pyarrow.Schema) -> list[str]:
    return [field.name for field in schema if pyarrow.types.is_floating(field.type)]
