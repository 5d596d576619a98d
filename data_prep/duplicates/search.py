"""Search for duplicates in the rows of all units: exact copies, clusters, near-duplicates in them.

One process holds the columns of numbers and has the devices for k-means; the clusters are compared
by workers, of this machine or of a cluster. A search that was stopped goes on from the round of
k-means, and from the groups of clusters, that were done.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.pictures import Aligner, verify
from data_prep.duplicates.rows import Rows, open_columns, write_columns
from data_prep.duplicates.semdedup import Near, best_partners, find_candidates, rank_rows
from data_prep.jobs.engine import Report, run_pending
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy

CENTROIDS, CLUSTERS, GROUPS = "centroids.npz", "clusters.npz", "groups"

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
        rows: int64 [n], by cluster.
        cosines: float32 [n], with the nearest centroid.
        pixels: int64 [n], of the pictures; 0 where that does not decide which one stays.
        sizes: of its clusters.
    """

    source: str
    output: str
    rows: np.ndarray
    cosines: np.ndarray
    pixels: np.ndarray
    sizes: tuple[int, ...]


def find_duplicates(
    rows: Rows, config: ml_collections.ConfigDict, options: Mapping[str, Any]
) -> tuple[Found, Clusters, dict[str, str]]:
    """Runs all stages.

    Args:
        rows: of all units.
        config: of `duplicates.config.default_config`.
        options: keywords of `run_pending`.

    Returns:
        The duplicates, the clusters, and tasks that failed, with the reason.

    Raises:
        ValueError: embeddings of several sizes.
    """
    dropped = kept = np.empty(0, np.int64)
    if config.exact and config.input is not None:
        dropped, kept = find_exact(rows)
    is_compared = rows.has_embedding()
    is_compared[dropped] = False
    clusters = find_clusters(rows, np.flatnonzero(is_compared), config)
    near, failures = compare_clusters(rows, clusters, config, options)
    found = Found(
        np.concatenate([dropped, near.dropped]),
        np.concatenate([kept, near.alike]),
        np.concatenate([np.ones(len(dropped), np.float32), near.similarity]),
        np.repeat(np.array([0, 1], np.uint8), [len(dropped), len(near.dropped)]),
    )
    order = np.argsort(found.dropped)
    return Found(*(column[order] for column in found)), clusters, failures


def find_exact(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of equal bytes: the first one of the input stays.

    Returns:
        int64 [m] and int64 [m]: the dropped rows, and for each the row that stays.
    """
    high, low = rows.column("high"), rows.column("low")
    is_picture = rows.column("pixels") > 0
    order = np.lexsort((low, high))  # equal ones stay in the order of the input
    order = order[is_picture[order]]
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(high[order]).astype(bool) | np.diff(low[order]).astype(bool)
    first = order[is_first][np.cumsum(is_first) - 1]
    return order[~is_first], first[~is_first]


def find_clusters(rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict) -> Clusters:
    """Clusters of some rows, by k-means on the devices of this process.

    Args:
        rows: of all units.
        chosen: int64 [n], with embeddings.
        config: of `duplicates.config.default_config`.
    """
    path, c = files.join(rows.output, CLUSTERS), config.clusters
    if files.exists(path):
        return Clusters(**_load(path))
    if not len(chosen):
        return Clusters(chosen, np.empty((0, 1), np.int32), np.empty(0, np.float32))
    from data_prep.duplicates import kmeans  # it needs JAX, which no worker should wait for

    centroids = _make_centroids(rows, chosen, config)
    means = kmeans.KMeans(min(c.chunk_rows, len(chosen)), probes=min(c.probes, len(centroids)))
    parts = list(means.assign(centroids, chosen, rows.embeddings))
    members, cosines = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = Clusters(chosen, members, np.ascontiguousarray(cosines[:, 0]))
    _save(path, found._asdict())
    return found


def _make_centroids(
    rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict
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
    if files.exists(path):
        state = _load(path)
        centroids, done = state["centroids"], int(state["done"])
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
        save=lambda centroids, done: _save(path, {"centroids": centroids, "done": done}),
    )


def compare_clusters(
    rows: Rows,
    clusters: Clusters,
    config: ml_collections.ConfigDict,
    options: Mapping[str, Any],
) -> tuple[Near, dict[str, str]]:
    """Near-duplicates within each cluster, and tasks that failed, with the reason."""
    folder = files.join(rows.output, GROUPS)
    files.make_folder(folder)
    pixels = np.zeros(len(clusters.rows), np.int64)
    if config.keep == "largest":
        pixels = rows.column("pixels")[clusters.rows]
    groups = _divide(clusters, pixels, folder)
    done = set(files.list_names(folder))
    pending = [group for group in groups if os.path.basename(group.output) not in done]
    options = dict(options)
    if len(pending) == 1 and options["ray"] is None:
        options["num_workers"] = 0  # sooner done than a worker has started
    function = functools.partial(find_in_group, rows=rows, config=config)
    failures = run_pending(function, pending, label="compare", **options)
    if failures:
        return best_partners([]), failures
    parts = [open_columns(group.output, rows.output) for group in groups]
    return best_partners([Near(**part) for part in parts]), {}


def _divide(clusters: Clusters, pixels: np.ndarray, folder: str) -> list[Group]:
    """Divides whole clusters into tasks of about equally many rows."""
    probes = clusters.members.shape[1]
    order = np.argsort(clusters.members, axis=None, kind="stable")
    sizes = np.bincount(clusters.members.ravel())
    numbers = (np.cumsum(sizes) - sizes) // _GROUP_ROWS
    edges = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    groups, start = [], 0
    for index, (first, last) in enumerate(zip(edges, [*edges[1:], len(sizes)], strict=True)):
        stop = start + int(sizes[first:last].sum())
        own = order[start:stop] // probes
        groups.append(
            Group(
                source=f"clusters {first} to {last - 1}",
                output=files.join(folder, f"{index:08d}.arrow"),
                rows=clusters.rows[own],
                cosines=clusters.cosines[own],
                pixels=pixels[own],
                sizes=tuple(sizes[first:last].tolist()),
            )
        )
        start = stop
    return groups


def find_in_group(
    group: Group, report: Report, *, rows: Rows, config: ml_collections.ConfigDict
) -> None:
    """Writes the near-duplicates of the clusters of a group."""
    parts, start = [], 0
    for size in group.sizes:
        own = slice(start, start + size)
        order = rank_rows(config.keep, group.cosines[own], group.pixels[own])
        near = _find_near(rows, group.rows[own], order, config)
        members = group.rows[own]
        parts.append(Near(members[near.dropped], members[near.alike], near.similarity))
        start += size
        report(size)
    write_columns(group.output, best_partners(parts)._asdict())


def _find_near(
    rows: Rows, members: np.ndarray, order: np.ndarray, config: ml_collections.ConfigDict
) -> Near:
    """The near-duplicates of a cluster, as positions in its rows."""
    least = config.verify.correlation
    count = 1 if least is None else config.verify.candidates
    found = find_candidates(rows.embeddings(members), order, config.threshold, count)
    if least is None:
        return next(found)
    aligner = Aligner(rows.greys(members), mirrored=config.embeddings.mirrored)
    return verify(found, aligner, least)


def follow_to_kept(found: Found, rows: np.ndarray) -> np.ndarray:
    """The kept row at the end of the chain of duplicates that begins at each of some rows."""
    roots, moving = rows.copy(), np.arange(len(rows))
    while len(moving):
        position = np.searchsorted(found.dropped, roots[moving]).clip(max=len(found.dropped) - 1)
        is_dropped = found.dropped[position] == roots[moving]
        moving, position = moving[is_dropped], position[is_dropped]
        roots[moving] = found.alike[position]
    return roots


def _load(path: str) -> dict[str, np.ndarray]:
    with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
        return dict(file)


def _save(path: str, arrays: Mapping[str, Any]) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.savez(file, **arrays)
