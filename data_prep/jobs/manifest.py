"""Names and order of the parts of a folder: named by their inputs, listed in `manifest.json`.

The name is a hash of the input's path below its root, so that it does not depend on the other
inputs: one that is added, removed or replaced concerns its own part alone. The manifest has a line
for each part, in the order of the inputs.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_prep.jobs.shards import ShardTask
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_info import shard_name
from diht_jax.records.formats.registry import FORMATS
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

NAME = "manifest.json"


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
        path, root = _plain_path(self.shard.path), _plain_path(self.root)
        below = path.removeprefix(f"{root}/")
        # What a text such as tfds:NAME:SPLIT stands for is elsewhere.
        return below if below != path else path.rpartition("/")[2]


def plan_parts(
    inputs: Sequence[Input],
    folder: str,
    *,
    dataset: str,
    split: str,
    config_hash: str,
    output_format: str = "tfrecord",
    identity: str = "time",
) -> list[ShardTask]:
    """Gives every input its part, makes the folder, and writes the manifest.

    Args:
        inputs: in order, which is that of the manifest.
        folder: of the parts.
        dataset: first part of the names.
        split: second part of the names.
        config_hash: see `shards.hash_config`.
        output_format: of the parts, one of `formats.registry.FORMATS`.
        identity: one of `fingerprint.IDENTITIES`.
    """
    files.make_folder(folder)
    suffix = FORMATS[output_format].suffix
    prefix = shard_name(dataset, split, 0, 1, "").removesuffix("00000")
    names = [f"{prefix}{found}{suffix}" for found in hash_inputs(inputs)]
    entries = [_describe(name, found) for name, found in zip(names, inputs, strict=True)]
    if read_manifest(folder) != json.loads(json.dumps(entries)):
        files.write_object(files.join(folder, NAME), {"parts": entries}, with_checksum=True)
    return [
        ShardTask(found.shard, files.join(folder, name), config_hash, identity)
        for found, name in zip(inputs, names, strict=True)
    ]


def hash_inputs(inputs: Sequence[Input]) -> list[str]:
    """16 hexadecimal digits for each input; they do not depend on the inputs of other paths.

    They stand for the path below the root, the kind, and the range where a file makes several
    units. Of inputs that are alike in all of these, the second and later ones are numbered.
    """
    units = collections.Counter(found.shard.path for found in inputs)
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


def read_manifest(folder: str) -> list[dict[str, Any]]:
    """The lines of the manifest in their order; none where it is missing or damaged."""
    return (files.read_object(files.join(folder, NAME)) or {}).get("parts", [])


def _describe(name: str, found: Input) -> dict[str, Any]:
    """A line of the manifest: the part, its input, and what that was when the job was planned."""
    shard, state = found.shard, {"path": found.shard.path, "size_bytes": None, "changed_ns": None}
    with contextlib.suppress(FileNotFoundError):  # its task will fail of it
        state = shard.identity()
    return {
        "name": name,
        "path": found.path,
        "source": state["path"],
        "kind": shard.kind,
        "start": shard.start,
        "stop": shard.stop,
        "size_bytes": state["size_bytes"],
        "changed": state["changed_ns"],  # a time, or the version that a store states
    }


def _plain_path(path: str) -> str:
    """A path or URL in the one form in which they are compared."""
    if is_remote(path):
        return path.split("://", 1)[1].strip("/")
    return os.path.abspath(path).replace(os.sep, "/")
