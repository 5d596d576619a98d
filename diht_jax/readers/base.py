"""The common part of all readers: formats, units of work, images of a folder, columns of a table.

Every reader ends with a `Format`, which stands in the table of `registry.py`; that module is the
way in for everybody else.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import posixpath
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from diht_jax.records.samples import (
    CAPTION_NAMES,
    IMAGE_EXTENSIONS,
    IMAGE_NAMES,
    MAX_IMAGE_BYTES,
    Pair,
    Skipped,
    explain_no_caption,
    find_name,
    merge_captions,
    pick_captions,
)
from diht_jax.storage import files, stores
from diht_jax.storage.stores import input_version, is_remote, read_start

# In folders people keep other pictures, too.
_OTHERS = "gif bmp tif tiff jfif jpe avif jp2 j2k apng ppm pgm pbm"
_UNSUPPORTED = "heic heif jxl svg svgz psd ico tga eps hdr exr dng cr2 nef arw raw wmf emf xcf pcx"
FOLDER_EXTENSIONS = (*IMAGE_EXTENSIONS, *_OTHERS.split())
UNSUPPORTED_EXTENSIONS = (*_UNSUPPORTED.split(), "dds", "jxr", "mng")
# Why an entry is no pair, in the order of a funnel. "too_large" is the image's reason, and what has
# crashed is skipped by the filter.
SOURCE_REASONS = (
    "bad_row",
    "bad_json",
    "refused_path",
    "no_image",
    "unsupported_format",
    "duplicate",
    "no_caption",
    "too_large",
    "crashed",
)


_NAMES_SHOWN = 20
_NO_OPTIONS: Mapping[str, Any] = {}  # one for all, since there are many shards


@dataclasses.dataclass(frozen=True, slots=True)
class SourceShard:
    """One unit of work: a tar, a part of a table, one class, or a range of a record file."""

    kind: str  # name of the format in `registry.FORMATS`
    path: str  # of the file or folder; a URL where it is in an object store
    start: int = 0  # where the part begins: a byte of a table, a record of a TFDS file
    stop: int | None = None  # where it ends (exclusive); None for the end of the file
    # What else its reader needs, JSON-able.
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _NO_OPTIONS)
    # Whether files that a table only names, such as its images, are read, too.
    reads_linked: bool = True
    # Whether parquet rows and pictures of a folder without captions are skipped; else theirs is
    # empty.
    needs_caption: bool = True
    # Columns of metadata that nobody keeps: a value there that Python cannot hold costs no row of
    # parquet.
    unneeded: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """`stop` of a part that states it."""
        if self.stop is None:
            raise ValueError(f"{self}: expected a part with an end")
        return self.stop

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[{self.start}:{self.stop}]"
        return f"{self.path}{part}"

    @property
    def root(self) -> str:
        """The folder of the source that the path of a folder belongs to."""
        # A class is a folder in the one that was named, pictures are that folder itself.
        if self.kind == "folder":
            return os.path.dirname(self.path)
        return self.path.removesuffix(self.options.get("below_root", ""))

    def identity(self) -> dict[str, Any]:
        """The input's path, part, size and time of change, JSON-able, to compare with it later.

        For a folder, size and time are those of the files in it together, but for links that lead
        out; for a URL, the time is the version that the object store states, or None.
        """
        described = {
            "kind": self.kind,
            "path": self.path if is_remote(self.path) else os.path.abspath(self.path),
            "start": self.start,
            "stop": self.stop,
            "options": dict(self.options),
        }
        if is_remote(self.path):
            size, version = input_version(self.path)
            return described | {"files": 1, "size_bytes": size, "changed_ns": version}
        if os.path.isdir(self.path):
            found = walk_files(self.path, self.root)
            states = [files.stat(path) for path, is_inside in found if is_inside]
        else:
            states = [files.stat(self.path)]
        return described | {
            "files": len(states),
            "size_bytes": sum(map(operator.attrgetter("st_size"), states)),
            "changed_ns": max(map(operator.attrgetter("st_mtime_ns"), states), default=0),
        }


@dataclasses.dataclass(frozen=True)
class Format:
    """A source format: how it is recognised, divided into shards, read and counted."""

    # Yields the pairs of one shard, and `Skipped` for an entry that is no pair; raises ValueError
    # naming the file if it is damaged.
    read: Callable[[SourceShard], Iterator[Pair | Skipped]]
    suffixes: tuple[str, ...] = ()  # endings of the names of its files, in any case
    # Those of them that are read where a file is named, not where its folder is.
    named_only: tuple[str, ...] = ()
    # Whether a path is such a file, where the ending alone does not decide it.
    matches: Callable[[str], bool] | None = None
    prefix: str = ""  # start of texts that name a data set rather than files, such as "tfds:"
    is_folder: bool = False  # reads folders without any file of another format
    # Divides a path (or a text with the prefix) into units of work; takes an instance of `options`
    # as second argument. None: one unit for each file.
    list_shards: Callable[[str, Any], list[SourceShard]] | None = None
    # Dataclass of the options that a user may set; each has a default, and the type of one whose
    # default is None is `str | None`. Of two formats, equal names mean the same.
    options: type[Any] | None = None
    # Entries of a shard, exactly or nearly, without reading images; None if unknown.
    count: Callable[[SourceShard], int | None] = lambda shard: None
    # Counting goes through the whole file, so that only the first shard is counted, and the others
    # are estimated by their bytes.
    count_reads_file: bool = False
    # Kinds of files; in a folder with some of them, files of this format hold their metadata only.
    metadata_of: tuple[str, ...] = ()
    # Of a shard, the files that its own file only names, such as the images of a table, as
    # `read_image` takes them: folder, path in it. They may be missing. None where there are no such
    # files.
    list_linked_files: Callable[[SourceShard], Iterable[tuple[str, str]]] | None = None

    def is_file(self, path: str, *, is_named: bool = True) -> bool:
        """True for the path of a file of this format, by its name.

        `is_named`: whether the user has named the file, rather than its folder.
        """
        if self.matches is not None:
            return self.matches(path)
        name = path.lower()
        return name.endswith(self.suffixes) and (is_named or not name.endswith(self.named_only))


def held_bytes(entry: Pair | Skipped) -> int:
    """About how much memory an entry takes, at most: its image, its texts, its metadata."""
    if isinstance(entry, Skipped):
        return 0
    total, values = len(entry.image), [entry.caption, entry.metadata]
    while values:
        value = values.pop()
        total += 64 + (4 * len(value) if isinstance(value, str) else 0)
        if isinstance(value, Mapping):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value
    return total


def read_image(root: str, name: str, key: str) -> bytes | Skipped:
    """The bytes of an image below a folder, or why there are none.

    Args:
        root: the folder, a real path or a URL. What leads out of it, by ".." or a link, is refused.
        name: path of the image, relative to `root` or absolute.

    Raises:
        StorageError: the file exists and cannot be read, now and after some attempts.
    """
    shown = repr(name if len(name) <= 200 else f"{name[:200]}...")
    too_large = Skipped(key, "too_large", f"{shown} has over {MAX_IMAGE_BYTES} bytes")
    try:
        if is_remote(root):
            folder = f"{root.rstrip('/')}/"
            inner = name.removeprefix(folder)
            path = posixpath.normpath(inner)
            is_refused = is_remote(inner) or f"{path}/".startswith(("/", "../"))
            image = b"" if is_refused else read_start(folder + path, MAX_IMAGE_BYTES + 1)
        else:
            # Resolved first, so that neither ".." nor a link leads out of the folder.
            path = os.path.realpath(os.path.join(root, name))
            is_refused = not _is_inside(path, root)
        if is_refused:
            return Skipped(key, "refused_path", f"{shown} leads out of '{root}'")
        if not is_remote(root):
            status = files.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
                return Skipped(key, "no_image", f"{shown} is no ordinary file")
            if status.st_size > MAX_IMAGE_BYTES:
                return too_large
            image = files.read_bytes(path)
    except OSError as error:
        # Anything else is no reason to lose a pair: the file may well be there.
        if not stores.is_missing(error):
            raise
        return Skipped(key, "no_image", f"{shown}: {error.strerror or 'no such file'}")
    except ValueError as error:
        return Skipped(key, "refused_path", f"{shown} can name no file ({error})")
    return too_large if len(image) > MAX_IMAGE_BYTES else image


def _is_inside(path: str, root: str) -> bool:
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def walk_images(folder: str, root: str) -> Iterator[tuple[str, str | None]]:
    """Yields the images in a folder and below it, sorted; hidden ones are left out.

    With each path comes the reason for which it cannot be read: "unsupported_format",
    "refused_path" for any link that leads out of `root`, or "no_image" for one that leads nowhere,
    a pipe, a socket or a device; None for the others.
    """
    for path, is_inside in walk_files(folder, root):
        extension = path.rpartition(".")[2].lower()
        is_readable = extension in FOLDER_EXTENSIONS
        is_picture = is_readable or extension in UNSUPPORTED_EXTENSIONS
        if is_inside is None:
            if is_picture:
                yield path, "no_image"
        elif not is_inside and (is_picture or os.path.isdir(path)):
            yield path, "refused_path"
        elif is_inside and is_picture:
            yield path, None if is_readable else "unsupported_format"


def walk_files(
    folder: str, root: str, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, bool | None]]:
    """Yields the path of every file that is not hidden, and whether it is inside of `root`.

    A link that leads out of `root` is yielded, and not followed. Of a link that leads nowhere, a
    pipe, a socket or a device it is None. A link to a folder above it is left out, with a warning;
    `above` are the real paths of these.
    """
    if not _is_inside(folder, root):
        yield folder, False
        return
    real_path = os.path.realpath(folder)
    if real_path in above:
        warn_of_loop(folder, real_path)
        return
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from walk_files(entry.path, root, (*above, real_path))
        elif entry.is_symlink() and not _is_inside(entry.path, root):
            yield entry.path, False
        elif os.path.isfile(entry.path):
            yield entry.path, True
        else:
            yield entry.path, None


@functools.cache  # once a process, however often a folder is walked
def warn_of_loop(folder: str, real_path: str) -> None:
    """Says that a link to a folder above it is left out."""
    logging.warning("'%s' leads back to '%s', which holds it: left out", folder, real_path)


@dataclasses.dataclass(frozen=True)
class ColumnOptions:
    """Columns of a table or parquet file."""

    # Holds the image, or its path relative to `image_root`; the first of `samples.IMAGE_NAMES`, in
    # any case, where it is None; "" where no image is read.
    image_column: str | None = None
    # Holds the caption, or a list of captions; the first of `samples.CAPTION_NAMES`, in any case,
    # where it is None.
    caption_column: str | None = None
    # Holds the key; keys are made of table name and row number where it is None. (Of parquet files,
    # it is "key" where there is such a column.)
    key_column: str | None = None
    # Folder of the images, or its URL; the table's own folder where it is None. Paths that lead out
    # of it are refused.
    image_root: str | None = None


def find_columns(names: Collection[str], options: Any) -> tuple[Any, list[str]]:
    """Completes `ColumnOptions` by a table's names; and tells what is missing, in words."""
    image, caption = options.image_column, options.caption_column
    image = find_name(names, IMAGE_NAMES) if image is None else image
    caption = find_name(names, CAPTION_NAMES) if caption is None else caption
    missing = []
    if image is None:
        missing.append(f"column of images ({', '.join(IMAGE_NAMES)})")
    if caption is None:
        missing.append(f"column of captions ({', '.join(CAPTION_NAMES)})")
    stated = [name for name in (image, caption, options.key_column) if name and name not in names]
    missing += [f"column '{name}'" for name in stated]
    return dataclasses.replace(options, image_column=image, caption_column=caption), missing


def describe_missing(path: str, names: Collection[str], missing: list[str]) -> str:
    """The message about a table that lacks columns."""
    shown = ", ".join(map(repr, list(names)[:_NAMES_SHOWN])) or "nothing"
    return (
        f"{path}: no {' and no '.join(missing)}; it has {shown:.500}; set image_column, "
        "caption_column or key_column"
    )


def make_pair(
    key: str,
    image: bytes | str | None,
    row: dict[str, Any],
    options: ColumnOptions,
    *,
    needs_caption: bool = True,
    clean: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Pair | Skipped:
    """The pair of a row, or why there is none.

    Args:
        image: encoded, or its path below `image_root`.
        options: complete ones.
        needs_caption: whether a row without one is no pair.
        clean: makes metadata of the columns that are nothing else.
    """
    if not image:
        nothing = f"nothing in column '{options.image_column}'"
        status = row.get("error_message") or row.get("status") or nothing
        return Skipped(key, "no_image", str(status))
    if len(image) > MAX_IMAGE_BYTES:
        return Skipped(key, "too_large", f"an image of {len(image)} bytes")
    stated = row.get(options.caption_column) if options.caption_column else None
    several = row.get("captions")  # next to a column "caption", as in the json of a tar
    captions = pick_captions(pick_captions(stated) + pick_captions(several))
    if needs_caption and not captions:
        return Skipped(key, "no_caption", explain_no_caption(options.caption_column, stated))
    data = read_image(str(options.image_root), image, key) if isinstance(image, str) else image
    if isinstance(data, Skipped):
        hint = "; image_root names another folder" if data.reason == "refused_path" else ""
        return dataclasses.replace(data, detail=data.detail + hint)
    used = (options.image_column, options.caption_column, options.key_column)
    metadata = clean({name: value for name, value in row.items() if name not in used})
    caption = captions[0] if captions else ""
    return Pair(key, data, caption, merge_captions(metadata, captions, several or stated))
