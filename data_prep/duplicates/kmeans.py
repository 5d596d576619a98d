"""Spherical k-means on the devices of this process: rows and centroids of unit length, cosines.

Rows come in chunks that are split over the devices, and products are made block by block, so that
memory is bounded by a chunk, the centroids and their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

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
        rows, whole = PartitionSpec("data"), PartitionSpec()
        self._sharded, self._whole = (NamedSharding(mesh, spec) for spec in (rows, whole))
        share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        find = functools.partial(_find_nearest, probes=probes)
        self._find = jax.jit(share(find, in_specs=(whole, rows), out_specs=(rows, rows)))
        add = share(_add_rows, in_specs=(whole, rows, rows), out_specs=whole)
        self._add = jax.jit(add, donate_argnums=0)

    def assign(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Finds the nearest clusters of each row, chunk by chunk.

        Args:
            centroids: float32 [k, d], of unit length.
            rows: int64 [n], what to give to `read`.
            read: rows -> float32 [m, d], of unit length.

        Yields:
            int32 [m, probes] clusters and float32 [m, probes] cosines, the nearest first.
        """
        for clusters, cosines, count, _ in self._run(centroids, rows, read):
            yield np.asarray(clusters)[:count], np.asarray(cosines)[:count]

    def improve(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """Does one round of Lloyd's; arguments of `assign`.

        Returns:
            centroids: float32 [k, d]; one without rows stays where it is.
            clusters: int32 [n], by the centroids that came in.
        """
        sums = jax.device_put(jnp.zeros(centroids.shape, jnp.float32), self._whole)
        parts = []
        for clusters, _, count, padded in self._run(centroids, rows, read):
            sums = self._add(sums, padded, clusters[:, 0])  # rows of zeros add nothing
            parts.append(np.asarray(clusters)[:count, 0])
        total = np.asarray(sums)
        lengths = np.linalg.norm(total, axis=1, keepdims=True)
        moved = np.where(lengths > 0, total / np.maximum(lengths, 1e-12), centroids)
        return moved.astype(np.float32), np.concatenate(parts)

    def _run(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[jax.Array, jax.Array, int, jax.Array]]:
        """Clusters and cosines of each chunk, the number of its rows, and the rows, padded."""
        on_devices = jax.device_put(centroids, self._whole)
        for start in range(0, len(rows), self.chunk_rows):
            own = rows[start : start + self.chunk_rows]
            padded = np.zeros((self.chunk_rows, centroids.shape[1]), np.float32)
            padded[: len(own)] = read(own)
            chunk = jax.device_put(padded, self._sharded)
            yield *self._find(on_devices, chunk), len(own), chunk


def _find_nearest(
    centroids: jax.Array, rows: jax.Array, *, probes: int
) -> tuple[jax.Array, jax.Array]:
    """Clusters and cosines [m, probes] of a device's rows."""

    def of_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines = jnp.matmul(block, centroids.T, precision=jax.lax.Precision.HIGHEST)
        if probes > 1:
            highest, found = jax.lax.top_k(cosines, probes)
            return found.astype(jnp.int32), highest
        nearest = jnp.argmax(cosines, axis=1, keepdims=True).astype(jnp.int32)
        return nearest, jnp.max(cosines, axis=1, keepdims=True)

    blocks = rows.reshape(-1, _BLOCK, rows.shape[1])
    clusters, cosines = jax.lax.map(of_block, blocks)
    return clusters.reshape(-1, probes), cosines.reshape(-1, probes)


def _add_rows(sums: jax.Array, rows: jax.Array, nearest: jax.Array) -> jax.Array:
    """The sums [k, d] with those of the rows of all devices."""
    own = jax.ops.segment_sum(rows, nearest, num_segments=sums.shape[0])
    return sums + jax.lax.psum(own, "data")


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

    Args:
        kmeans: of some devices.
        centroids: float32 [k, d] to begin with.
        rows: int64 [n] of the rows to look at.
        read: see `KMeans.assign`.
        iterations: most rounds.
        done: rounds that were done before.
        save: called with the centroids and the number of rounds after every round.

    Returns:
        float32 [k, d].
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
