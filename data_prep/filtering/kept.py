"""Which pairs were kept, for other programs: a text list of keys, and DataComp's array of uids.

    kept_keys.txt   one key a line, in the order of the records
    kept_uids.npy   dtype "u8,u8", sorted, each uid once: upper and lower half of its 32 hexadecimal
                    digits; the subset file that DataComp's resharder and baselines read and write

The second is left out where no pair has a uid (the field "uid" of its metadata). Both are made from
the decisions of the parts, or of a replay. Parts from before decisions were recorded have a file of
the pairs that they kept, one JSON list [key, uid or null, image format or null] a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from absl import logging

from data_prep.filtering import decisions
from data_prep.jobs.engine import Report
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

KEPT_SUFFIX = ".kept.json"  # of parts from before decisions were recorded
KEYS_FILE = "kept_keys.txt"
UIDS_FILE = "kept_uids.npy"
UID_DTYPE = np.dtype("u8,u8")

_CHUNK = 2**16
_MAX_SORTED = 2**24  # uids that are sorted at a time: 256 MB
_LINE_BREAKS = r"[\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"
_LINE_BREAKS_AND_TABS = r"[\t\n\v\f\r\x1c-\x1e\x{85}\x{2028}\x{2029}]"


class KeptPairs(NamedTuple):
    """Some kept pairs, in order.

    Attributes:
        keys: strings.
        uids: 16 bytes each, or null.
        formats: of the images, or null.
    """

    keys: pyarrow.Array
    uids: pyarrow.Array
    formats: pyarrow.Array


@dataclasses.dataclass(frozen=True)
class KeptLists:
    """A task: both lists of a folder.

    Attributes:
        folder: where they go.
        outputs: of all parts, in order.
    """

    folder: str
    outputs: Sequence[str]

    @property
    def source(self) -> str:
        """What they are made from, for messages."""
        return f"decisions for {KEYS_FILE} and {UIDS_FILE}"


def write_kept_lists(task: KeptLists, report: Report) -> None:
    """Writes both lists; a task of `engine.run_tasks`."""
    with contextlib.suppress(FileNotFoundError):  # of parts that an older version has cleaned up
        write_lists(task.folder, read_kept(task.outputs))
    report(0)


def read_kept(outputs: Iterable[str]) -> Iterator[KeptPairs]:
    """The kept pairs of parts, in order.

    Args:
        outputs: paths of the parts.

    Raises:
        FileNotFoundError: a part has neither decisions nor a list.
    """
    for output in outputs:
        try:
            for batch in decisions.read_decisions(
                decisions.decisions_path(output), ["key", "uid", "outcome", "format"]
            ):
                kept = batch.filter(pyarrow.array(decisions.is_kept(batch["outcome"])))
                yield KeptPairs(kept["key"], kept["uid"], kept["format"].dictionary_decode())
        except FileNotFoundError:
            yield from _read_old(output + KEPT_SUFFIX)


def read_formats(output: str) -> list[str | None]:
    """The image formats of the records of a part, in order."""
    return [name for pairs in read_kept([output]) for name in pairs.formats.to_pylist()]


def write_lists(folder: str, kept: Iterable[KeptPairs]) -> None:
    """Writes both lists; they need no more memory for more pairs.

    Args:
        folder: where they go.
        kept: in order.
    """
    pairs, uids = 0, 0
    uids_path = files.join(folder, UIDS_FILE)
    with tempfile.TemporaryFile(dir=None if is_remote(folder) else folder) as raw:
        with files.local_output(files.join(folder, KEYS_FILE)) as path, open(path, "wb") as keys:
            for some in kept:
                write_lines(keys, some.keys)
                found = _halves(some.uids)
                raw.write(found.tobytes())
                pairs, uids = pairs + len(some.keys), uids + len(found)
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
    cleaned, has_tabs = [], len(columns) > 1
    for texts in columns:
        breaks = _LINE_BREAKS_AND_TABS if has_tabs else _LINE_BREAKS
        broken = pyarrow.compute.match_substring_regex(texts, breaks)
        if pyarrow.compute.any(broken).as_py():
            joined = (" ".join(text.splitlines()) for text in texts.to_pylist())
            if has_tabs:
                joined = (text.replace("\t", " ") for text in joined)
            texts = pyarrow.array(joined, pyarrow.string())
        cleaned.append(texts)
    rows = cleaned[0]
    if len(cleaned) > 1:
        rows = pyarrow.compute.binary_join_element_wise(*cleaned, "\t")
    lines = pyarrow.compute.binary_join_element_wise(rows, "", "\n")
    _, ends, text = lines.buffers()
    start, stop = np.frombuffer(ends, np.int32)[[lines.offset, lines.offset + len(lines)]]
    file.write(memoryview(text)[start:stop])


def _read_old(path: str) -> Iterator[KeptPairs]:
    lines = iter(files.read_bytes(path).decode().splitlines())
    while chunk := [json.loads(line) for line in itertools.islice(lines, _CHUNK)]:
        keys, uids, formats = zip(*chunk, strict=True)
        yield KeptPairs(
            pyarrow.array(keys, pyarrow.string()),
            pyarrow.array(map(decisions.pack_uid, uids), pyarrow.binary(16)),
            pyarrow.array(formats, pyarrow.string()),
        )


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
