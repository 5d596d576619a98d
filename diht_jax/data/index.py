"""Command: write the index of a data set, `dataset.index`, into the folder of its shards.

    python -m diht_jax.data.index gs://bucket/kept
    python -m diht_jax.data.index /data/laion /data/curated

The folders hold TFRecord shards, ArrayRecord shards or webdataset tars from any writer.
`data_prep.filter`, `data_prep.label` and `diht_jax.caption` write the index themselves. With an
index, training starts with a constant number of requests for any number of shards and processes.
Run again, the command reads only new or resized shards, and drops missing ones from the index;
`--overwrite` reads all shards. A stopped run keeps what it has read, and the next run continues
from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags, logging

from diht_jax import command_line
from diht_jax.records.catalog import describe_stale
from diht_jax.records.dataset_index import (
    ANCHOR_RECORDS,
    INDEX_NAME,
    DatasetIndex,
    ShardEntry,
    damaged_index,
    digest_shard,
    encode_head,
    encode_preamble,
    read_index,
)
from diht_jax.records.formats import FORMATS
from diht_jax.records.shard_files import INDEX_SUFFIX, ShardIndex, TFRecordError, kind_of
from diht_jax.records.sharded import read_ends
from diht_jax.records.vocabulary import folder_vocabulary
from diht_jax.storage.files import find_inputs, local_output, upload
from diht_jax.storage.locks import lock_file
from diht_jax.storage.stores import RangesFile, is_remote
from diht_jax.terminal import ProgressBar, print_escaped

_WORK = f".{INDEX_NAME}.parts"  # within a local folder
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """The outcome of `update_index`."""

    path: str  # path of the index
    num_shards: int
    num_records: int
    num_read: int  # number of shards that had to be read
    changes: Sequence[str] = ()  # differences from the older index, in words


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share flag names."""
    flags.DEFINE_integer("num_threads", 32, "Shards that are read at a time.", lower_bound=1)
    flags.DEFINE_bool(
        "overwrite", False, "Scan all shards again, and replace the index; no .idx is believed."
    )
    flags.DEFINE_string(
        "work_dir",
        None,
        "Local folder for what was read so far; unset: a hidden one in that of local shards, one "
        "in the system's temporary folder for a store.",
    )


def main(folders: list[str]) -> None:
    """Indexes the folders given on the command line."""
    given = flags.FLAGS
    if not folders:
        raise ValueError("expected at least one folder or URL of shards, such as gs://bucket/kept")
    for folder in folders:
        report = update_index(
            folder,
            num_threads=given.num_threads,
            overwrite=given.overwrite,
            work_dir=given.work_dir,
            progress=True,
        )
        for change in report.changes:
            print_escaped(f"{folder}: {change}")
        print_escaped(
            f"{report.path}: {report.num_shards:,} shards, {report.num_records:,} records; "
            + (f"{report.num_read:,} shards were read" if report.num_read else "up to date")
        )


def update_index(
    folder: str | os.PathLike[str],
    *,
    num_threads: int = 32,
    overwrite: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> IndexReport:
    """Writes the index of a folder, or updates it.

    Args:
        overwrite: scan all shards, including those that an index describes.
        vocabulary: vocabulary of all shards (`Vocabulary.describe`). None reads it from their
            statistics if the folder has a vocabulary; for label shards, None keeps the one in an
            older index.
        labels: for label shards, the result of `labels.shards.describe_labels`; None likewise.

    Raises:
        ValueError: there is no shard, the folder cannot be written, or shards are broken. A further
            run does not read the intact shards again.
    """
    folder = os.fspath(folder).rstrip("/")
    path = os.path.join(folder, INDEX_NAME)
    with _locked_work(folder, work_dir) as work:
        sizes = _list_shards(folder)
        old = _old_index(folder, work)
        for part in work.glob(f"*{INDEX_SUFFIX}") if overwrite else ():
            part.unlink()  # may come from an untrusted `.idx`
        labels = labels or (old.labels if old else {})
        if labels and old and vocabulary is None:  # only the old index states it
            vocabulary = old.vocabulary
        old = None if overwrite else old
        changes, rows = [], {}
        if old:
            known = old.sizes()
            changes = describe_stale(known, sizes, is_whole=True)
            is_same = vocabulary in (None, old.vocabulary) and labels == old.labels
            if is_same and not changes:
                return IndexReport(path, len(old), int(old.starts[-1]), 0)
            # Shards that the old index describes correctly.
            rows = {name: row for name, row in old.rows.items() if sizes.get(name) == known[name]}
        unknown = [name for name in sizes if name not in rows]
        unread = [name for name in unknown if _load_kept(work, name, sizes[name]) is None]

        def look(name: str) -> ShardEntry:
            return _look(folder, work, name, sizes[name], trusts_index=not overwrite)

        entries = _look_at_all(folder, look, unknown, len(sizes), num_threads, progress)
        entries |= {name: old.entry(row) for name, row in rows.items()} if old else {}

        vocabulary = vocabulary or _find_vocabulary(folder, sizes)
        ordered = [entries[name] for name in sorted(entries)]
        _write_index(
            path,
            work,
            encode_head(ordered, vocabulary, labels),
            (_load_offsets(work, old, rows, entry) for entry in ordered),
        )
    num_records = sum(entry.num_records for entry in entries.values())
    return IndexReport(path, len(entries), num_records, len(unread), changes)


def _find_vocabulary(folder: str, names: Iterable[str]) -> dict[str, Any] | None:
    try:
        found = folder_vocabulary(folder, [os.path.join(folder, name) for name in names])
    except ValueError as error:
        logging.warning("the index does not state the concepts of the records: %s", error)
        return None
    return found.describe() if found else None


def _load_offsets(
    work: pathlib.Path, old: DatasetIndex | None, rows: Mapping[str, int], entry: ShardEntry
) -> np.ndarray:
    """Returns the offsets of a shard, from the old index or from this run's scans."""
    row = rows.get(entry.name)
    if old is None or row is None:
        offsets = _load_kept(work, entry.name, entry.num_bytes)
    else:
        offsets = old.offsets(row)
        if not np.array_equal(offsets[::ANCHOR_RECORDS], entry.anchors):
            raise damaged_index(old.path, f"the offsets of {entry.name} are wrong")
    if offsets is None or len(offsets) != entry.num_records:
        raise ValueError(f"{entry.name} has changed while its index was being written")
    return offsets


def _write_index(path: str, work: pathlib.Path, head: bytes, offsets: Iterable[np.ndarray]) -> None:
    """Writes an index atomically."""
    local = work / INDEX_NAME if is_remote(path) else pathlib.Path(path)
    with local_output(local) as output, open(output, "wb") as file:
        file.write(encode_preamble(head) + head)
        for each in offsets:
            file.write(each.astype("<u8").tobytes())
    if is_remote(path):
        try:
            upload(local, path)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written ({error}); the index is in {local}, copy it there"
            ) from error


def is_indexable(path: str) -> bool:
    """Returns whether a file is named like a shard that an index can describe.

    ArrayRecord shards must be local.
    """
    kind = kind_of(path)
    return kind is not None and not (kind == "array_record" and is_remote(path))


def _look_at_all(
    folder: str,
    look: Callable[[str], ShardEntry],
    names: Sequence[str],
    num_shards: int,
    num_threads: int,
    progress: bool,
) -> dict[str, ShardEntry]:
    """Reads the index entries of several shards; a ValueError names the shards that fail."""
    found, failures = {}, {}
    pool = futures.ThreadPoolExecutor(num_threads)
    bar = ProgressBar(
        total=num_shards,
        initial=num_shards - len(names),
        unit="shard",
        disable=not (progress and names),
        dynamic_ncols=True,
    )
    try:
        running = {pool.submit(look, name): name for name in names}
        for future in futures.as_completed(running):
            try:
                found[running[future]] = future.result()
            except (ValueError, OSError) as error:
                failures[running[future]] = str(error)
            bar.update()
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if failures:
        shown = "; ".join(failures[name] for name in sorted(failures)[:_NAMES_SHOWN])
        raise ValueError(
            f"{folder}: {len(failures):,} of {num_shards:,} shards cannot be indexed: "
            f"{shown}{'; ...' if len(failures) > _NAMES_SHOWN else ''}. Mend them or move them "
            "away, and run the command again; the others need not be read again"
        )
    return found


def _look(
    folder: str, work: pathlib.Path, name: str, size: int, *, trusts_index: bool
) -> ShardEntry:
    """Reads the index entry of a shard, and keeps its offsets for a later run."""
    path, kind = os.path.join(folder, name), str(kind_of(name))
    offsets = _load_kept(work, name, size)
    if offsets is None:
        index = _index_of(name)
        offsets = index.find(path, size) if trusts_index else index.scan(path)
        index.write(str(work / name), offsets, size)
    file = RangesFile(path, size)
    if file.size != size:
        raise ValueError(f"{path}: is being written; run the command again when it is done")
    digest = digest_shard(offsets, *read_ends(file))
    anchors = np.array(offsets[::ANCHOR_RECORDS], np.uint64)
    return ShardEntry(name, kind, len(offsets), size, digest, anchors)


def _index_of(name: str) -> ShardIndex:
    """Returns the `.idx` format for a shard's file name."""
    return FORMATS[str(kind_of(name))].source.shard_type.index


def _load_kept(work: pathlib.Path, name: str, size: int) -> np.ndarray | None:
    """Returns the offsets of a shard from an earlier run; None if they are not usable."""
    try:
        return _index_of(name).load(str(work / name), size)
    except (ValueError, OSError):  # damaged, or of an older shard
        return None


@contextlib.contextmanager
def _locked_work(folder: str, work_dir: str | os.PathLike[str] | None) -> Generator[pathlib.Path]:
    """Yields the locked folder for partial results, which is removed on success."""
    if work_dir is not None or is_remote(folder):
        base = pathlib.Path(work_dir or f"{tempfile.gettempdir()}/diht_jax-{os.getuid()}")
        place = os.fsencode(folder if is_remote(folder) else os.path.abspath(folder))
        work = base / f"index-{hashlib.sha256(place).hexdigest()[:16]}"
    elif not os.path.isdir(folder):
        raise ValueError(f"'{folder}' is no folder; expected one that holds shards, or its URL")
    else:
        work = pathlib.Path(folder) / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = lock_file(work / "lock")
    except OSError as error:
        raise ValueError(f"{work}: cannot be written ({error.strerror})") from error
    with lock:
        work.mkdir(parents=True, exist_ok=True)  # a previous holder may have removed it
        try:
            yield work
        except BaseException:
            if not any(work.glob(f"*{INDEX_SUFFIX}")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _list_shards(folder: str) -> dict[str, int]:
    """Returns name -> bytes of the shards in a folder; ValueError if there are none."""
    if is_remote(folder):
        listed = find_inputs(folder).items()
        found = {os.path.basename(path): size for path, size in listed if size is not None}
    else:
        with os.scandir(folder) as files:
            found = {file.name: file.stat().st_size for file in files if file.is_file()}
    names = (name for name in sorted(found) if is_indexable(os.path.join(folder, name)))
    shards = {name: found[name] for name in names}
    if not shards:
        raise ValueError(
            f"'{folder}' holds no shard; expected *.tfrecord, *.array_record or *.tar files"
        )
    return shards


def _old_index(folder: str, work: pathlib.Path) -> DatasetIndex | None:
    """Reads the existing index, or returns None if it is damaged; copies it from a store."""
    try:
        index = read_index(folder)
    except TFRecordError as error:
        logging.warning("all shards are looked at: %s", error)
        return None
    if index is not None:
        index.make_local(work)
    return index


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
