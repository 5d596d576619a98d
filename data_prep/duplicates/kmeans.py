"""Spherical k-means on the devices of this process, with unit-length rows and centroids.

Rows are processed in chunks that are split over the devices, and cosines in blocks of rows. Memory
is bounded by one chunk, the centroids and their sums. `rows` are row numbers, int64 [n], and `read`
returns the rows with the given numbers, float32 [m, d].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK = 512  # rows per matrix product

Read = Callable[[np.ndarray], np.ndarray]


class KMeans:
    """Compiled k-means steps for a set of devices.

    Attributes:
        chunk_rows: number of rows on the devices at a time.
    """

    def __init__(
        self, chunk_rows: int, devices: Sequence[jax.Device] | None = None, *, probes: int = 1
    ):
        """Prepares the devices.

        Args:
            chunk_rows: rows at a time; rounded up to whole blocks on every device.
            devices: default to the devices of this process.
            probes: number of nearest clusters per row that `assign` returns.
        """
        devices = jax.local_devices() if devices is None else list(devices)
        unit = _BLOCK * len(devices)
        self.chunk_rows = unit * max(1, -(-chunk_rows // unit))
        mesh = Mesh(np.asarray(devices), ("data",))
        split, whole = PartitionSpec("data"), PartitionSpec()
        self._split, self._whole = NamedSharding(mesh, split), NamedSharding(mesh, whole)
        look = jax.shard_map(
            functools.partial(_look, probes=probes),
            mesh=mesh,
            in_specs=(whole, split),
            out_specs=(split, split, whole),
            check_vma=False,
        )
        self._look = jax.jit(look)

    def assign(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns each row's nearest clusters and cosines: int32 and float32 [n, probes]."""
        clusters, cosines, _ = self._look_at_all(centroids, rows, read)
        return clusters, cosines

    def improve(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """Performs one iteration of Lloyd's algorithm.

        Returns:
            centroids: float32 [k, d]; a centroid without rows does not move.
            clusters: int32 [n], nearest input centroids.
        """
        clusters, _, sums = self._look_at_all(centroids, rows, read)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centroids)
        return moved.astype(np.float32), clusters[:, 0]

    def _look_at_all(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Calls `_look` on all rows, chunk by chunk."""
        on_devices, parts = jax.device_put(centroids, self._whole), []
        sums = jax.device_put(jnp.zeros(centroids.shape, jnp.float32), self._whole)
        for start in range(0, len(rows), self.chunk_rows):
            own = rows[start : start + self.chunk_rows]
            padded = np.zeros((self.chunk_rows, centroids.shape[1]), np.float32)
            padded[: len(own)] = read(own)
            *found, of_chunk = self._look(on_devices, jax.device_put(padded, self._split))
            parts.append([np.asarray(values)[: len(own)] for values in found])
            sums += of_chunk
        clusters, cosines = map(np.concatenate, zip(*parts, strict=True))
        return clusters, cosines, np.asarray(sums)


def _look(
    centroids: jax.Array, rows: jax.Array, *, probes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns clusters and cosines [m, probes] of local rows, and sums [k, d] over all devices."""

    def of_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines = jnp.matmul(block, centroids.T, precision=jax.lax.Precision.HIGHEST)
        if probes > 1:
            highest, found = jax.lax.top_k(cosines, probes)
            return found.astype(jnp.int32), highest
        nearest = jnp.argmax(cosines, axis=1, keepdims=True).astype(jnp.int32)
        return nearest, jnp.max(cosines, axis=1, keepdims=True)

    blocks = rows.reshape(-1, _BLOCK, rows.shape[1])
    clusters, cosines = (found.reshape(-1, probes) for found in jax.lax.map(of_block, blocks))
    own = jax.ops.segment_sum(rows, clusters[:, 0], num_segments=len(centroids))
    return clusters, cosines, jax.lax.psum(own, "data")


def choose_centroids(rows: np.ndarray, count: int, read: Read, seed: int) -> np.ndarray:
    """Draws distinct random rows as initial centroids: float32 [count, d]."""
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return read(rows[np.sort(chosen)])


def fit(
    kmeans: KMeans,
    centroids: np.ndarray,
    rows: np.ndarray,
    read: Read,
    *,
    iterations: int,
    done: int = 0,
    save: Callable[[np.ndarray, int], None] = lambda centroids, done: None,
) -> np.ndarray:
    """Iterates Lloyd's algorithm until no row changes its cluster, at most `iterations` times.

    `save` is called after every iteration with the centroids and the number of iterations done.
    """
    before = None
    for number in range(done, iterations):
        centroids, clusters = kmeans.improve(centroids, rows, read)
        settled = before is not None and np.array_equal(before, clusters)
        save(centroids, iterations if settled else number + 1)
        if settled:
            break
        before = clusters
    return centroids
