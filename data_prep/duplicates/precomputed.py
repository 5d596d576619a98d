"""Precomputed embeddings: files of keys and vectors, by `diht_jax.embed` or by others.

A folder of `diht_jax.embed` has files for each shard of its input, and `embeddings.json`, which
names the shards.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.teachers import embedding_files
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy
from diht_jax.storage.stores import is_remote, open_system

DESCRIPTION = "embeddings.json"

_CHUNK = 2**24  # cosines at a time


class Match(NamedTuple):
    """A picture of a set.

    Attributes:
        key: of its pair.
        cosine: with it.
    """

    key: str
    cosine: float


def read_embeddings(path: str) -> tuple[list[str], np.ndarray]:
    """The keys and image embeddings of a file of `diht_jax.embed`, or of the same form.

    Args:
        path: .npz with "key" and "image_emb", or .parquet with such columns; may be a URL.

    Returns:
        n keys, and float32 [n, d].

    Raises:
        ValueError: it holds something else.
    """
    with local_copy(path) as name:
        try:
            keys = embedding_files.read_keys(name, "key")
            found = embedding_files.read_embeddings(name, "image_emb")
            if len(keys) != len(found):
                raise ValueError(f"{len(keys)} keys, but {len(found)} embeddings")
        except ValueError as error:
            raise ValueError(
                f"{path}: expected 'key' and 'image_emb' [n, d] as diht_jax.embed writes them "
                f"({error})"
            ) from error
    return keys, found


def find_files(pattern: str) -> list[str]:
    """The paths or URLs that a glob matches, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    system, path = open_system(pattern, use_listings_cache=False)
    return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def list_shards(folder: str) -> list[tuple[str, int]]:
    """Path and start of each shard that a folder of `diht_jax.embed` is of, in their order.

    Raises:
        ValueError: it is no such folder.
    """
    try:
        found = json.loads(files.read_bytes(files.join(folder, DESCRIPTION)))["source"]
        return [(shard["path"], shard["start"]) for shard in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{folder}': expected the --output of diht_jax.embed ({type(error).__name__}: {error})"
        ) from error


def describe(folder: str) -> str:
    """A hash of what a folder of `diht_jax.embed` is of: its input, its model and its settings."""
    list_shards(folder)
    data = files.read_bytes(files.join(folder, DESCRIPTION))
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def files_of_shards(folder: str, num_shards: int) -> list[tuple[str, ...]]:
    """The files that `diht_jax.embed` wrote of each shard."""
    named = re.compile(r"embeddings-(\d{5,})-.*\.(npz|parquet)")
    found: list[list[str]] = [[] for _ in range(num_shards)]
    for name in files.list_names(folder):
        match = named.fullmatch(name)
        if match and int(match[1]) < num_shards:
            found[int(match[1])].append(files.join(folder, name))
    return [tuple(paths) for paths in found]


def read_of_shard(folder: str, source: SourceShard) -> dict[str, np.ndarray]:
    """Key -> embedding of the pairs of one shard.

    Args:
        folder: of `diht_jax.embed` on the same input.
        source: the shard.

    Raises:
        ValueError: the folder is of another input, or not complete.
    """
    numbers, paths = _index(folder)
    identity = source.identity()
    number = numbers.get((identity["path"], identity["start"]))
    if number is None or not paths[number]:
        raise ValueError(
            f"'{folder}' has no embeddings of {source}; run diht_jax.embed on this input"
        )
    found: dict[str, np.ndarray] = {}
    for path in paths[number]:
        keys, rows = read_embeddings(path)
        found |= dict(zip(keys, rows, strict=True))
    return found


@functools.lru_cache(maxsize=4)
def _index(folder: str) -> tuple[dict[tuple[str, int], int], list[tuple[str, ...]]]:
    """Shard -> its number, and the files of each; a worker reads them once."""
    listed = list_shards(folder)
    return {shard: i for i, shard in enumerate(listed)}, files_of_shards(folder, len(listed))


class EmbeddedSet:
    """The embeddings of the pictures of a set."""

    def __init__(self, keys: Sequence[str], embeddings: np.ndarray):
        """Takes n keys and float [n, d], of any length; those of length 0 match nothing."""
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        self.keys = list(keys)
        self.embeddings = (embeddings / np.maximum(lengths, 1e-12)).astype(np.float32)

    def digest(self) -> str:
        """A hash of keys and embeddings."""
        digest = hashlib.blake2b(json.dumps(self.keys).encode(), digest_size=16)
        digest.update(self.embeddings.tobytes())
        return digest.hexdigest()

    def find(self, embeddings: np.ndarray, min_cosine: float) -> list[Match | None]:
        """The nearest picture of the set, where it is near.

        Args:
            embeddings: float32 [n, d], of length 1 or 0.
            min_cosine: least cosine.

        Raises:
            ValueError: the set's embeddings have another size.
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
                found.append(Match(self.keys[row], best) if best >= min_cosine else None)
        return found


def open_set(path: str) -> EmbeddedSet:
    """Reads the embeddings of a set.

    Args:
        path: a folder of `diht_jax.embed`, or a glob of .npz or .parquet files with "key" and
            "image_emb"; paths or URLs.

    Raises:
        ValueError: it is neither, or empty.
    """
    if path.endswith(embedding_files.SUFFIXES):
        paths = find_files(path)
    else:
        paths = [p for of_shard in files_of_shards(path, len(list_shards(path))) for p in of_shard]
    parts = [part for part in map(read_embeddings, paths) if part[0]]
    keys = [key for part, _ in parts for key in part]
    if not keys:
        raise ValueError(f"'{path}': no embeddings; expected .npz or .parquet files")
    return EmbeddedSet(keys, np.concatenate([rows for _, rows in parts]))
