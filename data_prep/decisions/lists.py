"""Lists of kept pairs for other programs: a text list of keys, and DataComp's array of uids.

    kept_keys.txt   one key a line, in the order of the records
    kept_uids.npy   dtype "u8,u8", sorted, each uid once: upper and lower half of its 32 hexadecimal
                    digits; the subset file that DataComp's resharder and baselines read and write

The second is left out where no pair has a uid (the field "uid" of its metadata).
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow
import pyarrow.compute as pc
from absl import logging

from data_prep.decisions.table import KEPT, decisions_path, read_decisions
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

KEYS_FILE = "kept_keys.txt"
UIDS_FILE = "kept_uids.npy"
UID_DTYPE = np.dtype("u8,u8")

_MAX_SORTED = 2**24  # uids that are sorted at a time: 256 MB
_LINE_BREAKS = r"[\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"
_LINE_BREAKS_AND_TABS = r"[\t\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"


def read_kept(
    outputs: Iterable[str], columns: Sequence[str] = ("key", "uid")
) -> Iterator[pyarrow.RecordBatch]:
    """The decisions about the kept pairs of parts, in order.

    Args:
        outputs: paths of the parts.
        columns: which.
    """
    for output in outputs:
        for rows in read_decisions(decisions_path(output), [*columns, "outcome"]):
            is_kept = pc.equal(rows["outcome"].dictionary_decode(), KEPT)
            yield rows.filter(is_kept).select(list(columns))


def write_lists(folder: str, kept: Iterable[pyarrow.RecordBatch]) -> None:
    """Writes both lists; they need no more memory for more pairs.

    Args:
        folder: of the lists.
        kept: pairs with `key` and `uid`, in order.
    """
    pairs, uids = 0, 0
    uids_path = files.join(folder, UIDS_FILE)
    with tempfile.TemporaryFile(dir=None if is_remote(folder) else folder) as raw:
        with files.local_output(files.join(folder, KEYS_FILE)) as path, open(path, "wb") as keys:
            for rows in kept:
                write_lines(keys, rows["key"])
                found = _halves(rows["uid"])
                raw.write(found.tobytes())
                pairs, uids = pairs + len(rows), uids + len(found)
        raw.flush()
        if uids:
            with files.local_output(uids_path) as path:
                _write_sorted(path, np.memmap(raw, UID_DTYPE, "r"))
        else:
            files.remove(uids_path)
    if 0 < uids < pairs:
        logging.warning("%s: %d of %d kept pairs have no uid", UIDS_FILE, pairs - uids, pairs)


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


def _halves(uids: pyarrow.Array) -> np.ndarray:
    """Uids that are not null as numbers."""
    found = uids.drop_null()
    if not len(found):
        return np.empty(0, UID_DTYPE)
    numbers = np.frombuffer(found.buffers()[1], ">u8")
    numbers = numbers[2 * found.offset : 2 * (found.offset + len(found))]
    return numbers.astype("<u8").view(UID_DTYPE)


def _write_sorted(path: pathlib.Path, uids: np.ndarray) -> None:
    """Sorts range by range of the upper half, so that only a range is ever held."""
    ranges = -(-len(uids) // _MAX_SORTED)
    with tempfile.TemporaryFile(dir=path.parent) as body:
        count = 0
        for number in range(ranges):
            chosen = []
            for start in range(0, len(uids), _MAX_SORTED):
                part = uids[start : start + _MAX_SORTED]
                # Uids are hashes: equal ranges hold about equally many.
                number_of = (part["f0"] >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)
                chosen.append(part[number_of == number])
            values = np.unique(np.concatenate(chosen))
            body.write(values.tobytes())
            count += len(values)
        with open(path, "xb") as file:
            header = {"descr": UID_DTYPE.descr, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            body.seek(0)
            shutil.copyfileobj(body, file, 2**24)
