"""Spherical k-means on all devices: rows of unit length, centroids of unit length, cosines.

Rows come in chunks that are split over the devices, so that memory is bounded by a chunk, the
centroids and their sums. The result does not depend on the number of devices or on the chunks, to
the bit: every product has the same shape, and sums are made of integers (coordinates in steps of
2^-14), whose order does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK = 512  # rows of a product
_BITS = 14
_MOST_ROWS = 2**16  # of a chunk: their sums fit into 32 bits

Read = Callable[[np.ndarray], np.ndarray]


class KMeans:
    """The compiled step for one number of clusters, dimensions and devices.

    Attributes:
        chunk_rows: rows that go to the devices at a time.
    """

    def __init__(
        self, chunk_rows: int, devices: Sequence[jax.Device] | None = None, *, probes: int = 1
    ):
        """Prepares the devices.

        Args:
            chunk_rows: about so many rows; rounded up to whole blocks on every device.
            devices: all of this process by default; more than 128 are not used.
            probes: how many of the nearest clusters `assign` gives for each row.
        """
        devices = list(jax.local_devices() if devices is None else devices)
        devices = devices[: _MOST_ROWS // _BLOCK]
        unit = _BLOCK * len(devices)
        self.chunk_rows = unit * max(1, -(-min(chunk_rows, _MOST_ROWS - unit + 1) // unit))
        mesh = Mesh(np.asarray(devices), ("data",))
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._whole = NamedSharding(mesh, PartitionSpec())
        rows, whole = PartitionSpec("data"), PartitionSpec()
        step = jax.shard_map(
            functools.partial(_sum_rows, probes=probes),
            mesh=mesh,
            in_specs=(whole, whole, rows, rows),
            out_specs=(whole, rows, rows),
            check_vma=False,
        )
        self._step = jax.jit(step, donate_argnums=1)

    def assign(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cluster and cosine to its centroid, chunk by chunk.

        Args:
            centroids: float32 [k, d], of unit length.
            rows: int64 [n], what to give to `read`.
            read: rows -> float32 [m, d], of unit length.

        Yields:
            int32 [m] and float32 [m]; with several probes int32 and float32 [m, probes].
        """
        for clusters, cosines, _ in self._run(centroids, rows, read):
            yield clusters, cosines

    def improve(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """One round of Lloyd's: arguments of `assign`.

        Returns:
            centroids: float32 [k, d]; one without rows stays where it is.
            clusters: int32 [n], by the centroids that were given.
        """
        parts = list(self._run(centroids, rows, read))
        high, low = (np.asarray(part, np.float64) for part in parts[-1][2])
        total = high * 2.0**_BITS + low
        lengths = np.linalg.norm(total, axis=1, keepdims=True)
        moved = (total / np.maximum(lengths, 1)).astype(np.float32)
        clusters = np.concatenate([found for found, _, _ in parts])
        return np.where(lengths > 0, moved, centroids), clusters

    def _run(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array]]]:
        on_devices = jax.device_put(centroids, self._whole)
        zeros = np.zeros(centroids.shape, np.int32)
        sums = tuple(jax.device_put(zeros, self._whole) for _ in range(2))
        for start in range(0, len(rows), self.chunk_rows):
            values = read(rows[start : start + self.chunk_rows])
            count = len(values)
            padded = np.zeros((self.chunk_rows, centroids.shape[1]), np.float32)
            padded[:count] = values
            is_row = np.arange(self.chunk_rows) < count
            given = jax.device_put((padded, is_row), self._sharded)
            sums, clusters, cosines = self._step(on_devices, sums, *given)
            yield np.asarray(clusters)[:count], np.asarray(cosines)[:count], sums


def _sum_rows(
    centroids: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    rows: jax.Array,
    is_row: jax.Array,
    *,
    probes: int,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Of a device's rows: their clusters and cosines; and the sums with those of all devices."""

    def of_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines = jnp.matmul(block, centroids.T, precision=jax.lax.Precision.HIGHEST)
        if probes > 1:
            highest, found = jax.lax.top_k(cosines, probes)
            return found.astype(jnp.int32), highest
        return jnp.argmax(cosines, axis=1).astype(jnp.int32), jnp.max(cosines, axis=1)

    blocks = rows.reshape(-1, _BLOCK, rows.shape[1])
    clusters, cosines = (
        part.reshape(-1, *part.shape[2:]) for part in jax.lax.map(of_block, blocks)
    )
    nearest = clusters[:, 0] if probes > 1 else clusters
    steps = jnp.round(rows * 2.0**_BITS).astype(jnp.int32) * is_row[:, None]
    added = jnp.zeros(centroids.shape, jnp.int32).at[nearest].add(steps)
    high, low = sums
    low = low + jax.lax.psum(added, "data")
    return (high + (low >> _BITS), low & (2**_BITS - 1)), clusters, cosines


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
    """Rounds of Lloyd's until no row changes its cluster, or `iterations` are done.

    Args:
        kmeans: of these devices.
        centroids: float32 [k, d] to begin with.
        rows: int64 [n] of the rows to look at.
        read: as of `KMeans.assign`.
        iterations: at most so many.
        done: so many were done before.
        save: is called with the centroids and the number of rounds after every round.

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
