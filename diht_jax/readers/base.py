"""Code shared by all readers: formats, units of work, images in folders, columns of tables.

Every reader of a source format ends with a `Format`, which `registry.py` lists in its table. That
module is the entry point to the readers.
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

# Other picture formats that occur in folders.
_OTHERS = "gif bmp tif tiff jfif jpe avif jp2 j2k apng ppm pgm pbm"
_UNSUPPORTED = "heic heif jxl svg svgz psd ico tga eps hdr exr dng cr2 nef arw raw wmf emf xcf pcx"
FOLDER_EXTENSIONS = (*IMAGE_EXTENSIONS, *_OTHERS.split())
UNSUPPORTED_EXTENSIONS = (*_UNSUPPORTED.split(), "dds", "jxr", "mng")
# Reasons why an entry is not a pair, in the order of a funnel. "too_large" is about the image; the
# filter skips what has crashed.
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
_NO_OPTIONS: Mapping[str, Any] = {}  # shared, since there are many shards


@dataclasses.dataclass(frozen=True, slots=True)
class SourceShard:
    """One unit of work: a tar, a part of a table, one class, or a range of a record file."""

    kind: str  # name of the format in `registry.FORMATS`
    path: str  # path of the file or folder, or its URL in an object store
    start: int = 0  # start of the part: a byte of a table, a record of a TFDS file
    stop: int | None = None  # end of the part (exclusive); None for the end of the file
    # Further arguments of the reader, JSON-able.
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _NO_OPTIONS)
    # Whether files that a table names, such as its images, are read too.
    reads_linked: bool = True
    # Whether parquet rows and pictures of a folder are skipped if they lack a caption; otherwise
    # their caption is empty.
    needs_caption: bool = True
    # Metadata columns that are not kept. A value there that Python cannot represent does not make
    # a parquet row bad.
    unneeded: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """`stop` of a part that has one."""
        if self.stop is None:
            raise ValueError(f"{self}: expected a part with an end")
        return self.stop

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[{self.start}:{self.stop}]"
        return f"{self.path}{part}"

    @property
    def root(self) -> str:
        """The source folder that a shard of a folder belongs to."""
        # A class is a sub-folder of the source folder; pictures are the source folder itself.
        if self.kind == "folder":
            return os.path.dirname(self.path)
        return self.path.removesuffix(self.options.get("below_root", ""))

    def identity(self) -> dict[str, Any]:
        """Returns the input's path, part, size and modification time, JSON-able, to detect changes.

        Size and time of a folder cover all files in it, except links that lead out. The "time" of a
        URL is the version that the object store states, or None.
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

    # Yields the pairs of one shard, and `Skipped` for other entries; raises a ValueError that names
    # the file if it is damaged.
    read: Callable[[SourceShard], Iterator[Pair | Skipped]]
    suffixes: tuple[str, ...] = ()  # suffixes of its file names, ignoring case
    # Suffixes that are read only if the user names the file, not its folder.
    named_only: tuple[str, ...] = ()
    # Decides whether a path is a file of this format, if the suffix alone is not enough.
    matches: Callable[[str], bool] | None = None
    prefix: str = ""  # prefix of texts that name a data set, such as "tfds:"
    is_folder: bool = False  # reads folders without files of other formats
    # Divides a path (or a text with the prefix) into units of work. The second argument is an
    # instance of `options`. None makes one unit per file.
    list_shards: Callable[[str, Any], list[SourceShard]] | None = None
    # Dataclass of the user's options. Each has a default; a default of None means the type
    # `str | None`. Options with the same name mean the same in all formats.
    options: type[Any] | None = None
    # Counts the entries of a shard, maybe approximately, without reading images; None if unknown.
    count: Callable[[SourceShard], int | None] = lambda shard: None
    # Counting reads the whole file. Only the first shard is then counted, and the others are
    # estimated from their bytes.
    count_reads_file: bool = False
    # Kinds of files. In a folder with any of them, files of this format only hold their metadata.
    metadata_of: tuple[str, ...] = ()
    # Lists the files that a shard's own file names, such as the images of a table, as the (folder,
    # path in it) of `read_image`. They may be missing. None if the format has no such files.
    list_linked_files: Callable[[SourceShard], Iterable[tuple[str, str]]] | None = None

    def is_file(self, path: str, *, is_named: bool = True) -> bool:
        """Returns whether a path is a file of this format, by its name.

        `is_named`: whether the user has named the file, rather than its folder.
        """
        if self.matches is not None:
            return self.matches(path)
        name = path.lower()
        return name.endswith(self.suffixes) and (is_named or not name.endswith(self.named_only))


def held_bytes(entry: Pair | Skipped) -> int:
    """Returns an upper estimate of the memory of an entry: its image, texts and metadata."""
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
    """Reads an image below a folder, or returns the reason why it cannot be read.

    Args:
        root: the folder, a real path or a URL. Paths that lead out of it (".." or a link) fail.
        name: path of the image, relative to `root` or absolute.

    Raises:
        StorageError: the file exists but cannot be read, even after retries.
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
            # Resolved first, since ".." or a link may lead out of the folder.
            path = os.path.realpath(os.path.join(root, name))
            is_refused = not _is_inside(path, root)
        if is_refused:
            return Skipped(key, "refused_path", f"{shown} leads out of '{root}'")
        if not is_remote(root):
            status = files.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
                return Skipped(key, "no_image", f"{shown} is no ordinary file")
            if status.st_size > MAX_IMAGE_BYTES:
                return too_large
            image = files.read_bytes(path)
    except OSError as error:
        # Other errors must not lose a pair, since the file may exist.
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
    """Yields the images in a folder and below it, sorted, without hidden ones.

    Each path comes with None, or the reason why it cannot be read: "unsupported_format",
    "refused_path" for a link that leads out of `root`, or "no_image" for a broken link, a pipe, a
    socket or a device.
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
    """Yields the path of every file that is not hidden, and whether it is inside `root`.

    A link that leads out of `root` is yielded but not followed. The second value is None for a
    broken link, a pipe, a socket or a device. A link to a folder above it is skipped with a
    warning; `above` has the real paths of these folders.
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


@functools.cache  # warns once per process
def warn_of_loop(folder: str, real_path: str) -> None:
    """Warns that a link to a folder above it is skipped."""
    logging.warning("'%s' leads back to '%s', which holds it: left out", folder, real_path)


@dataclasses.dataclass(frozen=True)
class ColumnOptions:
    """Columns of a table or parquet file."""

    # Column of the image, or of its path relative to `image_root`. None takes the first of
    # `samples.IMAGE_NAMES`, ignoring case; "" reads no image.
    image_column: str | None = None
    # Column of the caption or of a list of captions. None takes the first of
    # `samples.CAPTION_NAMES`, ignoring case.
    caption_column: str | None = None
    # Column of the key. None makes keys from table name and row number; for a parquet file with a
    # column "key", None takes that column.
    key_column: str | None = None
    # Folder of the images, or its URL; None takes the folder of the table. Paths that lead out of
    # this folder are refused.
    image_root: str | None = None


def find_columns(names: Collection[str], options: Any) -> tuple[Any, list[str]]:
    """Completes `ColumnOptions` from a table's columns; also lists missing columns, in words."""
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
    """Returns the message about a table that lacks columns."""
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
    """Makes a pair of a row, or explains why it is not one.

    Args:
        image: the encoded image, or its path below `image_root`.
        options: options completed by `find_columns`.
        needs_caption: whether to skip a row without a caption.
        clean: makes metadata of the remaining columns.
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
