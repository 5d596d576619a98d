"""Command: write the index of a data set, `dataset.index`, into the folder of its shards.

    python -m diht_jax.data.index gs://bucket/kept
    python -m diht_jax.data.index /data/laion /data/curated

The folders hold TFRecord shards or webdataset tars, whoever wrote them; `data_prep.filter` and
`data_prep.label` write the index themselves. With it, training starts by a constant number of
requests for any number of shards and processes. Run again, it looks only at shards that are
new or have another size, and takes those that are gone out of the index; `--overwrite` looks at all
of them. What was read of a run that was stopped is kept, and not read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags, logging

from diht_jax import command_line
from diht_jax.progress import ProgressBar
from diht_jax.records import tfrecord
from diht_jax.records.catalog import describe_stale, has_shard_name, list_folder
from diht_jax.records.dataset_index import (
    ANCHOR_RECORDS,
    END_BYTES,
    INDEX_NAME,
    ShardEntry,
    ShardTable,
    damaged,
    digest_shard,
    encode_head,
    encode_preamble,
    read_table,
)
from diht_jax.records.format import (
    FRAME_BYTES,
    TFRecordError,
    framed_length,
)
from diht_jax.records.formats import tar_records
from diht_jax.records.formats.shard_index import INDEX_SUFFIX, wrong_index
from diht_jax.records.indexed_offsets import IndexedOffsets
from diht_jax.records.vocabulary import folder_vocabulary
from diht_jax.storage.files import local_output, upload
from diht_jax.storage.locks import lock_file
from diht_jax.storage.stores import is_remote, open_ranges

_WORK = f".{INDEX_NAME}.parts"  # within a local folder
_NAMES_SHOWN = 3
_INDICES = {"tfrecord": tfrecord.INDEX, "tar": tar_records.INDEX}


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """The outcome of `update_index`.

    Attributes:
        path: of the index.
        num_shards, num_records: in the index.
        num_read: shards that had to be looked at.
        changes: how the folder differed from an older index, in words.
    """

    path: str
    num_shards: int
    num_records: int
    num_read: int
    changes: Sequence[str] = ()


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
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
    """Indexes the folders that stand on the command line."""
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
            print(f"{folder}: {change}")
        print(
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
    """Writes the index of a folder, or brings it up to date.

    Args:
        folder: of the shards, or its URL.
        num_threads: shards that are read at a time.
        overwrite: scan all shards, also those that an index describes.
        work_dir: as the flag of this name.
        vocabulary: what all shards are labelled with (`Vocabulary.describe`); None looks at
            their statistics, if the folder has a vocabulary.
        labels: what `labels.shards.describe_labels` states of shards of labels; None keeps what an
            older index states.
        progress: show a bar.

    Raises:
        ValueError: there is no shard, or some are broken (the others need not be read again), or
            the folder cannot be written.
    """
    folder = os.fspath(folder).rstrip("/")
    with _locked_work(folder, work_dir) as work:
        sizes = _list_shards(folder)
        old = _old_index(folder, work)
        labels = labels or (old.table.labels if old else None)
        old = None if overwrite else old
        changes = describe_stale(_sizes_of(old.table), sizes, is_whole=True) if old else []
        path = os.path.join(folder, INDEX_NAME)
        is_same = old and vocabulary in (None, old.table.vocabulary) and labels == old.table.labels
        if is_same and not changes:
            return IndexReport(path, len(old.table), int(old.table.starts[-1]), 0)
        builder = _Builder(folder, sizes, work, old, trusts_shard_indices=not overwrite)
        num_read = builder.look_at_shards(num_threads, progress)
        builder.write(path, vocabulary or _find_vocabulary(folder, sizes), labels)
        entries = builder.entries
    return IndexReport(
        path, len(entries), sum(entry.num_records for entry in entries), num_read, changes
    )


def is_indexable(path: str) -> bool:
    """Returns whether a file is named like a shard that an index can describe."""
    return _kind_of(path) is not None


class _Builder:
    """Makes the entries of all shards, and writes the index."""

    def __init__(
        self,
        folder: str,
        sizes: Mapping[str, int],
        work: pathlib.Path,
        old: IndexedOffsets | None,
        trusts_shard_indices: bool,
    ):
        self._folder = folder
        self._sizes = sizes
        self._work = work
        self._old = old
        self._trusts_shard_indices = trusts_shard_indices
        # Shards that the old index describes as they are.
        self._rows = {
            name: row
            for name, row in (old.table.rows if old else {}).items()
            if sizes.get(name) == old.table.num_bytes[row]
        }
        self._entries = {name: old.table.entry(row) for name, row in self._rows.items()}

    @property
    def entries(self) -> list[ShardEntry]:
        """The entries of all shards, in their order."""
        return [self._entries[name] for name in sorted(self._entries)]

    def look_at_shards(self, num_threads: int, progress: bool) -> int:
        """Makes all entries; returns the number of shards whose records had to be found.

        Raises:
            ValueError: some shards cannot be read; names them.
        """
        unknown = [name for name in sorted(self._sizes) if name not in self._entries]
        num_read, failures = 0, {}
        pool = futures.ThreadPoolExecutor(num_threads)
        bar = ProgressBar(
            total=len(self._sizes),
            initial=len(self._sizes) - len(unknown),
            unit="shard",
            disable=not (progress and unknown),
            dynamic_ncols=True,
        )
        try:
            running = {pool.submit(self._look, name): name for name in unknown}
            for future in futures.as_completed(running):
                try:
                    self._entries[running[future]], is_kept = future.result()
                    num_read += not is_kept
                except (ValueError, OSError) as error:
                    failures[running[future]] = str(error)
                bar.update()
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)
        if failures:
            shown = "; ".join(failures[name] for name in sorted(failures)[:_NAMES_SHOWN])
            raise ValueError(
                f"{self._folder}: {len(failures):,} of {len(self._sizes):,} shards cannot be "
                f"indexed: {shown}{'; ...' if len(failures) > _NAMES_SHOWN else ''}. Mend them or "
                "move them away, and run the command again; the others need not be read again"
            )
        return num_read

    def write(
        self, path: str, vocabulary: Mapping[str, Any] | None, labels: Mapping[str, Any] | None
    ) -> None:
        """Writes the index, in a store by way of a local file."""
        if not is_remote(path):
            write_dataset_index(path, self.entries, self._load_offsets, vocabulary, labels)
            return
        local = self._work / INDEX_NAME
        write_dataset_index(local, self.entries, self._load_offsets, vocabulary, labels)
        try:
            upload(local, path)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written ({error}); the index is in {local}, copy it there"
            ) from error

    def _look(self, name: str) -> tuple[ShardEntry, bool]:
        """The entry of a shard, and whether an earlier run has kept its offsets."""
        path, size, kind = os.path.join(self._folder, name), self._sizes[name], _kind_of(name)
        offsets = self._load_kept(name)
        is_kept = offsets is not None
        if offsets is None:
            trusts = self._trusts_shard_indices
            offsets = _INDICES[kind].find(path, size, trust_index=trusts)
        file = open_ranges(path, size)
        if file.size != size:
            raise ValueError(f"{path}: is being written; run the command again when it is done")
        head = file.read_range(0, END_BYTES)
        tail = file.read_range(max(0, size - END_BYTES), size) if size > len(head) else head
        if kind == "tfrecord" and not _fits_head(offsets, head):
            raise wrong_index(path, "it has other records")
        if not is_kept and not (self._trusts_shard_indices and _has_own_index(path)):
            _INDICES[kind].write(str(self._work / name), offsets, size)
        digest = digest_shard(offsets, head, tail)
        return ShardEntry.of_shard(name, kind, size, offsets, digest), is_kept

    def _load_kept(self, name: str) -> np.ndarray | None:
        """The offsets of a shard that an earlier run has found; None where it has not."""
        try:
            return _INDICES[_kind_of(name)].load(str(self._work / name), self._sizes[name])
        except (ValueError, OSError):  # damaged, or of an older shard
            return None

    def _load_offsets(self, entry: ShardEntry) -> np.ndarray:
        if entry.name in self._rows:
            offsets = self._old.offsets(self._rows[entry.name])
            if not np.array_equal(offsets[::ANCHOR_RECORDS], entry.anchors):
                raise damaged(self._old.location, f"the offsets of {entry.name} are wrong")
            return offsets
        offsets = self._load_kept(entry.name)
        if offsets is not None:
            return offsets
        return _INDICES[entry.kind].find(os.path.join(self._folder, entry.name), entry.num_bytes)


def write_dataset_index(
    path: str | os.PathLike[str],
    entries: Sequence[ShardEntry],
    load_offsets: Callable[[ShardEntry], np.ndarray],
    vocabulary: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> None:
    """Writes an index; it appears whole or not at all.

    Args:
        path: of a local file.
        entries: of all shards, in their order.
        load_offsets: uint64 [n] of an entry; called for one after the other.
        vocabulary: see `update_index`.
        labels: see `update_index`.

    Raises:
        ValueError: the entries contradict each other, or a shard has changed since.
    """
    path = pathlib.Path(path)
    head = encode_head(entries, vocabulary, labels)
    ShardTable(head, os.fspath(path))  # so that nothing is written that no reader takes
    with local_output(path) as local, open(local, "wb") as file:
        file.write(encode_preamble(head))
        file.write(head)
        for entry in entries:
            offsets = load_offsets(entry)
            if len(offsets) != entry.num_records:
                raise ValueError(f"{entry.name} has changed while its index was being written")
            file.write(offsets.astype("<u8").tobytes())


@contextlib.contextmanager
def _locked_work(folder: str, work_dir: str | os.PathLike[str] | None) -> Iterator[pathlib.Path]:
    """The folder for parts, for this process alone; it is removed where all went well.

    Raises:
        ValueError: there is no such folder of shards, or it cannot be written.
    """
    if work_dir is not None or is_remote(folder):
        base = pathlib.Path(work_dir or f"{tempfile.gettempdir()}/diht_jax-{os.getuid()}")
        work = base / f"index-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
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
        work.mkdir(parents=True, exist_ok=True)  # another process may have had the lock, and ended
        try:
            yield work
        except BaseException:
            if not any(work.glob(f"*{INDEX_SUFFIX}")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _list_shards(folder: str) -> dict[str, int]:
    """Bytes of the shards of a folder, by name.

    Raises:
        ValueError: there are none.
    """
    found = list_folder(folder)
    shards = {name: found[name] for name in sorted(found) if _kind_of(name)}
    if not shards:
        raise ValueError(f"'{folder}' holds no shard; expected *.tfrecord files or *.tar files")
    return shards


def _find_vocabulary(folder: str, names: Iterable[str]) -> dict[str, Any] | None:
    try:
        found = folder_vocabulary(folder, [os.path.join(folder, name) for name in names])
    except ValueError as error:
        logging.warning("the index does not state the concepts of the records: %s", error)
        return None
    return None if found is None else found.describe()


def _kind_of(name: str) -> str | None:
    return next((kind for kind in _INDICES if has_shard_name(name, kind)), None)


def _old_index(folder: str, work: pathlib.Path) -> IndexedOffsets | None:
    """The index that is there, unless it is damaged; of a store, a local copy of it."""
    path = os.path.join(folder, INDEX_NAME)
    try:
        index = IndexedOffsets(read_table(path), path)
        index.make_local(work)
    except FileNotFoundError:
        return None
    except TFRecordError as error:
        logging.warning("all shards are looked at: %s", error)
        return None
    return index


def _sizes_of(table: ShardTable) -> dict[str, int]:
    return dict(zip(table.names, table.num_bytes.tolist(), strict=True))


def _fits_head(offsets: np.ndarray, head: bytes) -> bool:
    """Checks that the first records of a TFRecord shard begin where its index says."""
    found = position = 0
    while position + FRAME_BYTES <= len(head):
        if found >= len(offsets) or offsets[found] != position:
            return False
        length = framed_length(head[position : position + FRAME_BYTES])
        if length is None:
            return True  # damaged, which is noticed when it is read
        found, position = found + 1, position + length
    return True


def _has_own_index(path: str) -> bool:
    return not is_remote(path) and os.path.exists(path + INDEX_SUFFIX)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
