"""Which pairs were kept, for other programs: a text list of keys, and DataComp's array of uids.

Every filtered part has a file of the pairs it has kept, one JSON list [key, uid or null, image
format or null] a line, in the order of the records. When the job is done, all of
them make

    kept_keys.txt   one key a line, in the order of the records
    kept_uids.npy   dtype "u8,u8", sorted, each uid once: upper and lower half of its 32 hexadecimal
                    digits; the subset file that DataComp's resharder and baselines read and write

The second is left out where no pair has a uid (the field "uid" of its metadata).
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from diht_jax.data.atomic_file import temporary_path, write_atomically

KEPT_SUFFIX = ".kept.json"
KEYS_FILE = "kept_keys.txt"
UIDS_FILE = "kept_uids.npy"
UID_DTYPE = np.dtype("u8,u8")

_UID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
_CHUNK = 2**16
_MAX_SORTED = 2**24  # uids that are sorted at a time: 256 MB

KeptPair = tuple[str, str | None, str | None]


class KeptLog:
    """The kept pairs of a part, in order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, key: str, uid: object, image_format: str | None) -> None:
        """Takes the next pair; a uid of another form than DataComp's is left out."""
        is_uid = isinstance(uid, str) and _UID.fullmatch(uid)
        row = [key, uid.lower() if is_uid else None, image_format]
        self._lines.append(json.dumps(row) + "\n")

    def write(self, path: pathlib.Path) -> None:
        """Writes the file."""
        write_atomically(path, "".join(self._lines).encode())


def kept_path(output: str | os.PathLike[str]) -> pathlib.Path:
    """Where the file of a part lies."""
    return pathlib.Path(os.fspath(output) + KEPT_SUFFIX)


def read_kept(path: pathlib.Path) -> Iterator[KeptPair]:
    """The pairs of one part."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield tuple(json.loads(line))


def write_lists(folder: str | os.PathLike[str], paths: Sequence[pathlib.Path]) -> None:
    """Writes both lists; they need no more memory for more pairs.

    Args:
        folder: where they go.
        paths: of the parts' files, in order.
    """
    folder = pathlib.Path(folder)
    target = folder / KEYS_FILE
    temporary = temporary_path(target)
    pairs, uids = 0, 0
    with tempfile.TemporaryFile(dir=folder) as raw:
        try:
            with open(temporary, "x", encoding="utf-8") as keys:
                kept = itertools.chain.from_iterable(map(read_kept, paths))
                while chunk := list(itertools.islice(kept, _CHUNK)):
                    # A line break would end the key.
                    keys.writelines(f"{' '.join(key.splitlines())}\n" for key, _, _ in chunk)
                    found = _pack(uid for _, uid, _ in chunk if uid is not None)
                    raw.write(found.tobytes())
                    pairs, uids = pairs + len(chunk), uids + len(found)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        raw.flush()
        if uids:
            _write_sorted(folder / UIDS_FILE, np.memmap(raw, UID_DTYPE, "r"))
        else:
            (folder / UIDS_FILE).unlink(missing_ok=True)
    if 0 < uids < pairs:
        logging.warning("%s: %d of %d kept pairs have no uid", UIDS_FILE, pairs - uids, pairs)


def _pack(uids: Iterable[str]) -> np.ndarray:
    return np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], UID_DTYPE)


def _write_sorted(path: pathlib.Path, uids: np.ndarray) -> None:
    """Sorts range by range of the upper half, so that only a range is ever held."""
    ranges = -(-len(uids) // _MAX_SORTED)
    temporary = temporary_path(path)
    try:
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
            with open(temporary, "xb") as file:
                header = {"descr": UID_DTYPE.descr, "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, header)
                body.seek(0)
                while data := body.read(2**24):
                    file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
