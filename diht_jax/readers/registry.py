"""The table of source formats, with `open_source` and `list_shards` to read pairs from any of them.

`open_source` iterates over all pairs. `list_shards` divides a source into units of work, which
`read_pairs` can read in any process. A source is named by a text:

    PATH.tar, GLOB/*.tar             webdataset, as img2dataset writes it
    PATH.jsonl, .csv, .tsv, .json    a table, and a folder of images
    PATH.parquet                     images, or their paths, and captions in columns
    FOLDER                           shards, tars, tables or parquet files in it; else pictures
                                     with a .txt of the same name; else one sub-folder a class
    PATH.tfrecord, GLOB              our own records, and img2dataset's
    PATH.array_record, GLOB          our own records
    URL of one of these              the same in an object store, except folders of classes
    tfds:NAME[/CONFIG][:VERSION]:SPLIT, tfds:FOLDER:SPLIT   TensorFlow Datasets

Options for one of several sources follow its name: "a.csv?image_column=file&caption_column=title".
"FOLDER?split=train" is the folder "train" in FOLDER.

Images are not decoded here.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from diht_jax.config.checks import suggest
from diht_jax.readers import image_folder, parquet, shard_formats, tables, tfds
from diht_jax.readers.base import Format, Skipped, SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files, stores
from diht_jax.storage.files import find_inputs, is_glob
from diht_jax.storage.stores import is_remote

# Kind of a shard -> format. The first format that recognises a text or a file reads it.
FORMATS: dict[str, Format] = {
    "webdataset": shard_formats.WEBDATASET,
    "table": tables.FORMAT,
    "tfds": tfds.FORMAT,
    "tfrecord": shard_formats.TFRECORD,
    "array_record": shard_formats.ARRAY_RECORD,
    "parquet": parquet.FORMAT,
    "caption_files": image_folder.CAPTION_FILES,
    "folder": image_folder.CLASSES,
    "pictures": image_folder.PICTURES,
}

_LARGEST_LISTING = 5


@dataclasses.dataclass(eq=False)
class PairSource(Iterable[Pair]):
    """The pairs of a source, in a fixed order; can be iterated repeatedly."""

    name: str
    shards: list[SourceShard]  # the units of work
    # Reason -> count, from the last complete iteration.
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

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
    """Opens a source of pairs, an iterable of `schema.Pair`.

    Metadata may contain "captions", "label" and "class_name".

    Args:
        spec: one of the texts in the module docstring, or a list of them.
        **options: options of the formats, such as the fields of `tables.TableOptions`, for all
            sources that do not state their own.

    Raises:
        ValueError: nothing is found, or an option does not exist.
    """
    return PairSource(str(spec), list_shards(spec, **options))


def names_files(source: SourceShard) -> bool:
    """Returns whether an input is a table that names other files, which are read with it."""
    form = FORMATS.get(source.kind)
    return source.reads_linked and form is not None and form.list_linked_files is not None


def list_linked_files(source: SourceShard) -> Iterable[tuple[str, str]]:
    """Returns folder and name of the files that an input's own file names."""
    listed = FORMATS[source.kind].list_linked_files
    return () if listed is None else listed(source)


def describe_linked(source: SourceShard) -> str | None:
    """Returns a hash of sizes and times of the files that an input names; None if there are none.

    It opens none of these files.
    """
    digest, count = hashlib.blake2b(digest_size=16), 0
    for root, name in list_linked_files(source):
        count += 1
        try:
            path = os.path.join(root, name)
            status = files.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            if isinstance(error, OSError) and not stores.is_missing(error):
                raise
            state = "missing"
        digest.update(f"{state}\n".encode())
    return digest.hexdigest() if count else None


def list_shards(spec: str | Sequence[str], **options: Any) -> list[SourceShard]:
    """Divides a source into units of work, in a fixed order; arguments as for `open_source`."""
    _check_options(options)
    shards = []
    for text in [spec] if isinstance(spec, str) else spec:
        path, own = _split_options(text)
        given = options | own
        if split := given.get("split"):
            path = enter_split(path, split)
        found = _list_path(path, given)
        for kind in dict.fromkeys(shard.kind for shard in found) if own else ():
            known = _option_names(kind)
            if unknown := own.keys() - {*known, "split"}:
                raise ValueError(
                    f"{text}: this source ({kind}) has no option '{min(unknown)}'; it has "
                    f"{', '.join(known) or 'none'}"
                )
        shards += found
    if not shards:
        raise ValueError(
            f"no source of pairs: got {spec!r}; see diht_jax/readers/registry.py for forms"
        )
    return shards


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one unit of work, and `Skipped` for each entry that is not a pair.

    Raises:
        ValueError: the file is damaged; names the file.
    """
    return FORMATS[shard.kind].read(shard)


def option_defaults() -> dict[str, dataclasses.Field]:
    """Returns every option of the formats by name, as a field with type and default."""
    found: dict[str, dataclasses.Field] = {}
    for form in FORMATS.values():
        for field in dataclasses.fields(form.options) if form.options else ():
            found[field.name] = field
    return found


def name_options(message: str, form: str) -> str:
    """Rewrites the options in a message as the user types them, such as "--config.source.{}"."""
    # Skips "split", which is an ordinary word.
    names = "|".join(name for name in option_defaults() if "_" in name)
    return re.sub(
        rf"(?<![\w.'?/-])({names})(?![\w'/]|\.\w)", lambda name: form.format(name[1]), message
    )


def enter_split(folder: str, split: str) -> str:
    """Returns the path or URL of a sub-folder.

    Raises:
        ValueError: there is no such sub-folder, or the parent is not a folder.
    """
    path = files.join(folder, split)
    if not (files.exists(path) if is_remote(path) else os.path.isdir(path)):
        raise ValueError(f"'{folder}': no sub-folder '{split}'; set split to the name of one")
    return path


def _split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Splits "PATH?NAME=VALUE&NAME=VALUE" into path and options; a glob may contain a "?" too."""
    match = re.fullmatch(r"(.+?)\?(\w+=[^?&]*(?:&\w+=[^?&]*)*)", text, re.DOTALL)
    if match is None:
        return text, {}
    own: dict[str, Any] = dict(part.split("=", 1) for part in match[2].split("&"))
    if is_remote(text):
        if own.keys().isdisjoint(option_defaults()):
            return text, {}
    elif os.path.exists(text) or glob.glob(text):
        return text, {}
    try:
        _check_options(own)
        for name, field in option_defaults().items():
            if name in own and isinstance(field.default, int):
                own[name] = int(own[name])
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
    return match[1], own


def _list_path(text: str, options: dict[str, Any]) -> list[SourceShard]:
    for kind, form in FORMATS.items():
        if form.prefix and text.startswith(form.prefix):
            return _list_one(kind, text, options)
    is_stored = is_remote(text)
    is_folder = os.path.isdir(text)
    if is_stored:
        paths = sorted(find_inputs(text))
        is_file = [os.path.basename(path) for path in paths] == [os.path.basename(text)]
        is_folder = not (is_glob(text) or is_file)
    elif is_folder:
        paths = sorted(entry.path for entry in os.scandir(text) if not os.path.isdir(entry.path))
        # img2dataset's output format "files": 00000.parquet describes the folder 00000.
        paths = [path for path in paths if not os.path.isdir(path.removesuffix(parquet.SUFFIX))]
    else:
        paths = [text] if os.path.isfile(text) else sorted(glob.glob(text, recursive=True))
    known, unknown = _recognise(paths, is_named=not is_folder)
    if is_folder and len(set(known.values())) > 1:
        raise ValueError(
            f"folder '{text}' holds several kinds of source "
            f"({', '.join(sorted(set(known.values())))}); name the files by a glob"
        )
    if unknown and not (is_stored or is_folder):
        raise ValueError(
            f"{', '.join(unknown[:_LARGEST_LISTING])}: not a source of pairs; expected names that "
            f"end in {_known_suffixes()}"
        )
    shards = []
    for path, kind in known.items():
        shards += _list_one(kind, path, options)
    if known:
        return shards
    if is_stored:
        raise ValueError(
            f"nothing to read at '{text}'; of an object store tars, tables, parquet files and "
            f"record shards are read, by names that end in {_known_suffixes()}; folders of images "
            "must be copied or mounted, and named by their path"
        )
    if not is_folder:
        hint = "; of several sources, name a folder or a glob of all" if "," in text else ""
        raise ValueError(
            f"nothing at '{text}'; expected a file, a folder, a glob that matches some, or "
            f"tfds:NAME:SPLIT{hint}"
        )
    for kind, form in FORMATS.items():
        if form.is_folder and (shards := _list_one(kind, text, options)):
            return shards
    raise ValueError(
        f"folder '{text}' holds neither TFRecord shards, tars or tables, nor pictures with a .txt "
        "of the same name, nor sub-folders of images"
    )


def _recognise(paths: Sequence[str], *, is_named: bool) -> tuple[dict[str, str], list[str]]:
    """Returns path -> kind without files that only hold metadata, and the unrecognised paths."""
    known: dict[str, str] = {}
    unknown: list[str] = []
    for path in paths:
        is_hidden = os.path.basename(path).startswith(".")
        for kind, form in () if is_hidden else FORMATS.items():
            if form.is_file(path, is_named=is_named):
                known[path] = kind
                break
        else:
            if not path.endswith(".idx"):
                unknown.append(path)
    present = set(known.values())
    for path, kind in list(known.items()):
        if not present.isdisjoint(FORMATS[kind].metadata_of):
            del known[path]
    return known, unknown


def _list_one(kind: str, path: str, options: dict[str, Any]) -> list[SourceShard]:
    form = FORMATS[kind]
    if form.list_shards is None:
        return [SourceShard(kind, path)]
    names = [name for name in _option_names(kind) if name in options]
    own = form.options(**{name: options[name] for name in names}) if form.options else None
    return form.list_shards(path, own)


def _option_names(kind: str) -> list[str]:
    options = FORMATS[kind].options
    return [field.name for field in dataclasses.fields(options)] if options else []


def _known_suffixes() -> str:
    *most, last = [suffix for form in FORMATS.values() for suffix in form.suffixes]
    return f"{', '.join(most)} or {last}"


def _check_options(options: dict[str, Any]) -> None:
    known = option_defaults()
    for name in options:
        if name not in known:
            raise ValueError(f"sources have no option '{name}'; {suggest(name, known)}")
