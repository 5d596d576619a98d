"""Units of work for the `input` of a preparation config, and what img2dataset writes next to them.

The readers themselves are in `diht_jax.readers`, where the evaluation finds them too; this module
holds what only offline jobs need: the config section, the check of the output folder, and metadata
and statistics of img2dataset. A shard of img2dataset's is

    00000.tar           read by diht_jax.readers.shard_formats; in the output format "tfrecord"
                        00000.tfrecord instead, read by diht_jax.readers.shard_formats
    00000.parquet       the rows of the shard, those that could not be downloaded too; in the output
                        format "parquet" it holds the images as well, and there is no tar
                        (diht_jax.readers.parquet reads those)
    00000_stats.json    rows, successes, and how the others failed
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

from diht_jax.readers import registry
from diht_jax.readers.base import IMAGE_EXTENSIONS
from diht_jax.readers.parquet import (
    SUFFIX,
    BadRow,
    clean_row,
    explain_errors,
    open_parquet,
    read_rows,
)
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
    """A unit of work, and the root of the typed source that it came from.

    Attributes:
        shard: the unit.
        root: the folder part of the typed text before its first wildcard; of a folder itself.
    """

    shard: SourceShard
    root: str

    @property
    def path(self) -> str:
        """Path of the unit below the root, with "/" between the names."""
        compared = []
        for text in (self.shard.path, self.root):
            if is_remote(text):
                compared.append(text.split("://", 1)[1].strip("/"))
            else:
                compared.append(os.path.abspath(text).replace(os.sep, "/"))
        path, root = compared
        below = path.removeprefix(f"{root}/")
        # What a text such as tfds:NAME:SPLIT stands for is elsewhere.
        return below if below != path else path.rpartition("/")[2]


def default_source() -> ml_collections.ConfigDict:
    """The config section `source`: the options of all source formats, with their defaults.

    Their meaning is in the formats' own options, such as `readers.base.ColumnOptions`.
    """
    c = ml_collections.ConfigDict()
    for name, field in registry.option_defaults().items():
        c[name] = placeholder(str) if field.default is None else field.default
    return c


def list_inputs(pairs: str | None, source: ml_collections.ConfigDict) -> Sequence[Input]:
    """Divides `config.input` into units of work, in a fixed order.

    It is any source of `diht_jax.readers`, TFRecord shards by their URL, or several with commas
    between them; `source` is the section of `default_source`.

    Raises:
        ValueError: no input is set or found.
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
    """16 hexadecimal digits for each input; they do not depend on the inputs of other paths.

    They stand for the path below the root, the kind, and the range where a file makes several
    units. Of inputs that are alike in all of these, the second and later ones are numbered.
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
    """The sources that one `config.input` names, which are separated by commas."""
    texts = [pairs] if os.path.exists(pairs) else pairs.split(",")
    return list(map(str.strip, texts))


def find_root(text: str) -> str:
    """The folder part of a typed source before its first wildcard; a folder is its own root."""
    path = re.sub(r"\?\w+=.*", "", text, flags=re.DOTALL)  # without its options
    before = re.split(r"[*?\[]", path, maxsplit=1)[0]
    if is_remote(path):
        is_folder = before == path and not os.path.splitext(path)[1]
    else:
        is_folder = os.path.isdir(path)
    return path if is_folder else before.rpartition("/")[0]


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Like `readers.registry.read_pairs`; errors name options as keys of the config."""
    with _naming_options():
        yield from registry.read_pairs(shard)


@contextlib.contextmanager
def _naming_options() -> Generator[None]:
    """Makes errors name options as they are typed."""
    try:
        yield
    except ValueError as error:
        message = registry.name_options(str(error), "--config.source.{}")
        if isinstance(error, OSError | DamagedTarError) or message == str(error):
            raise
        raise ValueError(message) from error


def check_folder(output: str | os.PathLike[str] | None) -> str:
    """The output folder, once it is sure that it can be written; before the input is listed.

    Returns:
        A path or URL without a slash at its end.

    Raises:
        ValueError: it is not set, is mistyped, or takes no file.
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
    """Raises ValueError where the output folder is one that is being read, or is inside of one."""
    plain = _plain_path(folder)
    for source in sources:
        if os.path.dirname(_plain_path(source.path)) == plain:
            raise ValueError(f"config.output='{folder}' is the folder of the input '{source.path}'")
        if not is_remote(source.path) and os.path.isdir(source.path):
            root = _plain_path(source.root)  # all below is read: what is written there as well
            if f"{plain}/".startswith(f"{root}/"):
                raise ValueError(
                    f"config.output='{folder}' is in the folder of pictures '{source.root}', which "
                    "is read with all folders in it; choose one outside of it"
                )


def refuse_foreign(folder: str, names: Sequence[str]) -> None:
    """Raises ValueError for shards in a folder that a training run would read, and nobody plans."""
    if names:
        raise ValueError(
            f"'{folder}' holds {len(names)} shards that do not belong to this run, such as "
            f"'{names[0]}' (by '{names[0]}{STATS_SUFFIX}', where there is one); choose an "
            "empty folder, or delete them"
        )


def read_shards(folder: str, output_format: str) -> list[str]:
    """Names of the shards that training on a folder with this format of shards would read.

    Those of another format are read instead where that comes first in `FORMATS`.
    """
    names = list(FORMATS)
    first = set(names[: names.index(output_format) + 1])
    return [name for name in files.list_names(folder) if kind_of(name) in first]


def _plain_path(path: str) -> str:
    """A path or URL in the one form in which they are compared."""
    if not is_remote(path):
        return os.path.realpath(path)
    protocol, _, name = path.partition("://")
    return f"{protocol}://{name.strip('/')}"


def read_download_stats(source: SourceShard) -> dict[str, Any] | None:
    """The `COUNTS` of a shard that img2dataset downloaded, and its outcomes ("status_dict").

    Those of a folder of pictures come with its first part.

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
    """Adds the counts of another shard to a dict that was empty at first."""
    for name in COUNTS:
        total[name] = total.get(name, 0) + other[name]
    statuses = collections.Counter(total.get("status_dict", {}))
    statuses.update(other["status_dict"])
    total["status_dict"] = dict(statuses.most_common(_MAX_STATUSES))


def read_sidecar(source: SourceShard) -> dict[str, dict[str, Any]]:
    """The metadata of a tar's pairs by key, from the parquet file next to it.

    Returns:
        Nothing where there is no such file, or one without keys.

    Raises:
        ValueError: the file is damaged.
    """
    path = _stem(source.path) + SUFFIX
    if not source.path.endswith(TAR_SUFFIXES):
        return {}
    try:
        file = open_parquet(path)
    except OSError as error:
        if is_missing(error):
            return {}
        raise
    names = file.schema_arrow.names
    if "key" not in names:
        return {}
    wanted = [name for name in names if name not in IMAGE_EXTENSIONS]
    rows, bad = {}, []
    with explain_errors(path, lambda: "damaged"):
        for row in read_rows(path, file, wanted):
            if isinstance(row, BadRow):
                bad.append(row.detail)
                row = row.values
            rows[str(row.get("key"))] = clean_row(row, ("key", *_CAPTION_COLUMNS))
    if bad:
        logging.warning("%d pairs lack a value that cannot be read, such as %s", len(bad), bad[0])
    return rows


def _stem(path: str) -> str:
    for suffix in (*TAR_SUFFIXES, TFRECORD_SUFFIX, SUFFIX):
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return path
