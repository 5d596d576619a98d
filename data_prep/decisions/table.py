"""Decisions about the entries of an input shard: a parquet file with a row for each.

Rows stand in the order of the input; those that were kept are the records of the part, in order.
`COLUMNS` describes the columns, and each score of a filter step is one more, of float32. A value is
null where it was not measured, since an earlier step had dropped the pair.

The file of `parts/NAME` is `parts/NAME.decisions.parquet`. The output of a filtered table is itself
a table, and has its file in a folder of its own, so that nobody reads it as a part of the output:
`OUTPUT/decisions/NAME.parquet` for `OUTPUT/NAME`.

Two lists for other programs are made of them: the keys of the kept pairs, and DataComp's array of
their uids (docs/guides/prepare/decisions.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet
from absl import logging

from data_prep.jobs import shards
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote, naming_output

SUFFIX = ".decisions.parquet"
FOLDER = "decisions"  # of those of tables
MANIFEST = "manifest.json"  # of the parts of a folder, in the order of their inputs
KEPT = "kept"
SOURCE = "source"  # the stage of entries that are no pairs

COLUMNS: dict[str, pyarrow.DataType] = {
    "key": pyarrow.string(),
    "uid": pyarrow.binary(16),  # DataComp's, from its 32 hexadecimal digits
    "outcome": pyarrow.string(),  # "kept", or the stage that dropped the pair
    "reason": pyarrow.string(),  # of the stage; null for what was kept
    "label": pyarrow.string(),  # value of `config.label_field`
    "captions": pyarrow.uint8(),  # number of captions; 0 of an entry that is no pair
    "words": pyarrow.uint16(),  # of the first caption
    # The first caption: why it was refused before the parse, or what the parse gave. Small numbers
    # stop at the largest of their type.
    "gate": pyarrow.string(),
    "complexity": pyarrow.uint8(),
    "actions": pyarrow.uint8(),
    "object_names": pyarrow.list_(pyarrow.string()),
    "action_names": pyarrow.list_(pyarrow.string()),
    # The highest of all captions, and of those with an action; null for a pair with one caption.
    "best_complexity": pyarrow.uint8(),
    "best_active_complexity": pyarrow.uint8(),
    "width": pyarrow.uint32(),  # px, as the image is stored
    "height": pyarrow.uint32(),
    "format": pyarrow.string(),  # of the image of a kept pair, such as "JPEG"
    "image_error": pyarrow.string(),  # why it could not be decoded
    # Text-spotting: "no_run" (a caption that no spotter reads), "read", or "gated" (no trace of
    # text at the first look), where those that were read all the same are "audited" or "missed".
    "looked": pyarrow.string(),
    # Of the captions that passed the steps before text-spotting, how many the picture shows.
    "matches": pyarrow.uint8(),
    # If all of them: the text that repeats the first, and the greatest `spotter.min_chars` that
    # would have dropped the pair by the same texts.
    "match": pyarrow.string(),
    "match_chars": pyarrow.uint8(),
    "match_confidence": pyarrow.float32(),
}

KEYS_FILE = "kept_keys.txt"
UIDS_FILE = "kept_uids.npy"
UID_DTYPE = np.dtype("u8,u8")

_BLOCK_UIDS = 2**20  # that are written at a time
_LINE_BREAKS = r"[\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"
_LINE_BREAKS_AND_TABS = r"[\t\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"

_TABLES = (".parquet", ".jsonl")
_UID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
_ROWS = 2**16  # of a row group
_HASH_BYTES = 16
# Keys of a shard often begin alike; what repeats is written once.
_ENCODINGS = {"key": "DELTA_BYTE_ARRAY", "uid": "PLAIN"}
_TEXTS = ("outcome", "reason", "label", "gate", "format", "image_error", "looked", "match")
_LARGEST = {pyarrow.uint8(): 2**8 - 1, pyarrow.uint16(): 2**16 - 1}


def decisions_path(output: str) -> str:
    """Path of the decisions about an input shard."""
    if not output.lower().endswith(_TABLES):
        return output + SUFFIX
    folder, slash, name = output.rpartition("/")
    return files.join(f"{folder}{slash}" or ".", FOLDER, f"{name}.parquet")


class DecisionWriter:
    """Collects the rows of one part."""

    def __init__(self, scores: Sequence[str] = ()):
        """Begins without rows."""
        self.schema = make_schema(scores)
        self._rows: list[tuple] = []
        self._numbers: list[int] = []
        self._tables: list[pyarrow.Table] = []

    def add(self, row: int, values: Mapping[str, Any]) -> None:
        """Takes a row.

        Args:
            row: its number in the input.
            values: those of its columns that are not null; others are left out.
        """
        self._numbers.append(row)
        self._rows.append(tuple(map(values.get, self.schema.names)))
        if len(self._rows) == _ROWS:
            self._tables.append(self._pack())

    def write(self, path: str) -> None:
        """Writes the file; equal rows give equal bytes in any order."""
        table = pyarrow.concat_tables([*self._tables, self._pack()])
        order = np.argsort(np.array(self._numbers, np.int64), kind="stable")
        if (np.diff(order) != 1).any():
            table = table.take(pyarrow.array(order))
        floats = [f.name for f in self.schema if pyarrow.types.is_floating(f.type)]
        small = [n for n in self.schema.names if n not in _ENCODINGS and n not in floats]
        small += [f"{f.name}.list.element" for f in self.schema if pyarrow.types.is_list(f.type)]
        sink = pyarrow.BufferOutputStream()
        # Without Arrow's own schema: the types are those of parquet, and small files stay small.
        with pyarrow.parquet.ParquetWriter(
            sink,
            self.schema,
            compression="zstd",
            use_dictionary=small,
            column_encoding=_ENCODINGS | dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
            write_statistics=False,
            store_schema=False,
        ) as writer:
            writer.write_table(table, row_group_size=_ROWS)
        files.make_folder(path.rpartition("/")[0] or ".")
        # The hash stands before the footer, where readers of parquet do not look.
        rest, last, footer = _find_hash(sink.getvalue().to_pybytes())
        digest = hash_file(path, rest + last, footer)
        files.write_bytes(path, rest + last + digest + footer)

    def _pack(self) -> pyarrow.Table:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self.schema)
        self._rows = []
        arrays = []
        for column, field in zip(columns, self.schema, strict=True):
            most = _LARGEST.get(field.type)
            array = pyarrow.array(column, field.type if most is None else pyarrow.int64())
            if most is not None:
                array = pc.min_element_wise(array, most, skip_nulls=False).cast(field.type)
            arrays.append(array)
        return pyarrow.Table.from_arrays(arrays, schema=self.schema)


def make_schema(scores: Sequence[str] = ()) -> pyarrow.Schema:
    """The columns of a file, with those of the steps' scores.

    Raises:
        ValueError: a score is named like another column.
    """
    for name in scores:
        if name in COLUMNS:
            raise ValueError(f"a filter step has a score '{name}': the decisions have that column")
    return pyarrow.schema(COLUMNS | dict.fromkeys(scores, pyarrow.float32()))


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
        ValueError: it is damaged, or the file of another part.
    """
    data = files.read_bytes(path)
    rest, stated, footer = _find_hash(data)
    if stated != hash_file(path, rest, footer):
        raise ValueError(f"{path}: damaged; delete it, and run the filter again")
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=list(_TEXTS))
    yield from file.iter_batches(_ROWS, columns=columns)


def _find_hash(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Splits a file into what precedes the hash, the hash, and the footer."""
    footer_bytes = 8 + int.from_bytes(data[-8:-4], "little")  # its length and "PAR1" behind it
    end = max(len(data) - footer_bytes, 0)
    start = max(end - _HASH_BYTES, 0)
    return data[:start], data[start:end], data[end:]


def hash_file(path: str, *parts: bytes) -> bytes:
    """16 bytes for contents and name of a file: that of another part is not taken for this one."""
    digest = hashlib.blake2b(os.path.basename(path).encode(), digest_size=_HASH_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def find_outputs(folder: str, named: str) -> tuple[list[str], dict[str, Any]]:
    """The parts of a finished folder, by their decisions; their records may be gone.

    Args:
        folder: output of the filter.
        named: flag or key that names the folder, for errors.

    Returns:
        outputs: in the order of their records.
        stats: merged statistics of the folder.

    Raises:
        ValueError: the folder is not finished.
    """
    path = files.join(folder, shards.MERGED_STATS)
    stats: dict[str, Any] = {}
    with contextlib.suppress(NotADirectoryError):
        stats = files.read_object(path) or {}
    if "config" not in stats or "read" not in stats.get("counts", ()):
        found = f"{named}='{folder}': no finished folder"
        if files.exists(path):
            found = f"{path}: not the statistics of a finished folder"
        raise ValueError(
            f"{found} of `python -m data_prep.filter`; run the filter to its end first"
        )
    for where in (files.join(folder, "parts"), folder):
        # What an attempt before has left of an input that failed is not in the output.
        notes = files.list_names(where, shards.FAILED_SUFFIX)
        failed = {name.removesuffix(shards.FAILED_SUFFIX) for name in notes}
        known = {name.removesuffix(SUFFIX) for name in files.list_names(where, SUFFIX)} - failed
        # Parts stand in the order of their inputs; where they are the output, in that of names.
        names = [entry["name"] for entry in read_manifest(where) if entry["name"] in known]
        names = sorted(names) if where == folder else names
        if known and not names:
            raise ValueError(
                f"{files.join(where, MANIFEST)}: missing, or damaged; run the filter again"
            )
        if names:
            return [files.join(where, name) for name in names], stats
    names = files.list_names(files.join(folder, FOLDER), ".parquet")
    tables = [name.removesuffix(".parquet") for name in names]
    if tables := [name for name in tables if name not in failed]:
        return [files.join(folder, name) for name in tables], stats
    raise ValueError(f"{named}='{folder}': no files of decisions; filter it again with --overwrite")


def read_manifest(folder: str) -> list[dict[str, Any]]:
    """A line for each part of a folder, with its "name"; none where it is missing or damaged."""
    return (files.read_object(files.join(folder, MANIFEST)) or {}).get("parts", [])


def read_kept(
    outputs: Iterable[str], columns: Sequence[str] = ("key", "uid")
) -> Iterator[pyarrow.RecordBatch]:
    """The decisions about the kept pairs of parts, in order."""
    for output in outputs:
        for rows in read_decisions(decisions_path(output), [*columns, "outcome"]):
            is_kept = pc.equal(rows["outcome"].dictionary_decode(), KEPT)
            yield rows.filter(is_kept).select(list(columns))


def write_lists(folder: str, kept: Iterable[pyarrow.RecordBatch]) -> None:
    """Writes both lists; they need no more memory for more pairs."""
    pairs = uids = 0
    uids_path = files.join(folder, UIDS_FILE)
    scratch = None if is_remote(folder) else folder
    with naming_output(uids_path), tempfile.TemporaryFile(dir=scratch) as raw:
        with files.local_output(files.join(folder, KEYS_FILE)) as path, open(path, "wb") as keys:
            for rows in kept:
                write_lines(keys, rows["key"])
                found = rows["uid"].drop_null()
                if len(found):
                    start, stop = 16 * found.offset, 16 * (found.offset + len(found))
                    raw.write(memoryview(found.buffers()[1])[start:stop])
                pairs, uids = pairs + len(rows), uids + len(found)
        raw.flush()
        if uids:
            with files.local_output(uids_path) as path, open(path, "xb") as file:
                _write_sorted(file, np.memmap(raw, "S16", "r+"))
        else:
            files.remove(uids_path)
    if 0 < uids < pairs:
        logging.warning("%s: %d of %d kept pairs have no uid", UIDS_FILE, pairs - uids, pairs)


def _write_sorted(file: IO[bytes], uids: np.ndarray) -> None:
    """Writes each uid once, in order; they are sorted where they are, in a file that is mapped."""
    uids.sort()  # bytes have the order of the numbers

    def distinct() -> Iterator[np.ndarray]:
        for start in range(0, len(uids), _BLOCK_UIDS):
            block = uids[max(start - 1, 0) : start + _BLOCK_UIDS]
            is_new = np.concatenate([[start == 0], block[1:] != block[:-1]])
            yield block[is_new]

    header = {"descr": UID_DTYPE.descr, "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (sum(map(len, distinct())),)})
    for block in distinct():
        file.write(np.frombuffer(block.tobytes(), ">u8").astype("<u8").tobytes())


def write_lines(file: IO[bytes], *columns: pyarrow.Array) -> None:
    """Writes rows of texts, with a tab between the columns; none ends its line or column early."""
    if not len(columns[0]):
        return
    breaks = _LINE_BREAKS_AND_TABS if len(columns) > 1 else _LINE_BREAKS
    rows, *others = (pc.replace_substring_regex(texts, breaks, " ") for texts in columns)
    for texts in others:
        rows = pc.binary_join_element_wise(rows, texts, "\t")
    lines = pc.binary_join_element_wise(rows, "", "\n")
    _, ends, text = lines.buffers()
    start, stop = np.frombuffer(ends, np.int32)[[lines.offset, lines.offset + len(lines)]]
    file.write(memoryview(text)[start:stop])
