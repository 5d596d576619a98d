"""What all readers of pairs share: the form of a source format, the unit of work, cleaned input.

Every reader ends with a `Format`, which stands in the table of `registry.py`; that module is the
way in for everybody else.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from diht_jax.data.records import remote
from diht_jax.data.records.schema import Pair

# The readers parse as strictly as records are read.
from diht_jax.data.records.schema import parse_json_object as parse_json_object

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Nothing that is worth decoding has more bytes; keeps a hostile member from filling the memory.
MAX_IMAGE_BYTES = 2**28

# Why a reader skips an entry, in the order of a funnel. "too_large" is the image's reason.
SOURCE_REASONS = (
    "bad_row",
    "bad_json",
    "refused_path",
    "no_image",
    "duplicate",
    "no_caption",
    "too_large",
)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An entry of a source that is no pair.

    Attributes:
        key: names the entry, as well as it can be named.
        reason: one of `SOURCE_REASONS`.
        detail: what was found, for a person.
    """

    key: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class SourceShard:
    """One unit of work: a tar, a part of a table, one class, or a range of a record file.

    Attributes:
        kind: name of the format in `registry.FORMATS`.
        path: of the file or folder; a URL where it lies in an object store.
        start: where the part begins: a byte of a table, a record of a TFDS file.
        stop: where it ends (exclusive); None for the end of the file.
        options: what else its reader needs, JSON-able.
    """

    kind: str
    path: str
    start: int = 0
    stop: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[{self.start}:{self.stop}]"
        return f"{self.path}{part}"

    def identity(self) -> dict[str, Any]:
        """Describes the input, to compare with it later: path, part, size and time of change.

        Returns:
            A JSON-able dict. For a folder, size and time are those of the files in it together;
            for a URL, the time is the version that the object store states, or None.
        """
        described = {
            "kind": self.kind,
            "path": self.path if remote.is_remote(self.path) else os.path.abspath(self.path),
            "start": self.start,
            "stop": self.stop,
            "options": dict(self.options),
        }
        if remote.is_remote(self.path):
            size, version = remote.file_version(self.path)
            return described | {"files": 1, "size_bytes": size, "changed_ns": version}
        if os.path.isdir(self.path):
            files = [entry.stat() for entry in _walk_files(self.path)]
        else:
            files = [os.stat(self.path)]
        return described | {
            "files": len(files),
            "size_bytes": sum(file.st_size for file in files),
            "changed_ns": max((file.st_mtime_ns for file in files), default=0),
        }


@dataclasses.dataclass(frozen=True)
class Format:
    """A source format: how it is recognised, divided into shards, read and counted.

    Attributes:
        read: yields the pairs of one shard, and `Skipped` for an entry that is no pair; raises
            ValueError naming the file if it is damaged.
        suffixes: endings of the names of its files.
        matches: whether a path is such a file, where the ending alone does not decide it.
        prefix: start of texts that name a data set rather than files, such as "tfds:".
        is_folder: reads folders in which no file of any other format lies.
        list_shards: divides a path (or a text with the prefix) into units of work; takes an
            instance of `options` as second argument. None: one unit for each file.
        options: dataclass of the options that a user may set; each has a default, and the type of
            one whose default is None is `str | None`. Names are unique over all formats.
        count: entries of a shard, exactly or nearly, without reading images; None if unknown.
        count_reads_file: counting goes through the whole file, so that only the first shard is
            counted, and the others are estimated by their bytes.
        metadata_of: kind of the files beside which the files of this format hold metadata only.
        reads_remote: files in an object store can be read, by their URL.
    """

    read: Callable[[SourceShard], Iterator[Pair | Skipped]]
    suffixes: tuple[str, ...] = ()
    matches: Callable[[str], bool] | None = None
    prefix: str = ""
    is_folder: bool = False
    list_shards: Callable[[str, Any], list[SourceShard]] | None = None
    options: type | None = None
    count: Callable[[SourceShard], int | None] = lambda shard: None
    count_reads_file: bool = False
    metadata_of: str | None = None
    reads_remote: bool = False

    def is_file(self, path: str) -> bool:
        """Whether a path is a file of this format, by its name."""
        if self.matches is not None:
            return self.matches(path)
        return path.endswith(self.suffixes)


def clean_text(text: str) -> str:
    """Strips a text, and replaces lone surrogates, which no UTF-8 file can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def pick_captions(value: Any) -> list[str]:
    """The captions in a text, a list of texts, or anything else (none).

    Args:
        value: as it stands in a row or a json file.

    Returns:
        Cleaned captions that are not empty, in order, without repetitions.
    """
    values = value if isinstance(value, list | tuple) else [value]
    cleaned = (clean_text(item) for item in values if isinstance(item, str))
    return list(dict.fromkeys(filter(None, cleaned)))


def merge_captions(metadata: Mapping[str, Any], captions: list[str]) -> dict[str, Any]:
    """Metadata with "captions" where there are several, without it where there is one."""
    merged = {name: value for name, value in metadata.items() if name != "captions"}
    if len(captions) > 1:
        merged["captions"] = captions
    return merged


def read_image(root: str, name: str, key: str) -> bytes | Skipped:
    """The bytes of an image below a folder, or why there are none.

    Args:
        root: the folder, a real path. What leads out of it, by ".." or a link, is refused.
        name: path of the image, relative to `root` or absolute.
        key: of the pair.
    """
    try:
        # Resolved first, so that neither ".." nor a link leads out of the folder.
        path = os.path.realpath(os.path.join(root, name))
    except ValueError as error:
        return Skipped(key, "refused_path", f"{_shortened(name)} can name no file ({error})")
    if os.path.commonpath([root, path]) != root:
        return Skipped(key, "refused_path", f"{_shortened(name)} leads out of '{root}'")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
            return Skipped(key, "no_image", f"{_shortened(name)} is no ordinary file")
        if status.st_size > MAX_IMAGE_BYTES:
            detail = f"{_shortened(name)} has over {MAX_IMAGE_BYTES} bytes"
            return Skipped(key, "too_large", detail)
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        return Skipped(key, "no_image", f"{_shortened(name)}: {error.strerror}")


def image_files(folder: str) -> list[str]:
    """Paths of the images in a folder and below it, sorted; hidden ones are left out.

    Raises:
        ValueError: a link makes a folder hold itself.
    """
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    return [entry.path for entry in _walk_files(folder) if entry.name.lower().endswith(suffixes)]


def _walk_files(folder: str, above: tuple[str, ...] = ()) -> Iterable[os.DirEntry[str]]:
    real_path = os.path.realpath(folder)
    if real_path in above:
        raise ValueError(f"'{folder}' leads back to '{real_path}', which holds it; remove the link")
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk_files(entry.path, (*above, real_path))
        elif entry.is_file():
            yield entry


def _shortened(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}...")
