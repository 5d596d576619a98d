"""What is found in the rows of all units: exact copies, clusters, and near-duplicates in them.

Each stage leaves files in the folder, and a run that was stopped goes on after them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import mapped
from data_prep.duplicates.aligned import Aligner, verify
from data_prep.duplicates.near import Near, find_candidates, rank_rows
from data_prep.duplicates.scan import Rows, Unit
from data_prep.jobs import files
from data_prep.jobs.engine import Report, run_pending
from diht_jax.data.stores import local_copy

EXACT, CENTROIDS, CLUSTERS, ORDER = "exact.npz", "centroids.npz", "clusters.npz", "order.npy"
GROUPS = "groups"

_BUCKET_ROWS = 2**24  # content hashes that are sorted at a time
_GROUP_ROWS = 50_000  # of whole clusters, in a task


NOTHING = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


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


def save(path: str, **arrays: Any) -> None:
    """Writes an .npz file, atomically."""
    with files.local_output(path) as local, open(local, "wb") as file:
        np.savez(file, **arrays)


def load(path: str) -> dict[str, np.ndarray]:
    """Reads what `save` wrote."""
    with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
        return dict(file)


def find_exact(rows: Rows, folder: str) -> dict[str, np.ndarray]:
    """Pictures of equal bytes: the first in the order of the input stays.

    Returns:
        "dropped" and "kept", int64 [m]: each dropped row, in order, and the row that stays.
    """
    path = files.join(folder, EXACT)
    if files.exists(path):
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
    rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict, folder: str
) -> dict[str, np.ndarray]:
    """Clusters of the chosen rows, by k-means on all devices.

    Returns:
        "cluster" int32 [n, probes], the nearest first, and "cosine" float32 [n], with the nearest
        centroid.
    """
    path = files.join(folder, CLUSTERS)
    if files.exists(path):
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
    state_path = files.join(folder, CENTROIDS)
    if files.exists(state_path):
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
    means = kmeans.KMeans(min(c.chunk_rows, len(chosen)), probes=min(c.probes, count))
    parts = list(means.assign(centroids, chosen, rows.embeddings))
    clusters, cosines = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = {
        "cluster": clusters.reshape(len(chosen), -1),
        "cosine": cosines.reshape(len(chosen), -1)[:, 0],
    }
    save(path, **found)
    return found


def find_all_near(
    rows: Rows,
    chosen: np.ndarray,
    clusters: dict[str, np.ndarray],
    config: ml_collections.ConfigDict,
    folder: str,
    options: dict[str, Any],
) -> tuple[Near, dict[str, str]]:
    """Near-duplicates in all clusters, by an engine.

    Returns:
        near: numbers of rows, by dropped row, each once.
        failures: groups of clusters that failed, with the reason.
    """
    where = files.join(folder, GROUPS)
    files.make_folder(where)
    # A row lies in several clusters, those whose centroids it is nearest.
    members = clusters["cluster"]
    order = np.argsort(members, axis=None, kind="stable")
    numbers = order // members.shape[1]
    columns = (chosen[numbers], clusters["cosine"][numbers])
    with files.local_output(files.join(folder, ORDER)) as path, open(path, "wb") as file:
        np.save(file, np.rec.fromarrays(columns, names="row,cosine"))
    groups = _divide(np.bincount(members.ravel()), where)
    done = set(files.list_names(where))
    pending = [group for group in groups if group.output.rpartition("/")[2] not in done]
    function = functools.partial(find_in_group, folder=folder, units=rows.units, config=config)
    failures = run_pending(function, pending, label="compare", **options)
    if failures:
        return NOTHING, failures
    parts = [load(group.output) for group in groups]
    found = Near(*(np.concatenate([part[name] for part in parts]) for name in Near._fields))
    # Of a row that was dropped in several clusters the most similar partner counts.
    by_row = np.lexsort((found.alike, -found.similarity, found.dropped))
    found = Near(*(column[by_row] for column in found))
    _, first = np.unique(found.dropped, return_index=True)
    return Near(*(column[first] for column in found)), {}


def find_in_group(
    group: Group,
    report: Report,
    *,
    folder: str,
    units: Sequence[Unit],
    config: ml_collections.ConfigDict,
) -> None:
    """Finds the near-duplicates of the clusters of a group, and writes its file."""
    cache = mapped.cache_folder(folder)
    stop = group.start + sum(group.sizes)
    path = mapped.fetch(files.join(folder, ORDER), cache)
    ordered = np.load(path, mmap_mode="r")[group.start : stop]
    numbers, cosines = np.array(ordered["row"]), np.array(ordered["cosine"])
    rows = Rows(units, cache)
    pixels = np.zeros(len(numbers), np.int64)
    if config.keep == "largest":
        pixels = rows.take("pixels", numbers)
    parts, start = [NOTHING], 0
    for size in group.sizes:
        own = slice(start, start + size)
        mine = numbers[own]
        order = rank_rows(config.keep, cosines[own], pixels[own])
        near = _find_near(rows, mine, order, config)
        parts.append(Near(mine[near.dropped], mine[near.alike], near.similarity))
        start += size
        report(size)
    columns = map(np.concatenate, zip(*parts, strict=True))
    save(group.output, **dict(zip(Near._fields, columns, strict=True)))


def _find_near(
    rows: Rows, numbers: np.ndarray, order: np.ndarray, config: ml_collections.ConfigDict
) -> Near:
    """The near-duplicates of a cluster, as positions in its rows."""
    least = config.verify.correlation
    count = 1 if least is None else config.verify.candidates
    found = find_candidates(rows.embeddings(numbers), order, config.threshold, count)
    if least is None:
        return next(found)
    aligner = Aligner(rows.greys(numbers), mirrored=config.embeddings.mirrored)
    return verify(found, aligner, least)


def _divide(sizes: np.ndarray, where: str) -> list[Group]:
    """Whole clusters into tasks of about equally many rows."""
    number = (np.cumsum(sizes) - sizes) // _GROUP_ROWS
    groups, start = [], 0
    for index in np.unique(number):
        members = np.flatnonzero(number == index)
        own = tuple(int(size) for size in sizes[members])
        name = f"clusters {members[0]} to {members[-1]}"
        output = files.join(where, f"{members[0]:08d}.npz")
        groups.append(Group(name, output, start, own))
        start += sum(own)
    return groups
