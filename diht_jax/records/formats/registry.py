"""The formats of record shards, by the name that a config gives them; which one a file has."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable

from diht_jax.records import catalog
from diht_jax.records.catalog import Paths, Share
from diht_jax.records.formats.array_record import ArrayRecordSource, ArrayRecordWriter
from diht_jax.records.formats.tar_records import TarRecordSource
from diht_jax.records.formats.tar_writer import TarWriter
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter
from diht_jax.storage.files import find_inputs
from diht_jax.storage.stores import is_remote

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """A format of shards.

    Attributes:
        suffix: ending of the names of its shards.
        source: random access to the records of many shards; its `kind` is the name in `catalog`.
        writer: of one shard.
        tfds_name: what TFDS calls it; None where it does not read it.
    """

    suffix: str
    source: type[ShardedRecords]
    writer: type[RecordWriter]
    tfds_name: str | None = None


# By the values of `config.output_format`. Of a folder with several, the first one is read.
FORMATS = {
    "tfrecord": ShardFormat(".tfrecord", TFRecordSource, TFRecordWriter, "tfrecord"),
    "array_record": ShardFormat(
        ".array_record", ArrayRecordSource, ArrayRecordWriter, "array_record"
    ),
    "webdataset": ShardFormat(".tar", TarRecordSource, TarWriter),
}


def check_format(name: str, allowed: Iterable[str] = FORMATS) -> None:
    """Raises ValueError for a `config.output_format` that is not one of those allowed."""
    if name not in allowed:
        raise ValueError(f"config.output_format='{name}'; expected one of {', '.join(allowed)}")


def open_source(paths: Paths, share: Share | None = None) -> ShardedRecords:
    """The records of some shards, all of one format.

    Args:
        paths: a shard, a folder, a glob or a list of these; also their URLs.
        share: see `catalog.open_catalog`.

    Raises:
        ValueError: nothing is found, several formats are, or a shard is broken.
    """
    return FORMATS[shared_format(paths, share)].source(paths, share=share)


def find_shards(paths: Paths) -> list[str]:
    """As `catalog.find_shards`, of whatever format the shards are."""
    return catalog.find_shards(paths, FORMATS[format_of(paths)].source.kind)


def is_shard(path: str) -> bool:
    """Whether a path is a file with the name of a shard of any format."""
    return any(catalog.is_shard(path, form.source.kind) for form in FORMATS.values())


def open_writer(path: str | os.PathLike[str]) -> RecordWriter:
    """A writer of one shard, such as `TFRecordWriter`, by the name of the shard or its URL."""
    name = name_format(os.fspath(path))
    if name is None:
        suffixes = ", ".join(form.suffix for form in FORMATS.values())
        raise ValueError(f"{path}: not the name of a shard; expected one that ends in {suffixes}")
    return FORMATS[name].writer(path)


def name_format(path: str) -> str | None:
    """The format of a shard by its name alone; None where it is no name of a shard."""
    kinds = {name: form.source.kind for name, form in FORMATS.items()}
    return next((n for n, kind in kinds.items() if catalog.has_shard_name(path, kind)), None)


def format_of(paths: Paths) -> str:
    """The format of the shards that some paths lead to.

    Args:
        paths: as of `open_source`.

    Returns:
        A key of `FORMATS`. A single file of another name is taken for TFRecord.

    Raises:
        ValueError: nothing is found, several formats are, or tars that are compressed.
    """
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = {entry: _entry_format(entry) for entry in map(os.fspath, entries)}
    names = list(dict.fromkeys(filter(None, found.values())))
    if len(names) > 1:
        examples = [next(e for e, n in found.items() if n == name) for name in names]
        raise ValueError(
            f"shards of several formats: {', '.join(examples)} are {', '.join(names)}; name those "
            "of one format, or convert the others by `python -m data_prep.filter --config "
            "configs/prep/convert.py`"
        )
    if not names and entries and not any(map(os.path.isfile, found)):
        raise ValueError(
            f"no TFRecord shard at '{next(iter(found))}', nor one of another format; expected a "
            "file, a folder of *.tfrecord, *.array_record or *.tar files, or a glob that matches "
            "some"
        )
    return names[0] if names else "tfrecord"


def _entry_format(entry: str) -> str | None:
    if not is_remote(entry) and os.path.isfile(entry):
        files = [entry]
    elif os.path.isdir(entry):
        files = os.listdir(entry)
    elif (name := name_format(entry)) is not None:  # of a glob, too
        return name
    elif is_remote(entry):
        files = find_inputs(entry)
    else:
        files = glob.glob(entry, recursive=True)
    found = {name_format(path) for path in files}
    compressed = [path for path in files if path.endswith(_COMPRESSED_TARS)]
    if compressed and found == {None}:
        raise ValueError(
            f"{compressed[0]}: a tar that is compressed has no random access; unpack it to a plain "
            ".tar, or make record shards of it by `python -m data_prep.filter --config "
            "configs/prep/convert.py`"
        )
    return next((name for name in FORMATS if name in found), None)


def shared_format(paths: Paths, share: Share | None) -> str:
    """As `format_of`, found by the first process of a run alone."""
    if share is None:
        return format_of(paths)
    return share(lambda: format_of(paths).encode()).decode()
