"""Decisions about the entries of an input shard: a parquet file with one row per entry.

Rows are in input order; the rows of kept pairs correspond, in order, to the records of the part.
`COLUMNS` describes the columns; each score of a filter step adds a float32 column. A value is null
if it was not measured because an earlier step had dropped the pair.

The file for `parts/NAME` is `parts/NAME.decisions.parquet`. If tables are filtered, the output is
itself a table, and the decisions for `OUTPUT/NAME` are in a separate folder, where no reader takes
them for a part of the output: `OUTPUT/decisions/NAME.parquet`.

Two lists for other programs are made from the decisions: the keys of the kept pairs, and DataComp's
array of their uids (docs/guides/prepare/decisions.md).
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
FOLDER = "decisions"  # folder of the decisions about tables
MANIFEST = "manifest.json"  # lists the parts of a folder, in the order of their inputs
KEPT = "kept"
SOURCE = "source"  # the stage of entries that are not pairs

COLUMNS: dict[str, pyarrow.DataType] = {
    "key": pyarrow.string(),
    "uid": pyarrow.binary(16),  # DataComp's uid, from its 32 hexadecimal digits
    "outcome": pyarrow.string(),  # "kept", or the stage that dropped the pair
    "reason": pyarrow.string(),  # reason within the stage; null for kept pairs
    "label": pyarrow.string(),  # value of `config.label_field`
    "captions": pyarrow.uint8(),  # number of captions; 0 for an entry that is not a pair
    "words": pyarrow.uint16(),  # number of words in the first caption
    # About the first caption: why a gate rejected it, or what the parser found. Numbers saturate at
    # the largest value of their type.
    "gate": pyarrow.string(),
    "complexity": pyarrow.uint8(),
    "actions": pyarrow.uint8(),
    "object_names": pyarrow.list_(pyarrow.string()),
    "action_names": pyarrow.list_(pyarrow.string()),
    # Maxima over all captions and over those with an action; null for a pair with one caption.
    "best_complexity": pyarrow.uint8(),
    "best_active_complexity": pyarrow.uint8(),
    "width": pyarrow.uint32(),  # px, as the image is stored
    "height": pyarrow.uint32(),
    "format": pyarrow.string(),  # image format of a kept pair, such as "JPEG"
    "image_error": pyarrow.string(),  # why the image could not be decoded
    # Text-spotting: "no_run" (OCR could not output any caption), "read", or "gated" (the first look
    # saw no text). Gated pairs that were read anyway are "audited", or "missed" if they match.
    "looked": pyarrow.string(),
    # Number of captions shown in the picture, of those that reached text-spotting.
    "matches": pyarrow.uint8(),
    # If all are shown: the text that repeats the first caption, and the largest `spotter.min_chars`
    # with which the same texts would have dropped the pair.
    "match": pyarrow.string(),
    "match_chars": pyarrow.uint8(),
    "match_confidence": pyarrow.float32(),
}

KEYS_FILE = "kept_keys.txt"
UIDS_FILE = "kept_uids.npy"
UID_DTYPE = np.dtype("u8,u8")

_BLOCK_UIDS = 2**20  # uids to write at a time
_LINE_BREAKS = r"[\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"
_LINE_BREAKS_AND_TABS = r"[\t\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"

_TABLES = (".parquet", ".jsonl")
_UID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
_ROWS = 2**16  # rows per row group
_HASH_BYTES = 16
# Keys of a shard often share a prefix, which this encoding stores once.
_ENCODINGS = {"key": "DELTA_BYTE_ARRAY", "uid": "PLAIN"}
_LARGEST = {pyarrow.uint8(): 2**8 - 1, pyarrow.uint16(): 2**16 - 1}


def decisions_path(output: str) -> str:
    """Returns the path of the decisions about an input shard."""
    if not output.lower().endswith(_TABLES):
        return output + SUFFIX
    folder, slash, name = output.rpartition("/")
    return files.join(f"{folder}{slash}" or ".", FOLDER, f"{name}.parquet")


class DecisionWriter:
    """Collects the decision rows of one part."""

    def __init__(self, scores: Sequence[str] = ()):
        """Creates a writer without rows; `scores` are the names of the steps' scores."""
        self.schema = make_schema(scores)
        self._rows: list[tuple] = []
        self._numbers: list[int] = []
        self._tables: list[pyarrow.Table] = []

    def add(self, row: int, values: Mapping[str, Any]) -> None:
        """Adds a row.

        Args:
            row: index of the entry in the input.
            values: values of the columns that are not null.
        """
        self._numbers.append(row)
        self._rows.append(tuple(map(values.get, self.schema.names)))
        if len(self._rows) == _ROWS:
            self._tables.append(self._pack())

    def write(self, path: str) -> None:
        """Writes the file. Equal rows, in any order, produce equal bytes."""
        table = pyarrow.concat_tables([*self._tables, self._pack()])
        order = np.argsort(np.array(self._numbers, np.int64), kind="stable")
        if (np.diff(order) != 1).any():
            table = table.take(pyarrow.array(order))
        floats = [f.name for f in self.schema if pyarrow.types.is_floating(f.type)]
        small = [n for n in self.schema.names if n not in _ENCODINGS and n not in floats]
        small += [f"{f.name}.list.element" for f in self.schema if pyarrow.types.is_list(f.type)]
        sink = pyarrow.BufferOutputStream()
        # Without Arrow's schema: parquet types suffice, and small files stay small.
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
        # The hash precedes the footer, where parquet readers do not look.
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
    """Returns the schema of a file, including the scores of steps.

    Raises:
        ValueError: a score has the name of another column.
    """
    for name in scores:
        if name in COLUMNS:
            raise ValueError(f"a filter step has a score '{name}': the decisions have that column")
    return pyarrow.schema(COLUMNS | dict.fromkeys(scores, pyarrow.float32()))


def pack_uid(value: object) -> bytes | None:
    """Packs a uid in DataComp's form into 16 bytes. Returns None for any other value."""
    if isinstance(value, str) and _UID.fullmatch(value):
        return bytes.fromhex(value)
    return None


def read_decisions(
    path: str, columns: Sequence[str] | None = None
) -> Iterator[pyarrow.RecordBatch]:
    """Yields the rows of a file in order, at most 65,536 at a time.

    Args:
        path: path from `decisions_path`.
        columns: columns to read; None for all.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or belongs to another part.
    """
    data = files.read_bytes(path)
    rest, stated, footer = _find_hash(data)
    if stated != hash_file(path, rest, footer):
        raise ValueError(f"{path}: damaged; delete it, and run the filter again")
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    yield from file.iter_batches(_ROWS, columns=columns)


def _find_hash(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Splits a file into what precedes the hash, the hash, and the footer."""
    footer_bytes = 8 + int.from_bytes(data[-8:-4], "little")  # its length and "PAR1" follow it
    end = max(len(data) - footer_bytes, 0)
    start = max(end - _HASH_BYTES, 0)
    return data[:start], data[start:end], data[end:]


def hash_file(path: str, *parts: bytes) -> bytes:
    """Hashes name and contents of a file to 16 bytes, which also detects another part's file."""
    digest = hashlib.blake2b(os.path.basename(path).encode(), digest_size=_HASH_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def find_outputs(folder: str, named: str) -> tuple[list[str], dict[str, Any]]:
    """Finds the parts of a finished folder by their decisions, even if their records are gone.

    Args:
        folder: output of the filter.
        named: flag or config key of the folder, for error messages.

    Returns:
        outputs: paths of the parts, in the order of their records.
        stats: merged statistics of the folder.

    Raises:
        ValueError: the folder is not finished, or its manifest or decisions are missing.
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
        # The output excludes what an earlier attempt left of an input that then failed.
        notes = files.list_names(where, shards.FAILED_SUFFIX)
        failed = {name.removesuffix(shards.FAILED_SUFFIX) for name in notes}
        known = {name.removesuffix(SUFFIX) for name in files.list_names(where, SUFFIX)} - failed
        # Parts are ordered like their inputs, or by name if they are the output themselves.
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
    """Returns an entry with "name" for each part, or [] if the manifest is missing or damaged."""
    return (files.read_object(files.join(folder, MANIFEST)) or {}).get("parts", [])


def read_kept(
    outputs: Iterable[str], columns: Sequence[str] = ("key", "uid")
) -> Iterator[pyarrow.RecordBatch]:
    """Yields the decisions about the kept pairs of parts, in order."""
    for output in outputs:
        for rows in read_decisions(decisions_path(output), [*columns, "outcome"]):
            yield rows.filter(pc.equal(rows["outcome"], KEPT)).select(list(columns))


def write_lists(folder: str, kept: Iterable[pyarrow.RecordBatch]) -> None:
    """Writes both lists, in memory that does not grow with the number of pairs."""
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
    """Sorts memory-mapped uids in place, and writes each distinct one."""
    uids.sort()  # big-endian bytes sort like the numbers

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
    """Writes rows of texts, tabs between columns. Line breaks and tabs in texts become spaces."""
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
