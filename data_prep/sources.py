"""Units of work for the `input` of a preparation config, and the side files of img2dataset.

The readers are in `diht_jax.readers`, which the evaluation uses as well. This module contains what
only offline jobs need: the config section, the check of the output folder, and the metadata and
statistics of img2dataset. img2dataset writes these files for each shard:

    00000.tar           read by diht_jax.readers.shard_formats; with the output format "tfrecord"
                        00000.tfrecord instead, read by diht_jax.readers.shard_formats
    00000.parquet       the rows of the shard, including failed downloads; with the output format
                        "parquet" it also contains the images, and there is no tar
                        (read by diht_jax.readers.parquet)
    00000_stats.json    numbers of rows and successes, and the reasons of failures
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import operator
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import logging
from ml_collections.config_dict import placeholder

from diht_jax.readers import parquet, registry
from diht_jax.readers.base import IMAGE_EXTENSIONS
from diht_jax.readers.registry import Skipped, SourceShard
from diht_jax.readers.shard_formats import TAR_SUFFIXES
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.formats import FORMATS
from diht_jax.records.schema import Pair
from diht_jax.records.shard_files import kind_of
from diht_jax.records.tars import DamagedTarError
from diht_jax.storage import files
from diht_jax.storage.locks import check_writable
from diht_jax.storage.stores import StorageError, is_missing, is_remote

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")

TFRECORD_SUFFIX = ".tfrecord"

_CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")  # what the tar has already
_MAX_STATUSES = 50

_ONE_SLASH = re.compile(r"([a-z0-9]+):/([^/].*)", re.DOTALL)


class Input(NamedTuple):
    """A unit of work, and the root of the input source that it came from.

    Attributes:
        shard: the unit.
        root: the folder part of the source before its first wildcard; a folder is its own root.
    """

    shard: SourceShard
    root: str

    @property
    def path(self) -> str:
        """Path of the unit relative to the root, with "/" as separator."""
        compared = []
        for text in (self.shard.path, self.root):
            if is_remote(text):
                compared.append(text.split("://", 1)[1].strip("/"))
            else:
                compared.append(os.path.abspath(text).replace(os.sep, "/"))
        path, root = compared
        below = path.removeprefix(f"{root}/")
        # The data of sources such as tfds:NAME:SPLIT is not below the root.
        return below if below != path else path.rpartition("/")[2]


def default_source() -> ml_collections.ConfigDict:
    """Returns the config section `source`: the options of all source formats, with defaults.

    The options classes of the formats describe them, such as `readers.base.ColumnOptions`.
    """
    c = ml_collections.ConfigDict()
    for name, field in registry.option_defaults().items():
        c[name] = placeholder(str) if field.default is None else field.default
    return c


def list_inputs(pairs: str | None, source: ml_collections.ConfigDict) -> Sequence[Input]:
    """Divides `config.input` into units of work, in a fixed order.

    The input may be any source of `diht_jax.readers`, URLs of TFRecord shards, or several of these
    separated by commas. `source` is a config section like `default_source`.

    Raises:
        ValueError: the input is not set, or nothing was found.
    """
    if not pairs:
        raise ValueError(
            "config.input is not set: expected tars, tables, a folder, TFRecord shards or "
            "tfds:NAME:SPLIT, such as --config.input='/data/*.tar'"
        )
    inputs = []
    for text in typed_texts(pairs):
        root = find_root(text)
        with _naming_options():
            for shard in registry.list_shards(text, **source.to_dict()):
                inputs.append(Input(shard, root))
    return inputs


def hash_inputs(inputs: Sequence[Input]) -> list[str]:
    """Returns 16 hexadecimal digits per input, independent of inputs with other paths.

    Hashes the path below the root, the kind, and the range if a file has several units. Inputs
    that agree in all of these are numbered from the second one on.
    """
    units = collections.Counter(map(operator.attrgetter("shard.path"), inputs))
    seen: collections.Counter[str] = collections.Counter()
    hashes = []
    for found in inputs:
        shard = found.shard
        part = [shard.start, shard.stop] if units[shard.path] > 1 else []
        text = json.dumps([found.path, shard.kind, *part])
        name = f"{text} {seen[text]}" if seen[text] else text
        seen[text] += 1
        hashes.append(hashlib.blake2b(name.encode(), digest_size=8).hexdigest())
    return hashes


def typed_texts(pairs: str) -> list[str]:
    """Splits `config.input` into its sources, which are separated by commas."""
    texts = [pairs] if os.path.exists(pairs) else pairs.split(",")
    return list(map(str.strip, texts))


def find_root(text: str) -> str:
    """Returns the folder part of a source before its first wildcard; a folder is its own root."""
    path = re.sub(r"\?\w+=.*", "", text, flags=re.DOTALL)  # removes the options
    before = re.split(r"[*?\[]", path, maxsplit=1)[0]
    if is_remote(path):
        is_folder = before == path and not os.path.splitext(path)[1]
    else:
        is_folder = os.path.isdir(path)
    return path if is_folder else before.rpartition("/")[0]


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Like `readers.registry.read_pairs`; errors name options by their config keys."""
    with _naming_options():
        yield from registry.read_pairs(shard)


@contextlib.contextmanager
def _naming_options() -> Generator[None]:
    """Rewrites errors to name options as the user types them."""
    try:
        yield
    except ValueError as error:
        message = registry.name_options(str(error), "--config.source.{}")
        if isinstance(error, OSError | DamagedTarError) or message == str(error):
            raise
        raise ValueError(message) from error


def check_folder(output: str | os.PathLike[str] | None) -> str:
    """Checks that the output folder can be written, before the input is listed.

    Returns:
        The path or URL without a trailing slash.

    Raises:
        ValueError: the output is not set, mistyped, or not writable.
    """
    if not output:
        raise ValueError("config.output is not set: expected a folder, which is made if missing")
    folder = os.fspath(output).removeprefix("file://")
    if match := _ONE_SLASH.fullmatch(folder):
        raise ValueError(
            f"config.output='{output}': expected a local folder, or a URL with two slashes, such "
            f"as {match[1]}://{match[2]}; a local folder of this name is ./{folder}"
        )
    folder = folder.rstrip("/") or folder
    if is_remote(folder):
        check_writable(folder, "config.output")
        return folder
    present = os.path.abspath(folder)
    while not os.path.lexists(present):
        present = os.path.dirname(present)
    if not os.path.isdir(present) or not os.access(present, os.W_OK | os.X_OK):
        raise ValueError(
            f"config.output='{folder}': nothing can be written to '{present}'; expected a folder "
            "that may be written to, or the name of a new one in such a folder"
        )
    return folder


def check_not_input(folder: str, sources: Iterable[SourceShard]) -> None:
    """Raises ValueError if the output folder is an input folder, or is inside of one."""
    plain = _plain_path(folder)
    for source in sources:
        if os.path.dirname(_plain_path(source.path)) == plain:
            raise ValueError(f"config.output='{folder}' is the folder of the input '{source.path}'")
        if not is_remote(source.path) and os.path.isdir(source.path):
            root = _plain_path(source.root)  # everything below is read, including outputs
            if f"{plain}/".startswith(f"{root}/"):
                raise ValueError(
                    f"config.output='{folder}' is in the folder of pictures '{source.root}', which "
                    "is read with all folders in it; choose one outside of it"
                )


def refuse_foreign(folder: str, names: Sequence[str]) -> None:
    """Raises ValueError for unplanned shards `names` that a training run on `folder` would read."""
    if names:
        raise ValueError(
            f"'{folder}' holds {len(names)} shards that do not belong to this run, such as "
            f"'{names[0]}' (by '{names[0]}{STATS_SUFFIX}', where there is one); choose an "
            "empty folder, or delete them"
        )


def read_shards(folder: str, output_format: str) -> list[str]:
    """Returns the names of the shards that training would read from a folder with this format.

    Includes shards of formats that precede `output_format` in `FORMATS`.
    """
    names = list(FORMATS)
    first = set(names[: names.index(output_format) + 1])
    return [name for name in files.list_names(folder) if kind_of(name) in first]


def _plain_path(path: str) -> str:
    """Normalises a path or URL for comparisons."""
    if not is_remote(path):
        return os.path.realpath(path)
    protocol, _, name = path.partition("://")
    return f"{protocol}://{name.strip('/')}"


def read_download_stats(source: SourceShard) -> dict[str, Any] | None:
    """Reads the `COUNTS` of a shard from img2dataset, and its outcomes ("status_dict").

    The first part of a folder of images returns those of the whole folder.

    Raises:
        ValueError: the file is damaged.
    """
    if source.start:
        return None
    path = f"{_stem(source.path)}_stats.json"
    try:
        stats = json.loads(files.read_bytes(path))
        statuses = collections.Counter({str(k): int(v) for k, v in stats["status_dict"].items()})
        counts = {name: int(stats[name]) for name in COUNTS}
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the statistics of img2dataset ({type(error).__name__}: {error}); delete "
            "the file to filter without them"
        ) from error
    return counts | {"status_dict": dict(statuses.most_common(_MAX_STATUSES))}


def merge_download_stats(total: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Adds the counts of another shard to `total`, which is initially empty."""
    for name in COUNTS:
        total[name] = total.get(name, 0) + other[name]
    statuses = collections.Counter(total.get("status_dict", {}))
    statuses.update(other["status_dict"])
    total["status_dict"] = dict(statuses.most_common(_MAX_STATUSES))


def read_sidecar(source: SourceShard) -> dict[str, dict[str, Any]]:
    """Reads the metadata of a tar's pairs from the parquet file next to it.

    Returns:
        Key -> metadata; empty if there is no such file, or if it has no keys.

    Raises:
        ValueError: the file is damaged.
    """
    path = _stem(source.path) + parquet.SUFFIX
    if not source.path.endswith(TAR_SUFFIXES):
        return {}
    try:
        file = parquet.open_parquet(path)
    except OSError as error:
        if is_missing(error):
            return {}
        raise
    names = file.schema_arrow.names
    if "key" not in names:
        return {}
    wanted = [name for name in names if name not in IMAGE_EXTENSIONS]
    rows, bad = {}, []
    with parquet.explain_errors(path, lambda: "damaged"):
        for row in parquet.read_rows(path, file, wanted):
            if isinstance(row, parquet.BadRow):
                bad.append(row.detail)
                row = row.values
            rows[str(row.get("key"))] = parquet.clean_row(row, ("key", *_CAPTION_COLUMNS))
    if bad:
        logging.warning("%d pairs lack a value that cannot be read, such as %s", len(bad), bad[0])
    return rows


def _stem(path: str) -> str:
    for suffix in (*TAR_SUFFIXES, TFRECORD_SUFFIX, parquet.SUFFIX):
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return path
