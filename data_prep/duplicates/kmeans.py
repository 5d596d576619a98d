"""Spherical k-means on the devices of this process: rows and centroids of unit length, cosines.

Rows come in chunks that are split over the devices, and products are made block by block, so that
memory is bounded by a chunk, the centroids and their sums. `rows` are numbers of rows, int64 [n],
and `read` gives the rows of some numbers, float32 [m, d].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK = 512  # rows of a product

Read = Callable[[np.ndarray], np.ndarray]


class KMeans:
    """The compiled steps for some devices.

    Attributes:
        chunk_rows: rows that go to the devices at a time.
    """

    def __init__(
        self, chunk_rows: int, devices: Sequence[jax.Device] | None = None, *, probes: int = 1
    ):
        """Prepares the devices.

        Args:
            chunk_rows: at a time; rounded up to whole blocks on every device.
            devices: those of this process by default.
            probes: number of nearest clusters that `assign` gives for each row.
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
        """The nearest clusters of each row and the cosines: int32 and float32 [n, probes]."""
        clusters, cosines, _ = self._look_at_all(centroids, rows, read)
        return clusters, cosines

    def improve(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """Does one round of Lloyd's.

        Returns:
            centroids: float32 [k, d]; one without rows stays where it is.
            clusters: int32 [n], by the centroids that came in.
        """
        clusters, _, sums = self._look_at_all(centroids, rows, read)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centroids)
        return moved.astype(np.float32), clusters[:, 0]

    def _look_at_all(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like `_look`, chunk by chunk."""
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
    """Clusters and cosines [m, probes] of a device's rows; sums [k, d] of those of all devices."""

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
    """Different rows, drawn at random, as the first centroids: float32 [count, d]."""
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
    """Repeats rounds of Lloyd's until no row changes its cluster, or `iterations` are done.

    `save` gets the centroids and the number of rounds after every round.
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
