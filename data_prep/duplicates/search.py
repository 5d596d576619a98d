"""Search for exact copies, clusters, and near-duplicates within clusters, in the rows of all units.

Near-duplicates are found as in SemDeDup (arXiv 2303.09540, algorithm 1). The rows of a cluster are
ranked by the rule that decides which row is kept. A row is dropped if its cosine with any row of a
better rank is at least the threshold.

One process holds the numeric columns and runs k-means on its devices. Workers, local or on a
cluster, compare the rows of the clusters. Each file stores a hash of its inputs and settings
(`made_of`). A stopped search resumes from the finished k-means iterations and groups of clusters;
files of other rows or settings are not reused.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.pictures import verify
from data_prep.duplicates.rows import CAPTION, NONE, THUMBNAIL, Near, Rows
from data_prep.jobs.engine import Report, run_pending
from diht_jax.readers.array_files import read_npz_array
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy

# SemDeDup keeps the row that is farthest from the centroid.
KEEP = ("farthest", "largest", "first")

CENTROIDS, CLUSTERS, GROUPS = "centroids.npz", "clusters.npz", "groups"

_GROUP_ROWS = 50_000  # approximate number of rows per task, in whole clusters
_EXACT, _NEAR, _STAYS = range(3)

_BLOCK = 2048  # rows per matrix product: 16 MB of cosines
_AHEAD = 4  # added to the cosines of rows with equal captions, to rank them first


class Clusters(NamedTuple):
    """Rows with their nearest clusters.

    Attributes:
        rows: int64 [n], the rows to compare.
        members: int32 [n, probes], the clusters of each row, nearest first.
        cosines: float32 [n], cosine with the nearest centroid.
    """

    rows: np.ndarray
    members: np.ndarray
    cosines: np.ndarray

    def sizes(self) -> np.ndarray:
        """Number of rows per nearest cluster, int64 [k]."""
        return np.bincount(self.members[:, 0]) if len(self.rows) else np.zeros(0, np.int64)


class Found(NamedTuple):
    """All rows that repeat another row, in order.

    Attributes:
        rows: int64 [m].
        alike: int64 [m], the row that each is a copy of.
        similarity: float32 [m], 1 for an exact copy.
        kind: uint8 [m], index into `table.KINDS`, or a higher number for kept rows.
        other_caption: bool [m], whether the captions of the two rows differ.
    """

    rows: np.ndarray
    alike: np.ndarray
    similarity: np.ndarray
    kind: np.ndarray
    other_caption: np.ndarray

    def dropped(self) -> Found:
        """Returns the rows that are dropped."""
        return Found(*(column[self.kind < _STAYS] for column in self))


@dataclasses.dataclass(frozen=True)
class Group:
    """Whole clusters that one task compares.

    Attributes:
        rows: int64 [n], by cluster, and within a cluster by rank, best first.
        sizes: numbers of rows of the clusters.
    """

    source: str
    output: str
    rows: np.ndarray
    sizes: tuple[int, ...]


def find_exact(rows: Rows, *, keep_captions: bool) -> Near:
    """Matches images of equal bytes with the first one, or the first one of equal caption."""
    pictures = np.flatnonzero(rows.column("pixels") > 0)
    high, low = rows.column("content")[pictures].T
    own = np.arange(len(pictures))
    alike = _find_first_equal(high, low)
    if keep_captions:
        of_caption = _find_first_equal(high, low, rows.column(CAPTION)[pictures])
        alike = np.where(of_caption < own, of_caption, alike)
    repeats = np.flatnonzero(alike < own)
    similarity = np.ones(len(repeats), np.float32)
    return Near(pictures[repeats], pictures[alike[repeats]], similarity)


def _find_first_equal(*columns: np.ndarray) -> np.ndarray:
    """Returns, for each position, the first position with equal values in all columns."""
    order = np.lexsort(columns)  # stable: equal values stay in the order of the input
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.any([np.diff(column[order]).astype(bool) for column in columns], axis=0)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def find_clusters(
    rows: Rows, dropped: np.ndarray, config: ml_collections.ConfigDict, made_of: str
) -> Clusters:
    """Clusters all rows that have an embedding, by k-means on the devices of this process.

    Raises:
        ValueError: embeddings have different sizes.
    """
    path, c = files.join(rows.output, CLUSTERS), config.clusters
    if before := _load(path, made_of, Clusters._fields):
        return Clusters(**before)
    is_compared = rows.has_embedding()
    is_compared[dropped] = False
    chosen = np.flatnonzero(is_compared)
    if not len(chosen):
        return Clusters(chosen, np.empty((0, 1), np.int32), np.empty(0, np.float32))
    from data_prep.duplicates import kmeans  # needs JAX, which slows the start of workers

    centroids = _fit_centroids(rows, chosen, config, made_of)
    means = kmeans.KMeans(min(c.chunk_rows, len(chosen)), probes=min(c.probes, len(centroids)))
    members, cosines = means.assign(centroids, chosen, rows.embeddings)
    found = Clusters(chosen, members, np.ascontiguousarray(cosines[:, 0]))
    _save(path, made_of, **found._asdict())
    return found


def _fit_centroids(
    rows: Rows, chosen: np.ndarray, config: ml_collections.ConfigDict, made_of: str
) -> np.ndarray:
    """Fits centroids to a sample of the rows: float32 [k, d]."""
    from data_prep.duplicates import kmeans

    c, path = config.clusters, files.join(rows.output, CENTROIDS)
    count = min(c.count or max(1, round(len(chosen) / c.rows_per_cluster)), len(chosen))
    sample = chosen
    if len(chosen) > count * c.train_rows_per_cluster:
        generator = np.random.default_rng((config.seed, 1))
        size = count * c.train_rows_per_cluster
        sample = np.sort(generator.choice(chosen, size, replace=False))
    if before := _load(path, made_of, ("centroids", "done")):
        centroids, done = before["centroids"], int(before["done"])
    else:
        centroids = kmeans.choose_centroids(sample, count, rows.embeddings, config.seed)
        done = 0 if count > 1 else c.iterations - 1  # one iteration computes the mean
    logging.info("k-means: %d rows, %d clusters, %d rounds are done", len(sample), count, done)
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
    engine: str,
) -> tuple[Near, dict[str, str]]:
    """Finds near-duplicates within each cluster; also returns failed tasks with the reason."""
    folder = files.join(rows.output, GROUPS)
    files.make_folder(folder)
    groups = divide_clusters(rows, clusters, config.keep, folder)
    for name in set(files.list_names(folder)) - {os.path.basename(g.output) for g in groups}:
        files.remove(files.join(folder, name))
    parts = {group.output: _load(group.output, made_of, Near._fields) for group in groups}
    pending = [group for group in groups if parts[group.output] is None]
    settings = config.copy_and_resolve_references()
    settings.shard_timeout_secs = None  # meant for the scan
    if len(pending) == 1:
        settings.num_workers = 0  # faster than starting a worker
    function = functools.partial(compare_group, rows=rows, config=config, made_of=made_of)
    failures = run_pending(function, pending, settings, engine, label="compare")
    if failures:
        return NONE, failures
    parts |= {group.output: _load(group.output, made_of, Near._fields) for group in pending}
    missing = [path for path, part in parts.items() if part is None]
    if missing:
        return NONE, {path: "damaged or removed; run the command again" for path in missing}
    found = [Near(**part) for part in parts.values() if part is not None]
    return best_partners(found, rows.column(CAPTION)), {}


def divide_clusters(rows: Rows, clusters: Clusters, keep: str, folder: str) -> list[Group]:
    """Divides the clusters into tasks with similar numbers of rows."""
    probes = clusters.members.shape[1]
    rank = np.zeros(len(clusters.rows))  # equal ranks stay in the order of the input
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
        groups.append(
            Group(name, files.join(folder, f"{index:08d}.npz"), clusters.rows[own], of_clusters)
        )
    return groups


def compare_group(
    group: Group, report: Report, *, rows: Rows, config: ml_collections.ConfigDict, made_of: str
) -> None:
    """Finds the near-duplicates within the clusters of a group, and writes them."""
    verified, parts, start = config.verify, [NONE], 0
    count = 1 if verified.correlation is None else verified.candidates
    for size in group.sizes:
        members = group.rows[start : start + size]
        start += size
        report(size)
        if size < 2:
            continue
        captions = rows.take(CAPTION, members) if config.other_captions == "keep" else None
        candidates = find_candidates(rows.embeddings(members), config.threshold, count, captions)
        if verified.correlation is None:
            near = next(candidates)
        else:
            near = verify(
                candidates,
                rows.take(THUMBNAIL, members),
                verified.correlation,
                verified.difference,
                mirrored=config.embeddings.mirrored,
            )
        parts.append(Near(members[near.rows], members[near.alike], near.similarity))
    found = Near(*map(np.concatenate, zip(*parts, strict=True)))
    _save(group.output, made_of, **found._asdict())


def find_candidates(
    ranked: np.ndarray, threshold: float, count: int = 1, captions: np.ndarray | None = None
) -> Iterator[Near]:
    """Finds the most similar rows with a better rank, for each row of a cluster.

    Args:
        ranked: float32 [n, d], embeddings of unit length, best rank first.
        threshold: minimum cosine.
        count: maximum number of candidates per row.
        captions: [n], ids of the rows' captions; rows of equal caption come first.

    Yields:
        `count` times: the best candidate of each row that has one, then the second best, and so on.
    """
    best = np.full((len(ranked), count), -np.inf, np.float32)
    partner = np.full((len(ranked), count), -1)
    for start in range(0, len(ranked), _BLOCK):
        later = ranked[start : start + _BLOCK]
        stop = start + len(later)
        for first in range(0, stop, _BLOCK):
            cosines = later @ ranked[first : first + _BLOCK].T
            if first == start:
                cosines[~np.tri(len(later), k=-1, dtype=bool)] = -np.inf  # only earlier rows
            if captions is not None:
                is_same = captions[start:stop, None] == captions[first : first + _BLOCK]
                cosines[is_same & (cosines >= threshold)] += _AHEAD
            numbers = np.broadcast_to(np.arange(first, first + cosines.shape[1]), cosines.shape)
            best[start:stop], partner[start:stop] = _highest(
                np.concatenate([best[start:stop], cosines], axis=1),
                np.concatenate([partner[start:stop], numbers], axis=1),
                count,
            )
    for number in range(count):
        rows = np.flatnonzero(best[:, number] >= threshold)
        cosines = best[rows, number]
        yield Near(
            rows, partner[rows, number], np.where(cosines > _AHEAD / 2, cosines - _AHEAD, cosines)
        )


def _highest(values: np.ndarray, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the highest values of each row in descending order, with their numbers."""
    if count == 1:
        chosen = values.argmax(axis=1)[:, None]
    else:
        chosen = np.argpartition(-values, count - 1, axis=1)[:, :count]
        ordered = np.argsort(-np.take_along_axis(values, chosen, axis=1), axis=1, kind="stable")
        chosen = np.take_along_axis(chosen, ordered, axis=1)
    return np.take_along_axis(values, chosen, axis=1), np.take_along_axis(numbers, chosen, axis=1)


def best_partners(parts: Sequence[Near], captions: np.ndarray) -> Near:
    """Selects each row's best candidate over clusters: equal caption first, then similarity."""
    found = Near(*map(np.concatenate, zip(NONE, *parts, strict=True)))
    is_other = captions[found.rows] != captions[found.alike]
    order = np.lexsort((found.alike, -found.similarity, is_other, found.rows))
    _, first = np.unique(found.rows[order], return_index=True)
    return Near(*(column[order][first] for column in found))


def join(exact: Near, near: Near, captions: np.ndarray, *, keep_captions: bool) -> Found:
    """Merges exact copies and near-duplicates, one entry per row, sorted by row."""
    kind = np.repeat(np.array([_EXACT, _NEAR], np.uint8), [len(exact.rows), len(near.rows)])
    rows, alike, similarity = map(np.concatenate, zip(exact, near, strict=True))
    is_other = captions[rows] != captions[alike]
    if keep_captions:
        kind = np.where(is_other, np.uint8(_STAYS), kind)
    order = np.lexsort((kind, rows))  # exact copies that are kept come before near-duplicates
    _, first = np.unique(rows[order], return_index=True)
    return Found(*(c[order][first] for c in (rows, alike, similarity, kind, is_other)))


def follow_to_kept(dropped: Found, rows: np.ndarray) -> np.ndarray:
    """Follows the chain of duplicates from each of `rows` to a kept row."""
    roots, moving = rows.copy(), np.arange(len(rows))
    while len(moving):
        position = np.searchsorted(dropped.rows, roots[moving]).clip(max=len(dropped.rows) - 1)
        is_dropped = dropped.rows[position] == roots[moving]
        moving, position = moving[is_dropped], position[is_dropped]
        roots[moving] = dropped.alike[position]
    return roots


def _load(path: str, made_of: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Reads the arrays of `_save`; None if the file is damaged or `made_of` differs."""
    if not files.exists(path):
        return None
    try:
        with local_copy(path) as local:
            if str(read_npz_array(local, "made_of")) != made_of:
                return None
            return {name: read_npz_array(local, name) for name in names}
    except ValueError as error:
        logging.warning("%s: made again, since it is damaged (%s)", path, error)
        return None


def _save(path: str, made_of: str, **arrays: Any) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.savez(file, made_of=made_of, **arrays)
