"""Whether an input is still the one that an output was made of.

Of every input two things are kept beside the output: its contents, as size and hashes, in the
statistics; and its location (path, size and time of change), in a file of its own, since that
differs from one machine to the next. How inputs are read belongs in the readers.

Ours: where path, size and time are the same, so is the input. Where the time differs (a copy, a
touched file, a restored backup), 64 kB at 32 offsets show most edits at once, and a hash of every
byte shows the others. The files that a table names are part of it: of them too, sizes and times are
compared first, then every byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from diht_jax.data.atomic_file import write_atomically
from diht_jax.data.readers.base import read_image, walk_files
from diht_jax.data.readers.registry import (
    FORMATS,
    Skipped,
    SourceShard,
    describe_linked,
    names_files,
)
from diht_jax.data.records.remote import file_size, is_remote, open_system

# The ending of the files with locations; folders that were written before have it, so it stays.
LOCATION_SUFFIX = ".place.json"

# The quick hash is of so many blocks of so many bytes.
_BLOCKS, _BLOCK_BYTES = 32, 2**16
_READ_BYTES = 2**22
# One run compares its inputs several times, and a table may name millions of files.
_states_of_linked: dict[str, str | None] = {}


class Description(NamedTuple):
    """What is kept of an input.

    Attributes:
        contents: what it holds, wherever it lies: part, options, size, the quick hash, and the hash
            of every byte. JSON-able.
        location: path, size and time of change. JSON-able.
    """

    contents: dict[str, Any]
    location: dict[str, Any]


def describe(source: SourceShard) -> Description:
    """Describes an input; reads it once.

    Args:
        source: a file, a part of one, or a folder.

    Raises:
        FileNotFoundError: it is gone.
    """
    forget_linked()  # whatever was seen before, this is what will be read
    location = _locate(source)
    files = list(_list_files(source))
    contents = {
        "kind": source.kind,
        "start": source.start,
        "stop": source.stop,
        "options": dict(source.options),
        "files": len(files),
        "size_bytes": location["size_bytes"],
        "fingerprint": _hash_samples(source),
        "digest": _hash_all(source),
    }
    if "linked" in location:
        contents["linked"] = _hash_linked(source)
    return Description(_plain(contents), location)


def is_same(source: SourceShard, contents: Mapping[str, Any], location_path: pathlib.Path) -> bool:
    """Whether an input is the one that was described before.

    An input that lies elsewhere now, or was touched, is compared by its bytes; if they are the
    same, its new location is written down, so that the next run need not read it.

    Args:
        source: the input now.
        contents: of `describe`, before.
        location_path: file of `write_location`, before; it may be missing.

    Raises:
        FileNotFoundError: the input is gone.
    """
    now = _locate(source)
    part = {"kind": source.kind, "start": source.start, "stop": source.stop}
    part |= {"options": dict(source.options), "size_bytes": now["size_bytes"]}
    if any(contents.get(name) != value for name, value in _plain(part).items()):
        return False
    before = _read_location(location_path)
    if before is not None and "linked" not in before:
        # Written before the files that a table names were looked at.
        before |= {name: now[name] for name in ("linked",) if name in now}
    if before == now and now["changed"] is not None:
        return True
    if contents.get("fingerprint") != _hash_samples(source):
        return False
    if contents.get("digest") != _hash_all(source):
        return False
    if "linked" in contents and contents["linked"] != _hash_linked(source):
        return False
    write_location(location_path, now)
    return True


def forget_linked() -> None:
    """Makes the next comparison look again at the files that tables name; else it is done once."""
    _states_of_linked.clear()


def write_location(path: pathlib.Path, location: Mapping[str, Any]) -> None:
    """Writes the location that `describe` gave."""
    text = json.dumps(location, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def _locate(source: SourceShard) -> dict[str, Any]:
    identity = source.identity()
    location = {
        "path": identity["path"],
        "size_bytes": identity["size_bytes"],
        "changed": identity["changed_ns"],
    }
    if not names_files(source):
        return location
    linked = _state_of_linked(source, identity["changed_ns"])
    return location if linked is None else location | {"linked": linked}


def _read_location(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _hash_samples(source: SourceShard) -> str | None:
    """The hash of 64 kB at 32 offsets of a file, or of its part; None for a folder."""
    if os.path.isdir(source.path):
        return None
    size = file_size(source.path)
    start, stop = _range(source, size)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    last = max(start, stop - _BLOCK_BYTES)
    offsets = {start + (last - start) * i // (_BLOCKS - 1) for i in range(_BLOCKS)}
    with _open(source.path) as file:
        for offset in sorted(offsets):
            file.seek(offset)
            digest.update(file.read(min(_BLOCK_BYTES, stop - offset)))
    return digest.hexdigest()


def _hash_all(source: SourceShard) -> str:
    """The hash of every byte of a file, of its part, or of a folder's files with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path in _list_files(source):
        size = file_size(path)
        digest.update(f"{name}\n{size}\n".encode("utf-8", "surrogatepass"))
        version = _locate(SourceShard(source.kind, path))["changed"]
        digest.update(_hash_range(path, *_range(source, size), version))
    return digest.hexdigest()


# For each of several parts of a parquet file the whole is hashed, but read once in a process.
@functools.lru_cache(maxsize=1024)
def _hash_range(path: str, start: int, stop: int, version: int | str | None) -> bytes:
    """Hash of a range of bytes; the version makes the calls before and after a change differ."""
    digest = hashlib.blake2b(digest_size=16)
    with _open(path) as file:
        file.seek(start)
        while start < stop and (data := file.read(min(_READ_BYTES, stop - start))):
            digest.update(data)
            start += len(data)
    return digest.digest()


def _range(source: SourceShard, size: int) -> tuple[int, int]:
    # Parts of a table are given in bytes; other parts are numbered, and the whole file is hashed.
    if source.kind != "table":
        return 0, size
    return source.start, size if source.stop is None else min(source.stop, size)


def _state_of_linked(source: SourceShard, version: int | None) -> str | None:
    """The remembered `describe_linked` of a source, whose file has this version."""
    key = json.dumps([str(source), version, dict(source.options)], sort_keys=True)
    if key not in _states_of_linked:
        _states_of_linked[key] = describe_linked(source)
    return _states_of_linked[key]


def _hash_linked(source: SourceShard) -> str:
    """Hash of every byte of the files that a table names, in the order of its rows."""
    digest = hashlib.blake2b(digest_size=16)
    for root, name in FORMATS[source.kind].list_linked_files(source):
        image = read_image(os.path.realpath(root), name, name)
        data = image.reason.encode() if isinstance(image, Skipped) else image
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _list_files(source: SourceShard) -> Iterator[tuple[str, str]]:
    """Name and path of every file of an input: of itself, or of those in a folder, in order."""
    if is_remote(source.path) or not os.path.isdir(source.path):
        yield "", source.path
        return
    found = [path for path, is_inside in walk_files(source.path, source.root) if is_inside]
    names = [os.path.relpath(path, source.path) for path in found]

    def files_before_folders(pair: tuple[str, str]) -> list[tuple[bool, str]]:
        *folders, name = pair[0].split(os.sep)
        return [*((True, folder) for folder in folders), (False, name)]

    yield from sorted(zip(names, found, strict=True), key=files_before_folders)


def _open(path: str) -> Any:
    if not is_remote(path):
        return open(path, "rb")
    system, name = open_system(path)
    return system.open(name, "rb")
