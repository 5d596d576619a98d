"""From the `input` of a preparation config to units of work.

The readers themselves live in `diht_jax.data.readers`, where the evaluation finds them too; this
module holds what only offline jobs need: the config section, img2dataset's parquet files with
images, TFRecord shards in an object store, and the share of one job.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.sources import img2dataset
from diht_jax.data.readers import registry, tables, tfds
from diht_jax.data.readers.base import Skipped
from diht_jax.data.readers.registry import SourceShard, list_shards
from diht_jax.data.records import remote, schema
from diht_jax.data.records.schema import Pair
from diht_jax.data.records.tfrecord import TFRecordSource, is_shard

_Task = TypeVar("_Task")


def default_source() -> ml_collections.ConfigDict:
    """The config section `source`: how to read what `input` names."""
    table = tables.TableOptions()
    c = ml_collections.ConfigDict()
    # Tables (jsonl, csv, tsv).
    c.image_column = table.image_column  # path of the image, relative to image_root
    c.caption_column = table.caption_column  # in jsonl also a list of captions
    c.key_column = placeholder(str)  # None: keys are made of table name and row number
    c.image_root = placeholder(str)  # None: the folder of the table
    c.rows_per_shard = table.rows_per_shard  # rows that make one output shard
    # TensorFlow Datasets.
    c.data_dir = placeholder(str)  # None: TFDS's own default
    c.image_feature = placeholder(str)  # None: found by type
    c.caption_feature = placeholder(str)  # None: found by name and type
    return c


def list_sources(pairs: str | None, source: ml_collections.ConfigDict) -> list[SourceShard]:
    """Divides the input into units of work, in a fixed order.

    Args:
        pairs: `config.input`: any source of `diht_jax.data.readers`, TFRecord shards by their URL,
            or several with commas between them.
        source: the section of `default_source`.

    Raises:
        ValueError: no input is set or found.
    """
    if not pairs:
        raise ValueError(
            "config.input is not set: expected tars, tables, a folder, TFRecord shards or "
            "tfds:NAME:SPLIT, such as --config.input='/data/*.tar'"
        )
    texts = [pairs] if os.path.exists(pairs) else pairs.split(",")
    shards = []
    for text in map(str.strip, texts):
        if remote.is_remote(text) and not text.startswith(tfds.PREFIX):
            shards += _list_remote(text)
            continue
        parquet = find_parquet(text)
        shards += [SourceShard(img2dataset.KIND, path) for path in parquet] or list_shards(
            text, **source.to_dict()
        )
    return shards


def _list_remote(url: str) -> list[SourceShard]:
    urls = sorted(name for name in remote.list_files(url) if is_shard(name))
    if not urls:
        raise ValueError(
            f"no TFRecord shards at '{url}'; of an object store only these are read, tars and "
            "tables must be copied or mounted"
        )
    return [SourceShard("tfrecord", name) for name in urls]


def find_parquet(text: str) -> list[str]:
    """The parquet files that a path or a glob names, or that a folder holds without any tar.

    Args:
        text: of the input.

    Returns:
        Sorted paths; none where the text names something else.
    """
    suffix = img2dataset.PARQUET_SUFFIX
    if os.path.isdir(text):
        names = sorted(os.listdir(text))
        # Beside tars they hold metadata only.
        if any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names):
            return []
        return [os.path.join(text, name) for name in names if _is_visible(name, suffix)]
    if not text.endswith(suffix):
        return []
    paths = [text] if os.path.isfile(text) else sorted(glob.glob(text, recursive=True))
    return [path for path in paths if _is_visible(os.path.basename(path), suffix)]


def _is_visible(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.startswith(".")


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Reads one unit of work; as `diht_jax.data.readers.read_pairs`, and parquet files too.

    Args:
        shard: of `list_sources`.

    Raises:
        ValueError: the file is damaged; names it.
    """
    if shard.kind == img2dataset.KIND:
        return img2dataset.read_parquet(shard)
    if remote.is_remote(shard.path):
        return _read_remote(shard.path)
    return registry.read_pairs(shard)


def _read_remote(url: str) -> Iterator[Pair]:
    records = TFRecordSource(url)
    for number in range(len(records)):
        try:
            yield schema.decode_record(records[number])
        except ValueError as error:
            raise ValueError(f"{url}: record {number}: {error}") from error


def check_output(output: str | os.PathLike[str] | None, sources: Sequence[SourceShard]) -> str:
    """The output folder, once it is sure that writing there destroys no input.

    Args:
        output: `config.output`.
        sources: what will be read.

    Raises:
        ValueError: it is not set, or it is a folder that is being read.
    """
    if not output:
        raise ValueError("config.output is not set: expected a folder, which is made if missing")
    folder = os.path.realpath(output)
    for source in sources:
        if os.path.dirname(os.path.realpath(source.path)) == folder:
            raise ValueError(f"config.output='{output}' is the folder of the input '{source.path}'")
    return os.fspath(output)


def take_share(tasks: Sequence[_Task], task_index: int, num_tasks: int) -> list[_Task]:
    """The tasks of one job of a job array: every `num_tasks`-th.

    Args:
        tasks: of all jobs together.
        task_index: number of this job, from 0.
        num_tasks: jobs in the array.

    Raises:
        ValueError: the number is not in [0, num_tasks).
    """
    if not 0 <= task_index < num_tasks:
        raise ValueError(
            f"--task_index={task_index} with --num_tasks={num_tasks}; expected an index from 0 to "
            f"{num_tasks - 1}"
        )
    return list(tasks[task_index::num_tasks])
