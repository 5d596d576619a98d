"""Spherical k-means on all devices: rows of unit length, centroids of unit length, cosines.

Rows come in chunks that are split over the devices, those of other processes (`jax.distributed`)
among them: each process reads the rows of its own. Memory is bounded by a chunk, the centroids and
their sums, which each device adds up by itself for the length of a round. The result does not
depend on the number of processes and devices or on the chunks, to the bit: every product has the
same shape, and sums are made of integers (coordinates in steps of 2^-14), whose order does not
matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK = 512  # rows of a product
_BITS = 14
_MOST_ROWS = 2**16  # of a chunk on a device: their sums fit into 32 bits

Read = Callable[[np.ndarray], np.ndarray]


class KMeans:
    """The compiled step for one number of clusters, dimensions and devices.

    Attributes:
        chunk_rows: rows that go to the devices of all processes at a time.
    """

    def __init__(
        self, chunk_rows: int, devices: Sequence[jax.Device] | None = None, *, probes: int = 1
    ):
        """Prepares the devices.

        Args:
            chunk_rows: about so many rows; rounded up to whole blocks on every device.
            devices: all of all processes by default; each process has equally many of them.
            probes: how many of the nearest clusters `assign` gives for each row.
        """
        devices = list(jax.devices() if devices is None else devices)
        devices.sort(key=lambda device: (device.process_index, device.id))
        processes = sorted({device.process_index for device in devices})
        self._num_devices, self._num_processes = len(devices), len(processes)
        self._process = processes.index(jax.process_index())
        unit = _BLOCK * len(devices)
        blocks = -(-chunk_rows // unit)
        self.chunk_rows = unit * max(1, min(blocks, _MOST_ROWS // _BLOCK))
        mesh = Mesh(np.asarray(devices), ("data",))
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._whole = NamedSharding(mesh, PartitionSpec())
        rows, whole = PartitionSpec("data"), PartitionSpec()
        share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        find = functools.partial(_find_nearest, probes=probes)
        self._find = jax.jit(share(find, in_specs=(whole, rows), out_specs=(rows, rows)))
        add = share(_add_rows, in_specs=(rows, rows, rows, rows), out_specs=rows)
        self._add = jax.jit(add, donate_argnums=0)
        self._total = jax.jit(share(_total, in_specs=(rows,), out_specs=whole))

    def assign(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cluster and cosine to its centroid, chunk by chunk.

        Args:
            centroids: float32 [k, d], of unit length.
            rows: int64 [n], what to give to `read`.
            read: rows -> float32 [m, d], of unit length.

        Yields:
            int32 [m] and float32 [m]; with several probes int32 and float32 [m, probes]. Of the
            rows of this process's devices.
        """
        on_devices = self._replicate(centroids)
        for _, _, found in self._run(on_devices, rows, read):
            yield found

    def improve(
        self, centroids: np.ndarray, rows: np.ndarray, read: Read
    ) -> tuple[np.ndarray, np.ndarray]:
        """One round of Lloyd's: arguments of `assign`.

        Returns:
            centroids: float32 [k, d]; one without rows stays where it is.
            clusters: int32, by the centroids that were given; of the rows of this process.
        """
        on_devices, parts = self._replicate(centroids), []
        shape = (self._num_devices, *centroids.shape)
        zeros = jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=self._sharded)
        sums = zeros(), zeros()
        for given, clusters, (found, _) in self._run(on_devices, rows, read):
            sums = self._add(sums, *given, clusters)
            parts.append(found)
        high, low = (np.asarray(part.addressable_data(0)) for part in self._total(sums))
        moved = centroids.copy()
        for start in range(0, len(moved), _BLOCK):  # the numbers of 64 bits are never all there
            own = slice(start, start + _BLOCK)
            total = high[own].astype(np.float64) * 2.0**_BITS + low[own]
            lengths = np.linalg.norm(total, axis=1, keepdims=True)
            means = (total / np.maximum(lengths, 1)).astype(np.float32)
            moved[own] = np.where(lengths > 0, means, centroids[own])
        return moved, np.concatenate(parts)

    def _replicate(self, values: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._whole, values, values.shape)

    def _run(
        self, centroids: jax.Array, rows: np.ndarray, read: Read
    ) -> Iterator[tuple[tuple[jax.Array, jax.Array], jax.Array, tuple[np.ndarray, np.ndarray]]]:
        """Each chunk: rows and whether they are any, their clusters, and what was found here."""
        width, size = centroids.shape[1], self.chunk_rows // self._num_processes
        for start in range(0, len(rows), self.chunk_rows):
            first = start + self._process * size
            own = rows[first : first + size]
            padded = np.zeros((size, width), np.float32)
            if len(own):
                padded[: len(own)] = read(own)
            is_row = np.arange(size) < len(own)
            given = tuple(
                jax.make_array_from_process_local_data(self._sharded, part)
                for part in (padded, is_row)
            )
            clusters, cosines = self._find(centroids, given[0])
            found = _of_this_process(clusters)[: len(own)], _of_this_process(cosines)[: len(own)]
            yield given, clusters, found


def _of_this_process(values: jax.Array) -> np.ndarray:
    shards = sorted(values.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _find_nearest(
    centroids: jax.Array, rows: jax.Array, *, probes: int
) -> tuple[jax.Array, jax.Array]:
    """Clusters and cosines of a device's rows."""

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
    return clusters, cosines


def _add_rows(
    sums: tuple[jax.Array, jax.Array], rows: jax.Array, is_row: jax.Array, clusters: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A device's sums [1, k, d], in units of 2^14 and of 1, with those of its rows."""
    nearest = clusters[:, 0] if clusters.ndim > 1 else clusters
    steps = jnp.round(rows * 2.0**_BITS).astype(jnp.int32) * is_row[:, None]
    high, low = sums
    low = low.at[0, nearest].add(steps)
    return high + (low >> _BITS), low & (2**_BITS - 1)


def _total(sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The sums [k, d] of all devices."""
    high, low = (jax.lax.psum(part[0], "data") for part in sums)
    return high + (low >> _BITS), low & (2**_BITS - 1)


def all_devices() -> list[jax.Device]:
    """Of all processes."""
    return jax.devices()


def own_devices() -> list[jax.Device]:
    """Of this process."""
    return jax.local_devices()


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
        settled = before is not None and _everywhere(np.array_equal(before, clusters))
        save(centroids, iterations if settled else number + 1)
        if settled:
            break
        before = clusters
    return centroids


def _everywhere(is_true: bool) -> bool:
    """Whether it is true in all processes."""
    if jax.process_count() == 1:
        return is_true
    return bool(np.all(multihost_utils.process_allgather(np.array(is_true))))
