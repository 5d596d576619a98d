"""Fingerprints of inputs: is an input still the one that an output was made of?

Of every input two things are kept next to the output: its contents, as part, options and size, in
the statistics; and its location (path, size and time of change), in a file of its own, since that
differs from one machine to the next. How inputs are read belongs in the readers.

What counts as the same is one of `IDENTITIES`:

    time   size and time of change, or the version that an object store states; nothing is read
    hash   like "time"; and a file that was touched or copied is known by a hash of every byte,
           which costs a reading of its own
    size   size alone, after a copy that has lost the times

The files that a table names are part of it, and are compared in the same way.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from diht_jax.readers.base import read_image, walk_files
from diht_jax.readers.registry import (
    Skipped,
    SourceShard,
    describe_linked,
    list_linked_files,
    names_files,
)
from diht_jax.storage import files
from diht_jax.storage.stores import input_size, is_remote, open_file

LOCATION_SUFFIX = ".place.json"  # of the files with locations

IDENTITIES = ("time", "hash", "size")

_READ_BYTES = 2**22
# One run compares its inputs several times, and a table may name millions of files.
_states_of_linked: dict[str, str | None] = {}


class Description(NamedTuple):
    """Description of an input, JSON-able.

    Attributes:
        contents: what it holds, independent of where it is: part, options, size, and the hash of
            every byte where it was asked for.
        location: path, size and time of change.
    """

    contents: dict[str, Any]
    location: dict[str, Any]


def check_identity(name: str) -> None:
    """Raises ValueError for a `config.input_identity` that is not one of `IDENTITIES`."""
    if name not in IDENTITIES:
        raise ValueError(f"config.input_identity='{name}'; expected one of {', '.join(IDENTITIES)}")


def describe(source: SourceShard, identity: str = "time") -> Description:
    """Describes an input; reads it only where it is hashed.

    Raises:
        FileNotFoundError: it is gone.
    """
    forget_linked()  # this is what will be read
    contents, location = _look_at(source)
    if identity == "hash":
        contents["digest"] = _hash_all(source)
        if "linked" in location:
            contents["linked"] = _hash_linked(source)
    return Description(contents, location)


def is_same(
    source: SourceShard, contents: Mapping[str, Any], location_path: str, identity: str = "time"
) -> bool:
    """Compares an input with the contents of before, and the location in a file, if it is there.

    An input that was touched or copied is compared by its bytes where they were hashed; if they are
    the same, its new location is written down, so that the next run need not read it.

    Raises:
        FileNotFoundError: the input is gone.
    """
    now, location = _look_at(source)
    if any(contents.get(name) != value for name, value in now.items() if name != "files"):
        return False
    before = files.read_object(location_path)
    # The path is no part of it: what was moved is the same file.
    if before is not None and before | {"path": location["path"]} == location:
        return True
    if "digest" in contents:
        if contents["digest"] != _hash_all(source):
            return False
        if "linked" in contents and contents["linked"] != _hash_linked(source):
            return False
    elif identity != "size":
        return False
    files.write_object(location_path, location)
    return True


def forget_linked() -> None:
    """Makes the next comparison look again at the files that tables name; else it is done once."""
    _states_of_linked.clear()


def _look_at(source: SourceShard) -> Description:
    """The description of an input, of which nothing is read."""
    found = source.identity()
    location = {"path": found["path"], "size_bytes": found["size_bytes"]}
    location["changed"] = found["changed_ns"]
    if names_files(source):
        key = json.dumps([str(source), found["changed_ns"], dict(source.options)], sort_keys=True)
        if key not in _states_of_linked:
            _states_of_linked[key] = describe_linked(source)
        if (linked := _states_of_linked[key]) is not None:
            location["linked"] = linked
    contents = {
        "kind": source.kind,
        "start": source.start,
        "stop": source.stop,
        "options": dict(source.options),
        "size_bytes": found["size_bytes"],
        "files": found["files"],
    }
    return Description(json.loads(json.dumps(contents)), location)


def _hash_all(source: SourceShard) -> str:
    """The hash of every byte of a file, of its part, or of a folder's files with their names."""
    digest = hashlib.blake2b(digest_size=16)
    found = [("", source.path)]
    if not is_remote(source.path) and os.path.isdir(source.path):
        inside = [path for path, is_inside in walk_files(source.path, source.root) if is_inside]
        found = sorted((os.path.relpath(path, source.path), path) for path in inside)
    for name, path in found:
        size = input_size(path)
        digest.update(f"{name}\n{size}\n".encode("utf-8", "surrogatepass"))
        version = SourceShard(source.kind, path).identity()["changed_ns"]
        start, stop = 0, size
        # Parts of a table are given in bytes; other parts are numbered, and the file is hashed.
        if source.kind == "table":
            start, stop = source.start, size if source.stop is None else min(source.stop, size)
        digest.update(_hash_range(path, start, stop, version))
    return digest.hexdigest()


# For each of several parts of a parquet file the whole is hashed, but read once in a process.
@functools.lru_cache(maxsize=1024)
def _hash_range(path: str, start: int, stop: int, version: int | str | None) -> bytes:
    """Hash of a range of bytes; the version makes the calls before and after a change differ."""
    digest = hashlib.blake2b(digest_size=16)
    with open_file(path) as file:
        file.seek(start)
        while start < stop and (data := file.read(min(_READ_BYTES, stop - start))):
            digest.update(data)
            start += len(data)
    return digest.digest()


def _hash_linked(source: SourceShard) -> str:
    """Hash of every byte of the files that a table names, in the order of its rows."""
    digest = hashlib.blake2b(digest_size=16)
    for root, name in list_linked_files(source):
        image = read_image(os.path.realpath(root), name, name)
        data = image.reason.encode() if isinstance(image, Skipped) else image
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
