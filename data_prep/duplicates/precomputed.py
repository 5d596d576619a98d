"""Precomputed embeddings: files with keys and vectors, from `diht_jax.embed` or other programs.

An output folder of `diht_jax.embed` has files for each shard of its input, and `embeddings.json`
with the names of the shards.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.duplicates.image_hashes import Match
from data_prep.teachers import precomputed
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy
from diht_jax.storage.stores import is_remote

DESCRIPTION = "embeddings.json"

_CHUNK = 2**24  # cosines at a time

# Path, start, stop and number of bytes of a shard.
_Shard = tuple[str, int, int | None, int | None]


def read_embeddings(path: str) -> tuple[list[str], np.ndarray]:
    """Reads keys and image embeddings from a file as written by `diht_jax.embed`.

    Args:
        path: path or URL of an .npz or .parquet file with "key" and "image_emb".

    Returns:
        n keys, and float32 [n, d].

    Raises:
        ValueError: the file has other contents.
    """
    with local_copy(path) as name:
        precomputed.check_digest(path, name)
        try:
            keys = precomputed.read_keys(name, "key")
            found = precomputed.read_embeddings(name, "image_emb")
            if len(keys) != len(found):
                raise ValueError(f"{len(keys)} keys, but {len(found)} embeddings")
        except ValueError as error:
            raise ValueError(
                f"{path}: expected 'key' and 'image_emb' [n, d] as diht_jax.embed --modalities "
                f"image writes them ({error})"
            ) from error
    return keys, found


def find_files(pattern: str) -> list[str]:
    """Returns the paths or URLs that match a glob, sorted."""
    return sorted(files.find_inputs(pattern) if is_remote(pattern) else glob.glob(pattern))


def find_shard_files(folder: str) -> dict[_Shard, list[str]]:
    """Finds the files of each shard in an output folder of `diht_jax.embed`.

    Raises:
        ValueError: it is another kind of folder.
    """
    try:
        source = json.loads(files.read_bytes(files.join(folder, DESCRIPTION)))["source"]
        shards = list(map(_identify, source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{folder}': expected the --output of diht_jax.embed, a folder with {DESCRIPTION} in "
            f"it ({type(error).__name__}: {error})"
        ) from error
    found: dict[_Shard, list[str]] = {shard: [] for shard in shards}
    names = files.list_names(folder)
    for name in names:
        match = re.fullmatch(r"(embeddings-(\d{5,})-.*)\.(npz|parquet|json)", name)
        if not match or int(match[2]) >= len(shards):
            continue
        if match[3] != "json":
            found[shards[int(match[2])]].append(files.join(folder, name))
        elif {f"{match[1]}.npz", f"{match[1]}.parquet"}.isdisjoint(names):
            path = files.join(folder, match[1])
            raise ValueError(
                f"{path}.npz: missing, though {path}.json describes it; run diht_jax.embed again"
            )
    return found


def _identify(shard: Mapping[str, Any]) -> _Shard:
    """Returns the parts of `SourceShard.identity` to compare, without the modification time."""
    return shard["path"], shard["start"], shard.get("stop"), shard.get("size_bytes")


def _refuse_unfinished(paths: Sequence[str]) -> None:
    """Raises ValueError unless a shard has all of its parts, according to their `.json` files."""
    described = [f"{path.rpartition('.')[0]}.json" for path in paths]
    stated = list(map(files.read_object, described))
    if not any(stated):
        return
    for number, (path, found) in enumerate(zip(described, stated, strict=True)):
        if found is None or found.get("part") != number:
            raise ValueError(
                f"{path}: missing, damaged, or not of part {number} of its shard; delete it and "
                "run diht_jax.embed to its end"
            )
    if not (stated[-1] or {}).get("is_last"):
        raise ValueError(
            f"{paths[-1]}: not all parts of this shard are there; run diht_jax.embed to its end"
        )


def files_of_shard(known: dict[_Shard, list[str]], source: SourceShard) -> list[str]:
    """Returns the files of a shard from the result of `find_shard_files`.

    Returns an empty list if there are none, or if the shard now has another size.

    Raises:
        ValueError: the files are incomplete.
    """
    paths = known.get(_identify(source.identity()), [])
    _refuse_unfinished(paths)
    return paths


def describe(folder: str) -> str:
    """Hashes the input, model and settings of an output folder of `diht_jax.embed`."""
    find_shard_files(folder)
    data = files.read_bytes(files.join(folder, DESCRIPTION))
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_all(paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads key -> embedding from several files, without keys that occur more than once."""
    found: dict[str, np.ndarray] = {}
    repeated = set()
    for path in paths:
        for key, row in zip(*read_embeddings(path), strict=True):
            if key in found:
                repeated.add(key)
            found[key] = row
    return {key: row for key, row in found.items() if key not in repeated}


def read_of_shard(folder: str, source: SourceShard) -> dict[str, np.ndarray]:
    """Reads key -> embedding for the pairs of one shard, from `diht_jax.embed` on the same input.

    Raises:
        ValueError: the folder is incomplete, or of another input.
    """
    paths = files_of_shard(_find_shard_files_once(folder), source)
    if not paths:
        raise ValueError(
            f"'{folder}' has no embeddings of {source}, or of what it was before it was written "
            "again; run diht_jax.embed on this input"
        )
    return read_all(paths)


_find_shard_files_once = functools.lru_cache(maxsize=4)(find_shard_files)  # cached in each worker


class EmbeddedSet:
    """Embeddings of a set of images, for nearest-neighbour search."""

    def __init__(self, keys: Sequence[str], embeddings: np.ndarray):
        """Takes n keys and float [n, d], of any length; zero vectors match nothing."""
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        self.keys = list(keys)
        self.embeddings = (embeddings / np.maximum(lengths, 1e-12)).astype(np.float32)

    def digest(self) -> str:
        """Returns a hash of keys and embeddings."""
        digest = hashlib.blake2b(json.dumps(self.keys).encode(), digest_size=16)
        digest.update(self.embeddings.tobytes())
        return digest.hexdigest()

    def find(self, embeddings: np.ndarray, min_cosine: float) -> list[Match | None]:
        """Finds the nearest image of the set if its cosine is at least `min_cosine`.

        `embeddings` are float32 [n, d], of length 1 or 0.

        Raises:
            ValueError: the embeddings of the set have another size.
        """
        if len(embeddings) and embeddings.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"embeddings of size {embeddings.shape[1]} cannot be compared with those of an "
                f"evaluation set, of size {self.embeddings.shape[1]}: expected one model"
            )
        found: list[Match | None] = []
        size = max(1, _CHUNK // len(self.keys))
        for start in range(0, len(embeddings), size):
            cosines = embeddings[start : start + size] @ self.embeddings.T
            nearest = cosines.argmax(axis=1)
            for row, best in zip(nearest, cosines.max(axis=1).tolist(), strict=True):
                is_near = best >= min_cosine
                found.append(Match(self.keys[row], f"cosine {best:.3f}") if is_near else None)
        return found


def open_set(path: str) -> EmbeddedSet:
    """Reads a set: an output folder of `diht_jax.embed`, or a glob of .npz or .parquet files.

    Raises:
        ValueError: it is neither, or it is empty.
    """
    if path.endswith(precomputed.SUFFIXES):
        paths = find_files(path)
    else:
        paths = []
        for shard, of_shard in find_shard_files(path).items():
            if not of_shard:
                raise ValueError(
                    f"'{path}': no part of {shard[0]} is there; run diht_jax.embed to its end"
                )
            _refuse_unfinished(of_shard)
            paths += of_shard
    parts = [part for part in map(read_embeddings, paths) if part[0]]
    keys = [key for part, _ in parts for key in part]
    if not keys:
        raise ValueError(f"'{path}': no embeddings; expected .npz or .parquet files")
    return EmbeddedSet(keys, np.concatenate([rows for _, rows in parts]))
