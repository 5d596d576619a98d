"""Search for duplicates in the rows of all units: exact copies, clusters, near-duplicates in them.

One process holds the columns of numbers and has the devices for k-means; the clusters are compared
by workers, of this machine or of a cluster. Each file states what it was made of (`made_of`), so
that a search that was stopped goes on from the round of k-means, and from the groups of clusters,
that were done, and a search of other rows or settings takes nothing over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.pictures import verify
from data_prep.duplicates.rows import THUMBNAIL, Rows, open_columns, write_columns
from data_prep.duplicates.semdedup import Near, best_partners, find_candidates
from data_prep.jobs.engine import Report, run_pending
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy

CENTROIDS, CLUSTERS, GROUPS = "centroids.npz", "clusters.npz", "groups"

NONE = best_partners([])

_GROUP_ROWS = 50_000  # of whole clusters, in a task


class Clusters(NamedTuple):
    """Rows in the clusters whose centroids they are nearest.

    Attributes:
        rows: int64 [n], those that are compared.
        members: int32 [n, probes], the clusters of each, the nearest first.
        cosines: float32 [n], with the nearest centroid.
    """

    rows: np.ndarray
    members: np.ndarray
    cosines: np.ndarray

    def sizes(self) -> np.ndarray:
        """int64 [k]: rows of each cluster that it is the nearest of."""
        return np.bincount(self.members[:, 0]) if len(self.rows) else np.zeros(0, np.int64)


class Found(NamedTuple):
    """All duplicates, by their row.

    Attributes:
        dropped: int64 [m].
        alike: int64 [m], the row that each is a copy of.
        similarity: float32 [m], 1 for an exact copy.
        kind: uint8 [m], a position in `table.KINDS`.
    """

    dropped: np.ndarray
    alike: np.ndarray
    similarity: np.ndarray
    kind: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Whole clusters that a task compares.

    Attributes:
        source: what it is called in messages.
        output: path of its file.
        rows: int64 [n], by cluster, and in a cluster the one that stays first.
        sizes: of its clusters.
    """

    source: str
    output: str
    rows: np.ndarray
    sizes: tuple[int, ...]


def find_exact(rows: Rows) -> Near:
    """Pictures of equal bytes: the first one of the input stays."""
    high, low = rows.column("content").T
    is_picture = rows.column("pixels") > 0
    order = np.lexsort((low, high))  # equal ones stay in the order of the input
    order = order[is_picture[order]]
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(high[order]).astype(bool) | np.diff(low[order]).astype(bool)
    first = order[is_first][np.cumsum(is_first) - 1]
    dropped = order[~is_first]
    return Near(dropped, first[~is_first], np.ones(len(dropped), np.float32))


def find_clusters(
    rows: Rows, dropped: np.ndarray, config: ml_collections.ConfigDict, made_of: str
) -> Clusters:
    """Clusters of all rows with an embedding, by k-means on the devices of this process.

    Args:
        rows: of all units.
        dropped: int64 [m], rows that are left out.
        config: of `duplicates.config.default_config`.
        made_of: stands for the rows and the settings.

    Raises:
        ValueError: embeddings of several sizes.
    """
    path, c = files.join(rows.output, CLUSTERS), config.clusters
    if before := _load(path, made_of):
        return Clusters(**before)
    is_compared = rows.has_embedding()
    is_compared[dropped] = False
    chosen = np.flatnonzero(is_compared)
    if not len(chosen):
        return Clusters(chosen, np.empty((0, 1), np.int32), np.empty(0, np.float32))
    from data_prep.duplicates import kmeans  # it needs JAX, which no worker should wait for

    centroids = _fit_centroids(rows, chosen, config, made_of)
    means = kmeans.KMeans(min(c.chunk_rows, len(chosen)), probes=min(c.probes, len(centroids)))
    members, cosines = means.assign(centroids, chosen, rows.embeddings)
    found = Clusters(chosen, members, np.ascontiguousarray(cosines[:, 0]))
    _save(path, made_of, **found._asdict())
    return found


def _fit_centroids(
    rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict, made_of: str
) -> np.ndarray:
    """Centroids of a sample of the rows: float32 [k, d]."""
    from data_prep.duplicates import kmeans

    c, path = config.clusters, files.join(rows.output, CENTROIDS)
    count = min(c.count or max(1, round(len(chosen) / c.rows_per_cluster)), len(chosen))
    sample = chosen
    if len(chosen) > count * c.train_rows_per_cluster:
        generator = np.random.default_rng((config.seed, 1))
        size = count * c.train_rows_per_cluster
        sample = np.sort(generator.choice(chosen, size, replace=False))
    if before := _load(path, made_of):
        centroids, done = before["centroids"], int(before["done"])
    else:
        centroids = kmeans.choose_centroids(sample, count, rows.embeddings, config.seed)
        done = 0 if count > 1 else c.iterations - 1  # the mean, at once
    logging.info("k-means: %d rows, %d clusters, %d rounds done before", len(sample), count, done)
    return kmeans.fit(
        kmeans.KMeans(min(c.chunk_rows, len(sample))),
        centroids,
        sample,
        rows.embeddings,
        iterations=c.iterations,
        done=done,
        save=lambda centroids, done: _save(path, made_of, centroids=centroids, done=done),
    )


def compare_clusters(
    rows: Rows,
    clusters: Clusters,
    config: ml_collections.ConfigDict,
    made_of: str,
    options: Mapping[str, Any],
) -> tuple[Near, dict[str, str]]:
    """Near-duplicates within each cluster, and tasks that failed, with the reason.

    Args:
        rows: of all units.
        clusters: of `find_clusters`.
        config: of `duplicates.config.default_config`.
        made_of: stands for the clusters and the settings.
        options: keywords of `run_pending`.
    """
    folder = files.join(rows.output, GROUPS)
    files.make_folder(folder)
    groups = divide_clusters(
        rows, clusters, config.keep, lambda name: files.join(folder, made_of + name)
    )
    names, present = {os.path.basename(group.output) for group in groups}, files.list_names(folder)
    for name in set(present) - names:
        files.remove(files.join(folder, name))
    pending = [group for group in groups if os.path.basename(group.output) not in present]
    options = dict(options)
    if len(pending) == 1 and options["ray"] is None:
        options["num_workers"] = 0  # sooner done than a worker has started
    function = functools.partial(compare_group, rows=rows, config=config)
    failures = run_pending(function, pending, label="compare", **options)
    if failures:
        return NONE, failures
    parts = [open_columns(group.output, rows.output) for group in groups]
    return best_partners([Near(**part) for part in parts]), {}


def divide_clusters(
    rows: Rows, clusters: Clusters, keep: str, path: Callable[[str], str]
) -> list[Group]:
    """Divides whole clusters into tasks of about equally many rows.

    Args:
        rows: of all units.
        clusters: of `find_clusters`.
        keep: one of `semdedup.KEEP`; it ranks the rows of a cluster.
        path: end of a file's name -> path of the file.
    """
    probes = clusters.members.shape[1]
    rank = np.zeros(len(clusters.rows))  # equal ones stay in the order of the input
    if keep == "farthest":
        rank = clusters.cosines
    elif keep == "largest":
        rank = -rows.column("pixels")[clusters.rows]
    order = np.lexsort((np.repeat(rank, probes), clusters.members.ravel()))
    sizes = np.bincount(clusters.members.ravel())
    ends = np.cumsum(sizes)
    numbers = (ends - sizes) // _GROUP_ROWS
    edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(sizes)]
    groups = []
    for index, (first, last) in enumerate(itertools.pairwise(edges)):
        own = order[ends[first] - sizes[first] : ends[last - 1]] // probes
        name, of_clusters = f"clusters {first} to {last - 1}", tuple(sizes[first:last].tolist())
        groups.append(Group(name, path(f"-{index:08d}.arrow"), clusters.rows[own], of_clusters))
    return groups


def compare_group(
    group: Group, report: Report, *, rows: Rows, config: ml_collections.ConfigDict
) -> None:
    """Writes the near-duplicates of the clusters of a group."""
    least, parts, start = config.verify.correlation, [], 0
    count = 1 if least is None else config.verify.candidates
    for size in group.sizes:
        members = group.rows[start : start + size]
        start += size
        report(size)
        if size < 2:
            continue
        candidates = find_candidates(rows.embeddings(members), config.threshold, count)
        if least is None:
            near = next(candidates)
        else:
            thumbnails, mirrored = rows.take(THUMBNAIL, members), config.embeddings.mirrored
            near = verify(candidates, thumbnails, least, mirrored=mirrored)
        parts.append(Near(members[near.dropped], members[near.alike], near.similarity))
    write_columns(group.output, best_partners(parts)._asdict())


def join(exact: Near, near: Near) -> Found:
    """Exact copies and near-duplicates, by their row."""
    kinds = np.repeat(np.array([0, 1], np.uint8), [len(exact.dropped), len(near.dropped)])
    columns = (*map(np.concatenate, zip(exact, near, strict=True)), kinds)
    order = np.argsort(columns[0])
    return Found(*(column[order] for column in columns))


def follow_to_kept(found: Found, rows: np.ndarray) -> np.ndarray:
    """The kept row at the end of the chain of duplicates that begins at each of some rows."""
    roots, moving = rows.copy(), np.arange(len(rows))
    while len(moving):
        position = np.searchsorted(found.dropped, roots[moving]).clip(max=len(found.dropped) - 1)
        is_dropped = found.dropped[position] == roots[moving]
        moving, position = moving[is_dropped], position[is_dropped]
        roots[moving] = found.alike[position]
    return roots


def _load(path: str, made_of: str) -> dict[str, np.ndarray] | None:
    """Reads what `_save` wrote; None where it was made of something else."""
    if not files.exists(path):
        return None
    with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
        found = dict(file)
    return found if str(found.pop("made_of", "")) == made_of else None


def _save(path: str, made_of: str, **arrays: Any) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.savez(file, made_of=made_of, **arrays)
