"""Search for duplicates in the rows of all units: exact copies, clusters, near-duplicates in them.

Near-duplicates are found as by SemDeDup (arXiv 2303.09540, algorithm 1): the rows of a cluster come
ranked by the rule that says which one stays; a row is dropped when its cosine with any row of a
better rank is at least the threshold.

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

_GROUP_ROWS = 50_000  # of whole clusters, in a task
_EXACT, _NEAR, _STAYS = range(3)

_BLOCK = 2048  # rows of a product: 16 MB of cosines
_AHEAD = 4  # that cosines of rows of one caption get, so that they are above all others


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
    """All rows that repeat another one, in their order.

    Attributes:
        rows: int64 [m].
        alike: int64 [m], the row that each is a copy of.
        similarity: float32 [m], 1 for an exact copy.
        kind: uint8 [m], a position in `table.KINDS`; behind them: it stays, for its caption.
        other_caption: bool [m], whether its caption is another one.
    """

    rows: np.ndarray
    alike: np.ndarray
    similarity: np.ndarray
    kind: np.ndarray
    other_caption: np.ndarray

    def dropped(self) -> Found:
        """Those that do not stay."""
        return Found(*(column[self.kind < _STAYS] for column in self))


@dataclasses.dataclass(frozen=True)
class Group:
    """Whole clusters that a task compares.

    Attributes:
        rows: int64 [n], by cluster, and in a cluster the one that stays first.
        sizes: of its clusters.
    """

    source: str
    output: str
    rows: np.ndarray
    sizes: tuple[int, ...]


def find_exact(rows: Rows, *, keep_captions: bool) -> Near:
    """Pictures of equal bytes, each with the first one, or the first one of the same caption."""
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
    """The first position of equal values in all columns, for each position."""
    order = np.lexsort(columns)  # equal ones stay in the order of the input
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.any([np.diff(column[order]).astype(bool) for column in columns], axis=0)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def find_clusters(
    rows: Rows, dropped: np.ndarray, config: ml_collections.ConfigDict, made_of: str
) -> Clusters:
    """Clusters of all rows with an embedding, by k-means on the devices of this process.

    Raises:
        ValueError: embeddings of several sizes.
    """
    path, c = files.join(rows.output, CLUSTERS), config.clusters
    if before := _load(path, made_of, Clusters._fields):
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
    if before := _load(path, made_of, ("centroids", "done")):
        centroids, done = before["centroids"], int(before["done"])
    else:
        centroids = kmeans.choose_centroids(sample, count, rows.embeddings, config.seed)
        done = 0 if count > 1 else c.iterations - 1  # the mean, at once
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
    """Near-duplicates within each cluster, and tasks that failed, with the reason."""
    folder = files.join(rows.output, GROUPS)
    files.make_folder(folder)
    groups = divide_clusters(rows, clusters, config.keep, folder)
    for name in set(files.list_names(folder)) - {os.path.basename(g.output) for g in groups}:
        files.remove(files.join(folder, name))
    parts = {group.output: _load(group.output, made_of, Near._fields) for group in groups}
    pending = [group for group in groups if parts[group.output] is None]
    settings = config.copy_and_resolve_references()
    settings.shard_timeout_secs = None  # that is of a scan
    if len(pending) == 1:
        settings.num_workers = 0  # sooner done than a worker has started
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
    """Divides whole clusters into tasks of about equally many rows."""
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
        groups.append(
            Group(name, files.join(folder, f"{index:08d}.npz"), clusters.rows[own], of_clusters)
        )
    return groups


def compare_group(
    group: Group, report: Report, *, rows: Rows, config: ml_collections.ConfigDict, made_of: str
) -> None:
    """Writes the near-duplicates of the clusters of a group."""
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
    """Finds the rows of a better rank that each row of a cluster is most alike.

    Args:
        ranked: float32 [n, d], embeddings of unit length, the row that stays first.
        threshold: least cosine.
        count: of them for each row, at most.
        captions: [n], numbers of the rows' captions: rows of the same one come first.

    Yields:
        `count` times: the best partner of each row that has one, then the second best, and so on.
    """
    best = np.full((len(ranked), count), -np.inf, np.float32)
    partner = np.full((len(ranked), count), -1)
    for start in range(0, len(ranked), _BLOCK):
        later = ranked[start : start + _BLOCK]
        stop = start + len(later)
        for first in range(0, stop, _BLOCK):
            cosines = later @ ranked[first : first + _BLOCK].T
            if first == start:
                cosines[~np.tri(len(later), k=-1, dtype=bool)] = -np.inf  # only rows before a row
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
    """The highest values of each row, and their numbers, the highest first."""
    if count == 1:
        chosen = values.argmax(axis=1)[:, None]
    else:
        chosen = np.argpartition(-values, count - 1, axis=1)[:, :count]
        ordered = np.argsort(-np.take_along_axis(values, chosen, axis=1), axis=1, kind="stable")
        chosen = np.take_along_axis(chosen, ordered, axis=1)
    return np.take_along_axis(values, chosen, axis=1), np.take_along_axis(numbers, chosen, axis=1)


def best_partners(parts: Sequence[Near], captions: np.ndarray) -> Near:
    """The best partner of each row of several clusters: of its caption, then the most similar."""
    found = Near(*map(np.concatenate, zip(NONE, *parts, strict=True)))
    is_other = captions[found.rows] != captions[found.alike]
    order = np.lexsort((found.alike, -found.similarity, is_other, found.rows))
    _, first = np.unique(found.rows[order], return_index=True)
    return Near(*(column[order][first] for column in found))


def join(exact: Near, near: Near, captions: np.ndarray, *, keep_captions: bool) -> Found:
    """Exact copies and near-duplicates, by their row, each once."""
    kind = np.repeat(np.array([_EXACT, _NEAR], np.uint8), [len(exact.rows), len(near.rows)])
    rows, alike, similarity = map(np.concatenate, zip(exact, near, strict=True))
    is_other = captions[rows] != captions[alike]
    if keep_captions:
        kind = np.where(is_other, np.uint8(_STAYS), kind)
    order = np.lexsort((kind, rows))  # exact copies that stay come before near ones
    _, first = np.unique(rows[order], return_index=True)
    return Found(*(c[order][first] for c in (rows, alike, similarity, kind, is_other)))


def follow_to_kept(dropped: Found, rows: np.ndarray) -> np.ndarray:
    """The kept row at the end of the chain of duplicates that begins at each of some rows."""
    roots, moving = rows.copy(), np.arange(len(rows))
    while len(moving):
        position = np.searchsorted(dropped.rows, roots[moving]).clip(max=len(dropped.rows) - 1)
        is_dropped = dropped.rows[position] == roots[moving]
        moving, position = moving[is_dropped], position[is_dropped]
        roots[moving] = dropped.alike[position]
    return roots


def _load(path: str, made_of: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Reads what `_save` wrote; None where it is damaged or was made of something else."""
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
