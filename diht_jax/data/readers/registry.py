"""The way in to pairs from anywhere: `open_source` to iterate, `list_shards` to divide the work.

Evaluation iterates over pairs; `data_prep` takes one shard at a time, in many processes. What the
text of a source may be:

    PATH.tar, GLOB/*.tar             webdataset, as img2dataset writes it
    PATH.jsonl, PATH.csv, PATH.tsv   a table beside a folder of images
    FOLDER                           TFRecord shards, tars or tables in it; else classes
    PATH.tfrecord, GLOB              our own records
    tfds:NAME[/CONFIG][:VERSION]:SPLIT, tfds:FOLDER:SPLIT   TensorFlow Datasets

Images are not decoded here.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from diht_jax.data.readers import image_folder, tables, tfds, webdataset
from diht_jax.data.readers.base import Skipped, SourceShard
from diht_jax.data.records import schema, tfrecord
from diht_jax.data.records.schema import Pair

__all__ = ["PairSource", "Skipped", "SourceShard", "list_shards", "open_source", "read_pairs"]

_LARGEST_LISTING = 5


class PairSource(Iterable[Pair]):
    """The pairs of a source, in a fixed order; can be iterated again and again.

    Attributes:
        shards: the units of work.
        skipped: reason -> count of the last complete iteration.
    """

    def __init__(self, name: str, shards: list[SourceShard]):
        self.name = name
        self.shards = shards
        self.skipped: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[Pair]:
        skipped: collections.Counter[str] = collections.Counter()
        for shard in self.shards:
            for entry in read_pairs(shard):
                if isinstance(entry, Pair):
                    yield entry
                else:
                    skipped[entry.reason] += 1
        self.skipped = skipped
        if skipped:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            logging.warning("%s: %d entries are no pairs: %s", self.name, skipped.total(), counts)


def open_source(spec: str | Sequence[str], **options: Any) -> PairSource:
    """Opens a source of pairs.

    Args:
        spec: one of the texts above, or a list of them.
        **options: fields of `tables.TableOptions` and `tfds_records.TfdsOptions`.

    Returns:
        An iterable of `schema.Pair`. Metadata may hold "captions", "label" and "class_name".

    Raises:
        ValueError: nothing is found, or an option does not exist.
    """
    return PairSource(str(spec), list_shards(spec, **options))


def list_shards(spec: str | Sequence[str], **options: Any) -> list[SourceShard]:
    """Divides a source into units of work, in a fixed order.

    Args:
        spec: one of the texts above, or a list of them.
        **options: as for `open_source`.

    Raises:
        ValueError: nothing is found, or an option does not exist.
    """
    table_options, tfds_options = _split_options(options)
    shards = []
    for text in [spec] if isinstance(spec, str) else list(spec):
        if text.startswith(tfds.PREFIX):
            shards += tfds.list_tfds_shards(text, tfds_options)
        else:
            shards += _list_paths(text, table_options)
    if not shards:
        raise ValueError(
            f"no source of pairs: got {spec!r}; see diht_jax/data/readers.py for forms"
        )
    return shards


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Reads one unit of work.

    Args:
        shard: one of `list_shards`.

    Returns:
        Pairs, and in their place what is none, with its reason.

    Raises:
        ValueError: the file is damaged; names it.
    """
    return _READERS[shard.kind](shard)


def _read_tfrecord(shard: SourceShard) -> Iterator[Pair]:
    for number, data in enumerate(tfrecord.read_records(shard.path)):
        try:
            yield schema.decode_record(data)
        except ValueError as error:
            raise ValueError(f"{shard.path}: record {number}: {error}") from error


_READERS: dict[str, Callable[[SourceShard], Iterator[Pair | Skipped]]] = {
    "webdataset": lambda shard: webdataset.read_tar(shard.path),
    "table": tables.read_table,
    "folder": image_folder.read_class,
    "tfds": tfds.read_tfds,
    "tfrecord": _read_tfrecord,
}


def _list_paths(text: str, options: tables.TableOptions) -> list[SourceShard]:
    if os.path.isdir(text):
        return _list_folder(text, options)
    paths = [text] if os.path.isfile(text) else sorted(glob.glob(text, recursive=True))
    paths = [path for path in paths if not path.endswith(".idx")]
    if not paths:
        raise ValueError(
            f"nothing at '{text}'; expected a file, a folder, a glob that matches some, or "
            "tfds:NAME:SPLIT"
        )
    shards = [(path, _list_file(path, options)) for path in paths]
    unknown = [path for path, listed in shards if listed is None]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown[:_LARGEST_LISTING])}: not a source of pairs; expected names that "
            f"end in {', '.join(webdataset.TAR_SUFFIXES + tables.TABLE_SUFFIXES)} or .tfrecord"
        )
    return [shard for _, listed in shards for shard in listed or ()]


def _list_folder(folder: str, options: tables.TableOptions) -> list[SourceShard]:
    files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    listed = {path: _list_file(path, options) for path in files}
    found = {path: shards for path, shards in listed.items() if shards is not None}
    kinds = {shard.kind for shards in found.values() for shard in shards}
    if len(kinds) > 1:
        raise ValueError(
            f"folder '{folder}' holds several kinds of source ({', '.join(sorted(kinds))}); name "
            "the files by a glob"
        )
    if found:
        return [shard for shards in found.values() for shard in shards]
    shards = image_folder.list_class_shards(folder)
    if not shards:
        raise ValueError(
            f"folder '{folder}' holds neither TFRecord shards, tars or tables nor sub-folders of "
            "images"
        )
    return shards


def _list_file(path: str, options: tables.TableOptions) -> list[SourceShard] | None:
    """The shards of one file; None where it is not a source."""
    if os.path.basename(path).startswith("."):
        return None
    if path.endswith(webdataset.TAR_SUFFIXES):
        return [SourceShard("webdataset", path)]
    if path.endswith(tables.TABLE_SUFFIXES):
        return tables.list_table_shards(path, options)
    if tfrecord.is_shard(path):
        return [SourceShard("tfrecord", path)]
    return None


def _split_options(
    options: dict[str, Any],
) -> tuple[tables.TableOptions, tfds.TfdsOptions]:
    table_names = [field.name for field in dataclasses.fields(tables.TableOptions)]
    tfds_names = [field.name for field in dataclasses.fields(tfds.TfdsOptions)]
    for name in options:
        if name not in table_names + tfds_names:
            nearest = difflib.get_close_matches(name, table_names + tfds_names, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(f"sources have no option '{name}'{hint}")
    return (
        tables.TableOptions(**{n: options[n] for n in table_names if n in options}),
        tfds.TfdsOptions(**{n: options[n] for n in tfds_names if n in options}),
    )
