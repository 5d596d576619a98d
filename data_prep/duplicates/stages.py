"""What is found in the rows of all units: exact copies, clusters, and near-duplicates in them.

Each stage leaves files in the folder, and a run that was stopped goes on after them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.near import Near, find_near, rank_rows
from data_prep.duplicates.scan import Rows, Unit
from data_prep.jobs.engine import Report, run_pending
from diht_jax.data.atomic_file import open_atomically

EXACT, CENTROIDS, CLUSTERS, ORDER = "exact.npz", "centroids.npz", "clusters.npz", "order.npy"
GROUPS = "groups"

_BUCKET_ROWS = 2**24  # content hashes that are sorted at a time
_GROUP_ROWS = 50_000  # of whole clusters, in a task


@dataclasses.dataclass(frozen=True)
class Group:
    """Whole clusters that one task looks at.

    Attributes:
        source: what it is called in messages.
        output: path of its file.
        start: of its rows in the order of the clusters.
        sizes: of its clusters.
    """

    source: str
    output: str
    start: int
    sizes: tuple[int, ...]


def save(path: pathlib.Path, **arrays: Any) -> None:
    """Writes an .npz file, atomically."""
    with open_atomically(path) as file:
        np.savez(file, **arrays)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def find_exact(rows: Rows, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Pictures of equal bytes: the first in the order of the input stays.

    Returns:
        "dropped" and "kept", int64 [m]: each dropped row, in order, and the row that stays.
    """
    path = folder / EXACT
    if path.exists():
        return load(path)
    buckets = max(1, len(rows) // _BUCKET_ROWS)
    dropped, kept = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for bucket in range(buckets):
        parts = [_hashes_of(rows, unit, bucket, buckets) for unit in range(len(rows.units))]
        high, low, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((numbers, low, high))
        high, low, numbers = high[order], low[order], numbers[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        first = numbers[is_first][np.cumsum(is_first) - 1]
        dropped.append(numbers[~is_first])
        kept.append(first[~is_first])
    found = {"dropped": np.concatenate(dropped), "kept": np.concatenate(kept)}
    order = np.argsort(found["dropped"])
    found = {name: values[order] for name, values in found.items()}
    save(path, **found)
    return found


def _hashes_of(
    rows: Rows, unit: int, bucket: int, buckets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both halves of the content hashes in a bucket, and their rows; without pictures: none."""
    high, low = rows.unit_column(unit, "high"), rows.unit_column(unit, "low")
    number = (high >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)
    chosen = np.flatnonzero((number == bucket) & (rows.unit_column(unit, "pixels") > 0))
    return high[chosen], low[chosen], chosen + rows.starts[unit]


def rows_to_compare(rows: Rows, exact_dropped: np.ndarray) -> np.ndarray:
    """int64 [n]: rows with an embedding that are no exact copies."""
    has = [rows.unit_has_embedding(unit) for unit in range(len(rows.units))]
    wanted = np.concatenate([np.zeros(0, bool), *has])
    wanted[exact_dropped] = False
    return np.flatnonzero(wanted)


def make_clusters(
    rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict, folder: pathlib.Path
) -> dict[str, np.ndarray]:
    """Clusters of the chosen rows, by k-means on all devices.

    Returns:
        "cluster" int32 [n] and "cosine" float32 [n], with the centroid.
    """
    path = folder / CLUSTERS
    if path.exists():
        return load(path)
    from data_prep.duplicates import kmeans

    c = config.clusters
    count = c.count or max(1, round(len(chosen) / c.rows_per_cluster))
    count = min(count, len(chosen))
    means = kmeans.KMeans(min(c.chunk_rows, len(chosen)))
    sample = chosen
    if len(chosen) > count * c.train_rows_per_cluster:
        size = count * c.train_rows_per_cluster
        generator = np.random.default_rng((config.seed, 1))
        sample = np.sort(generator.choice(chosen, size, replace=False))
    state_path = folder / CENTROIDS
    if state_path.exists():
        state = load(state_path)
        centroids, done = state["centroids"], int(state["done"])
    else:
        centroids = kmeans.choose_centroids(sample, count, rows.embeddings, config.seed)
        done = 0 if count > 1 else c.iterations - 1  # the mean, at once
    logging.info("k-means: %d rows, %d clusters, %d rounds done before", len(sample), count, done)
    centroids = kmeans.fit(
        means,
        centroids,
        sample,
        rows.embeddings,
        iterations=c.iterations,
        done=done,
        save=lambda centroids, done: save(state_path, centroids=centroids, done=done),
    )
    parts = list(means.assign(centroids, chosen, rows.embeddings))
    found = {
        "cluster": np.concatenate([cluster for cluster, _ in parts]),
        "cosine": np.concatenate([cosine for _, cosine in parts]),
    }
    save(path, **found)
    return found


def find_all_near(
    rows: Rows,
    chosen: np.ndarray,
    clusters: dict[str, np.ndarray],
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
) -> tuple[Near, dict[str, str]]:
    """Near-duplicates in all clusters, in worker processes.

    Returns:
        near: numbers of rows, by dropped row.
        failures: groups of clusters that failed, with the reason.
    """
    (folder / GROUPS).mkdir(exist_ok=True)
    order = np.argsort(clusters["cluster"], kind="stable")
    columns = (chosen[order], clusters["cosine"][order])
    with open_atomically(folder / ORDER) as file:
        np.save(file, np.rec.fromarrays(columns, names="row,cosine"))
    groups = _divide(np.bincount(clusters["cluster"]), folder)
    pending = [group for group in groups if not pathlib.Path(group.output).exists()]
    function = functools.partial(find_in_group, folder=folder, units=rows.units, config=config)
    failures = run_pending(
        function,
        pending,
        num_workers=config.num_workers,
        retries=config.retries,
        label="compare",
    )
    if failures:
        return Near(*(np.empty(0, np.int64) for _ in range(4))), failures
    parts = [load(pathlib.Path(group.output)) for group in groups]
    found = [np.concatenate([part[name] for part in parts]) for name in Near._fields]
    by_row = np.argsort(found[0])
    return Near(*(column[by_row] for column in found)), {}


def find_in_group(
    group: Group,
    report: Report,
    *,
    folder: pathlib.Path,
    units: Sequence[Unit],
    config: ml_collections.ConfigDict,
) -> None:
    """Finds the near-duplicates of the clusters of a group, and writes its file."""
    stop = group.start + sum(group.sizes)
    ordered = np.load(folder / ORDER, mmap_mode="r")[group.start : stop]
    numbers, cosines = np.array(ordered["row"]), np.array(ordered["cosine"])
    rows = Rows(units)
    embeddings = rows.embeddings(numbers)
    pixels = np.zeros(len(numbers), np.int64)
    if config.keep == "largest":
        pixels = rows.take("pixels", numbers)
    parts, start = [], 0
    for size in group.sizes:
        own = slice(start, start + size)
        order = rank_rows(config.keep, cosines[own], pixels[own])
        near = find_near(embeddings[own], order, config.threshold)
        mine = numbers[own]
        parts.append(Near(mine[near.dropped], mine[near.alike], mine[near.root], near.cosine))
        start += size
        report(size)
    columns = map(np.concatenate, zip(*parts, strict=True))
    save(pathlib.Path(group.output), **dict(zip(Near._fields, columns, strict=True)))


def _divide(sizes: np.ndarray, folder: pathlib.Path) -> list[Group]:
    """Whole clusters into tasks of about equally many rows."""
    number = (np.cumsum(sizes) - sizes) // _GROUP_ROWS
    groups, start = [], 0
    for index in np.unique(number):
        members = np.flatnonzero(number == index)
        own = tuple(int(size) for size in sizes[members])
        name = f"clusters {members[0]} to {members[-1]}"
        output = str(folder / GROUPS / f"{members[0]:08d}.npz")
        groups.append(Group(name, output, start, own))
        start += sum(own)
    return groups
