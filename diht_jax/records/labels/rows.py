"""The rows of labels that belong to the records of a run, and how they are joined to them.

What the files are belongs in `files.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diht_jax.records.catalog import Share, list_folder
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.format import TFRecordError
from diht_jax.records.labels.files import (
    LABELS,
    MANIFEST,
    LabelFile,
    Manifest,
    Sidecars,
    find_input,
    read_manifest,
)
from diht_jax.records.schema import CONCEPT_FIELDS, Record, check_concepts
from diht_jax.records.sharded import LocalFile, ShardedRecords
from diht_jax.records.train_data import TrainSource
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.files import exists, is_glob
from diht_jax.storage.stores import is_remote

_MAX_OPEN_FILES = 128
_EMPTY = (np.zeros(0, np.int32), np.zeros(0, np.float32))


class LabelRows:
    """The labels of the records of a data set, by the number of the record.

    It can be pickled and shared by threads. A file is opened when a record of its shard is read.
    One in a store is copied to this host then, once for all its processes.
    """

    def __init__(
        self,
        folder: str,
        files: Sequence[LabelFile],
        dtype: np.dtype,
        cache_dir: str | None = None,
        patiently: Callable[[Callable[[], Any]], Any] | None = None,
        kind: Sidecars = LABELS,
    ):
        """Opens nothing yet.

        Args:
            folder: of the labels.
            files: of the shards, in their order.
            dtype: of a row.
            cache_dir: gets the copies of files in a store; None is a folder of this user in the
                system's temporary one.
            patiently: calls a function until a store answers; once where None.
            kind: of the files.
        """
        self.kind = kind
        self.files = tuple(files)
        self.dtype = dtype
        self._folder = folder
        self._cache_dir = cache_dir
        self._patiently = patiently
        self._starts = np.cumsum([0, *(file.records for file in files)], dtype=np.int64)
        self._reset_open_files()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> np.void:
        """The row of a record.

        Raises:
            TFRecordError: its file was changed or cut off.
        """
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        size = self.dtype.itemsize
        start = self.files[number].rows_at + (index - int(self._starts[number])) * size
        data = self._open_file(number).read_range(start, start + size)
        if len(data) != size:
            raise _changed(self.kind, self._folder, self.files[number])
        return np.frombuffer(data, self.dtype)[0]

    def fingerprint(self) -> tuple[tuple[str, int, int, str], ...]:
        """Rows of a `Fingerprint` for the files of labels."""
        return tuple(
            (f"{self.kind.folder}/{file.file}", file.records, file.file_bytes, file.file_digest)
            for file in self.files
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_open_files()

    def _reset_open_files(self) -> None:
        # The cache locks in C: there is no lock of ours that a fork could inherit locked. It must
        # not refer to this object: as a cycle, it would keep files open for long.
        self._open_file = functools.lru_cache(_MAX_OPEN_FILES)(
            functools.partial(
                _open_file, self.kind, self._folder, self.files, self._cache_dir, self._patiently
            )
        )


def _open_file(
    kind: Sidecars,
    folder: str,
    files: Sequence[LabelFile],
    cache_dir: str | None,
    patiently: Callable[[Callable[[], Any]], Any] | None,
    number: int,
) -> LocalFile:
    file = files[number]
    path = os.path.join(folder, kind.folder, file.file)
    if is_remote(path):
        copy = functools.partial(
            cached_copy,
            path,
            f"{file.file_digest}-{file.file}",
            file.file_bytes,
            cache_dir,
            "name another folder by config.data.cache_dir",
        )
        path = patiently(copy) if patiently else copy()
    try:
        opened = LocalFile(path)
    except FileNotFoundError as error:
        raise _changed(kind, folder, file) from error
    if opened.size != file.file_bytes:
        raise _changed(kind, folder, file)
    return opened


def _changed(kind: Sidecars, folder: str, file: LabelFile) -> TFRecordError:
    return TFRecordError(
        f"{os.path.join(folder, kind.folder, file.file)} is not the file that {kind.manifest} "
        "describes: it was removed, changed or cut off; run data_prep.label again"
    )


def open_labels(
    folder: str,
    records: ShardedRecords,
    key: str = "config.data.labels",
    *,
    share: Share | None = None,
    cache_dir: str | None = None,
    patiently: Callable[[Callable[[], Any]], Any] | None = None,
) -> LabelRows:
    """The labels of some records, once it is sure that they belong to them.

    No file of labels is opened, and no shard that a `dataset.index` describes.

    Args:
        folder: path or URL, as `data_prep.label` has written it.
        records: to be labelled.
        key: of the config, for messages.
        share: for a run of several processes, all of which call: the first one alone reads the
            folder.
        cache_dir, patiently: of `LabelRows`.

    Raises:
        ValueError: the folder has no labels, or lacks those of a shard, or has them of others.
    """

    def read() -> bytes:
        manifest = read_manifest(folder, key)
        check_listing(LABELS, manifest.files, folder, key)
        return manifest.encode()

    manifest = Manifest.parse(share(read) if share else read(), os.path.join(folder, MANIFEST))
    files = files_of_shards(LABELS, manifest.files, records, f"{key}={folder}")
    return LabelRows(folder, files, manifest.dtype, cache_dir, patiently)


def files_of_shards(
    kind: Sidecars, files: Sequence[LabelFile], records: ShardedRecords, where: str
) -> list[LabelFile]:
    """The file of every shard of some records.

    Args:
        kind: of the files.
        files: that there are.
        records: in shards.
        where: begins the messages.

    Raises:
        ValueError: a shard has no file, or that of other records.
    """
    by_name: dict[str, list[LabelFile]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    found = fingerprint_records(records).shards
    return [
        _match(kind, by_name.get(shard[0], []), shard, path, where)
        for shard, path in zip(found, records.paths, strict=True)
    ]


def check_listing(kind: Sidecars, files: Sequence[LabelFile], folder: str, key: str) -> None:
    """Raises ValueError where a file is missing or has another size; one listing."""
    try:
        sizes = list_folder(os.path.join(folder, kind.folder))
    except FileNotFoundError:
        sizes = {}
    wrong = [file for file in files if sizes.get(file.file) != file.file_bytes]
    if wrong:
        first = wrong[0]
        state = f"has {sizes[first.file]} bytes" if first.file in sizes else "is missing"
        raise ValueError(
            f"{key}={folder}: {len(wrong)} of {len(files)} files of {kind.what} are not those "
            f"that {kind.manifest} describes, such as {kind.folder}/{first.file}, which {state} "
            f"(expected {first.file_bytes}); copy the whole folder, or run data_prep.label again"
        )


def _match(
    kind: Sidecars,
    candidates: Sequence[LabelFile],
    shard: tuple[str, int, int, str],
    path: str,
    where: str,
) -> LabelFile:
    """The file that belongs to a shard, among those of its name."""
    for file in candidates:
        if file.identity == shard:
            return file
    advice = "label these records with `python -m data_prep.label`, or name the labels of theirs"
    if not candidates:
        raise ValueError(f"{where}: no {kind.what} of the shard {path}; {advice}")
    _, records, num_bytes, digest = shard
    other = candidates[0]
    raise ValueError(
        f"{where}: {kind.folder}/{other.file} belongs to another shard than {path}: to "
        f"{other.records} records in {other.num_bytes} bytes with digest {other.digest}, and "
        f"there are {records} in {num_bytes} bytes with digest {digest}; {advice}"
    )


def resolve_source(source: TrainSource) -> TrainSource:
    """A source whose path is a folder of labels alone as the records that these belong to."""
    if source.labels or not isinstance(source.path, str) or is_glob(source.path):
        return source
    path = os.path.join(source.path, MANIFEST)
    if not exists(path):
        return source
    inputs = [find_input(text, source.path) for text in read_manifest(source.path).inputs]
    return dataclasses.replace(source, path=inputs, labels=source.path)


def decode_joined(decode: Callable[[Any], Record], element: tuple[Any, np.void]) -> Record:
    """The record of an element and its labels.

    Args:
        decode: makes a record of an element, maybe with labels of its own, which are replaced.
        element: of the records, and the row of `LabelRows`.

    Raises:
        ValueError: as of `decode`, and for labels that are damaged.
    """
    data, row = element
    record = decode(data)
    values: dict[str, np.ndarray] = {}
    for names in CONCEPT_FIELDS:
        ids, probs = _EMPTY
        if row["labelled"]:
            ids, probs = row[names[0]].astype(np.int32), row[names[1]].astype(np.float32)
        check_concepts(record.key, names[0], ids, names[1], probs)
        values |= dict(zip(names, (ids, probs), strict=True))
    return dataclasses.replace(record, **values)
