"""What is found in the rows of all units: exact copies, clusters, and near-duplicates in them.

Each stage is a list of tasks, and what a task holds does not grow with the input:

    exact      equal content hashes, a range of the hashes in each task
    rows       those of a block of units that are compared
    clusters   of the rows of a block, sorted by cluster; the centroids are made before
    groups     near-duplicates in whole clusters
    partial    those of some groups, sorted by row
    found      exact copies and near-duplicates of a block

Files are sorted and mapped into memory, so that a task of the next stage reads its own range of
each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from data_prep.duplicates import mapped
from data_prep.duplicates.aligned import Aligner, verify
from data_prep.duplicates.near import Near, find_candidates, rank_rows
from data_prep.duplicates.search import Processes, Search, Task, file_name, rows_between
from data_prep.duplicates.table import bucket_of
from data_prep.jobs.engine import Report
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy

EXACT, ROWS, CLUSTERS, GROUPS, PARTIAL, FOUND = (
    "exact", "rows", "clusters", "groups", "partial", "found",
)  # fmt: skip
CENTROIDS = "centroids.npz"
# Beside the rows by cluster: where each cluster begins and how many rows it is nearest, and the
# nearest cluster of each row.
_EDGES, _NEAREST = ".edges", ".nearest"

HASHES_AT_ONCE = 2**24  # that are sorted by a task
_GROUP_ROWS = 50_000  # of whole clusters, in a task
_GROUPS_AT_ONCE = 64  # whose results are sorted by a task

NOTHING = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclasses.dataclass(frozen=True)
class Group(Task):
    """Whole clusters, from `start` to `stop`.

    Attributes:
        sizes: of its clusters.
    """

    sizes: tuple[int, ...] = ()


def find_all(search: Search, processes: Processes) -> None:
    """Runs all stages.

    Args:
        search: whose units are scanned.
        processes: that share it.

    Raises:
        StageFailedError: of `Processes.run`.
        ValueError: embeddings of several sizes.
    """
    config = search.config

    def run(function: Any, tasks: Sequence[Task], label: str, **engine: Any) -> None:
        processes.run(functools.partial(function, search=search), tasks, label, **engine)

    exact = []
    if config.exact and config.input is not None:
        exact = search.tasks(EXACT, max(1, int(search.starts[-1]) // HASHES_AT_ONCE))
    run(functools.partial(find_exact, buckets=len(exact)), exact, "equal bytes")
    blocks = search.block_tasks
    run(functools.partial(choose_rows, exact=len(exact)), blocks(ROWS), "choose")
    groups: list[Group] = []
    count = sum(len(search.open(ROWS, task.number)["row"]) for task in blocks(ROWS))
    if count:
        centroids = make_centroids(search, processes, count)
        function = functools.partial(find_clusters, centroids=centroids)
        # Only this process has the devices.
        run(function, blocks(CLUSTERS), "clusters", num_workers=0, ray=None)
        groups = _divide(search, len(centroids))
    run(find_in_group, groups, "compare")
    partial = search.tasks(PARTIAL, -(-len(groups) // _GROUPS_AT_ONCE))
    names = [group.output for group in groups]
    run(functools.partial(merge_groups, groups=names), partial, "merge")
    function = functools.partial(merge_block, exact=len(exact), partial=len(partial))
    run(function, blocks(FOUND), "merge")


def find_exact(task: Task, report: Report, *, search: Search, buckets: int) -> None:
    """Pictures of equal bytes, of a range of content hashes: the first one of the input stays.

    Writes "dropped" and "kept", int64 [m]: each dropped row, in order, and the row that stays.
    """
    parts = [_hashes_of(search, unit, task.number, buckets) for unit in range(len(search.units))]
    high, low, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((numbers, low, high))
    high, low, numbers = high[order], low[order], numbers[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = numbers[is_first][np.cumsum(is_first) - 1]
    dropped, kept = numbers[~is_first], first[~is_first]
    order = np.argsort(dropped)
    mapped.write_columns(task.output, {"dropped": dropped[order], "kept": kept[order]})


def _hashes_of(
    search: Search, unit: int, bucket: int, buckets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both halves of the content hashes in a bucket, and their rows; without pictures: none."""
    rows = search.rows
    high, low = rows.unit_column(unit, "high"), rows.unit_column(unit, "low")
    is_chosen = (bucket_of(high, buckets) == bucket) & (rows.unit_column(unit, "pixels") > 0)
    chosen = np.flatnonzero(is_chosen)
    return high[chosen], low[chosen], chosen + rows.starts[unit]


def choose_rows(task: Task, report: Report, *, search: Search, exact: int) -> None:
    """Rows of a block with an embedding that are no exact copies: "row", int64 [n]."""
    units = range(*search.blocks[task.number])
    has = [search.rows.unit_has_embedding(unit) for unit in units]
    wanted = np.concatenate([np.zeros(0, bool), *has])
    for columns in _between(search, EXACT, exact, task):
        wanted[columns["dropped"] - task.start] = False
    mapped.write_columns(task.output, {"row": np.flatnonzero(wanted) + task.start})


def _between(search: Search, stage: str, count: int, task: Task) -> list[dict[str, np.ndarray]]:
    """Of the files of a stage, sorted by "dropped", the part of the rows of a block."""
    found = []
    for number in range(count):
        columns = search.open(stage, number)
        own = rows_between(columns, "dropped", task.start, task.stop)
        found.append({name: column[own] for name, column in columns.items()})
    return found


def make_centroids(search: Search, processes: Processes, count: int) -> np.ndarray:
    """k-means on the devices of all processes: float32 [k, d].

    Args:
        search: with the stage `ROWS`.
        processes: that share it.
        count: of the rows to cluster.
    """
    from data_prep.duplicates import kmeans

    c, path = search.config.clusters, search.path(CENTROIDS)
    clusters = min(c.count or max(1, round(count / c.rows_per_cluster)), count)
    state = _load(path) if files.exists(path) else None
    if state is not None and int(state["done"]) >= c.iterations:
        return state["centroids"]
    sample = _sample_rows(search, count, clusters * c.train_rows_per_cluster)
    if state is not None:
        centroids, done = state["centroids"], int(state["done"])
    else:
        centroids = kmeans.choose_centroids(
            sample, clusters, search.rows.embeddings, search.config.seed
        )
        done = 0 if clusters > 1 else c.iterations - 1  # the mean, at once
    logging.info(
        "k-means: %d rows, %d clusters, %d rounds done before", len(sample), clusters, done
    )

    def save(centroids: np.ndarray, done: int) -> None:
        if processes.writes:
            with files.local_output(path) as local, open(local, "wb") as file:
                np.savez(file, centroids=centroids, done=done)

    devices = kmeans.all_devices() if processes.in_step else kmeans.own_devices()
    means = kmeans.KMeans(min(c.chunk_rows, count), devices)
    return kmeans.fit(
        means,
        centroids,
        sample,
        search.rows.embeddings,
        iterations=c.iterations,
        done=done,
        save=save,
    )


def _load(path: str) -> dict[str, np.ndarray]:
    with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
        return dict(file)


def _sample_rows(search: Search, count: int, size: int) -> np.ndarray:
    """int64: all of `count` rows, or about `size` of them at random, from each block its share."""
    parts, before = [], 0
    for number in range(len(search.blocks)):
        rows = search.open(ROWS, number)["row"]
        after = before + len(rows)
        if count > size:
            share = size * after // count - size * before // count
            generator = np.random.default_rng((search.config.seed, 1, number))
            rows = np.sort(generator.choice(rows, share, replace=False))
        parts.append(rows)
        before = after
    return np.concatenate(parts)


def find_clusters(task: Task, report: Report, *, search: Search, centroids: np.ndarray) -> None:
    """Clusters of the rows of a block, on the devices of this process.

    A row lies in several clusters, those whose centroids it is nearest. Writes "row" and "cosine"
    with the nearest centroid, sorted by cluster and row; where each cluster begins; and the nearest
    cluster of each row.
    """
    from data_prep.duplicates import kmeans

    c = search.config.clusters
    rows = search.open(ROWS, task.number)["row"]
    probes = min(c.probes, len(centroids))
    members, cosines = np.empty((0, probes), np.int32), np.empty(0, np.float32)
    if len(rows):
        means = kmeans.KMeans(min(c.chunk_rows, len(rows)), kmeans.own_devices(), probes=probes)
        parts = list(means.assign(centroids, rows, search.rows.embeddings))
        members, cosines = (np.concatenate(column) for column in zip(*parts, strict=True))
        members, cosines = members.reshape(len(rows), -1), cosines.reshape(len(rows), -1)[:, 0]
    order = np.argsort(members, axis=None, kind="stable")
    sizes = np.bincount(members.ravel(), minlength=len(centroids))
    nearest = np.bincount(members[:, 0], minlength=len(centroids))
    edges = {"start": np.append(0, np.cumsum(sizes)), "nearest": np.append(nearest, 0)}
    mapped.write_columns(task.output + _EDGES, edges)
    mapped.write_columns(task.output + _NEAREST, {"cluster": np.ascontiguousarray(members[:, 0])})
    numbers = order // probes
    mapped.write_columns(task.output, {"row": rows[numbers], "cosine": cosines[numbers]})
    report(len(rows))


def nearest_clusters(search: Search, block: int) -> np.ndarray:
    """int32 [n]: the nearest cluster of each row of `ROWS` of a block."""
    path = search.path(CLUSTERS, file_name(block)) + _NEAREST
    return mapped.open_columns(path, search.cache)["cluster"]


def cluster_sizes(search: Search) -> np.ndarray:
    """int64 [k]: rows of each cluster that it is the nearest of; none where nothing is compared."""
    if not files.exists(search.path(CENTROIDS)):
        return np.zeros(0, np.int64)
    blocks = range(len(search.blocks))
    return sum(_edges_of(search, block)["nearest"][:-1] for block in blocks)


def _edges_of(search: Search, block: int) -> dict[str, np.ndarray]:
    path = search.path(CLUSTERS, file_name(block)) + _EDGES
    return mapped.open_columns(path, search.cache)


def _divide(search: Search, clusters: int) -> list[Group]:
    """Whole clusters into tasks of about equally many rows."""
    sizes = np.zeros(clusters, np.int64)
    for block in range(len(search.blocks)):
        sizes += np.diff(_edges_of(search, block)["start"])
    number = (np.cumsum(sizes) - sizes) // _GROUP_ROWS
    first = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [
        Group(
            f"clusters {start} to {stop - 1}",
            search.path(GROUPS, file_name(index)),
            index,
            start,
            stop,
            tuple(sizes[start:stop].tolist()),
        )
        for index, (start, stop) in enumerate(zip(first, [*first[1:], clusters], strict=True))
    ]


def find_in_group(group: Group, report: Report, *, search: Search) -> None:
    """Finds the near-duplicates of the clusters of a group."""
    config, rows = search.config, search.rows
    numbers, cosines = _members(search, group)
    pixels = np.zeros(len(numbers), np.int64)
    if config.keep == "largest":
        pixels = rows.take("pixels", numbers)
    parts, start = [NOTHING], 0
    for size in group.sizes:
        own = slice(start, start + size)
        mine = numbers[own]
        order = rank_rows(config.keep, cosines[own], pixels[own])
        near = _find_near(search, mine, order)
        parts.append(Near(mine[near.dropped], mine[near.alike], near.similarity))
        start += size
        report(size)
    mapped.write_columns(group.output, _best(parts)._asdict())


def _members(search: Search, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines of a group, sorted by cluster and row, from the files of all blocks."""
    clusters, numbers, cosines = [], [], []
    for block in range(len(search.blocks)):
        starts = _edges_of(search, block)["start"][group.start : group.stop + 1]
        columns = search.open(CLUSTERS, block)
        own = slice(int(starts[0]), int(starts[-1]))
        clusters.append(np.repeat(np.arange(len(group.sizes)), np.diff(starts)))
        numbers.append(columns["row"][own])
        cosines.append(columns["cosine"][own])
    order = np.argsort(np.concatenate(clusters), kind="stable")
    return np.concatenate(numbers)[order], np.concatenate(cosines)[order]


def _find_near(search: Search, numbers: np.ndarray, order: np.ndarray) -> Near:
    """The near-duplicates of a cluster, as positions in its rows."""
    config, least = search.config, search.config.verify.correlation
    count = 1 if least is None else config.verify.candidates
    embeddings = search.rows.embeddings(numbers)
    found = find_candidates(embeddings, order, config.threshold, count)
    if least is None:
        return next(found)
    aligner = Aligner(search.rows.greys(numbers), mirrored=config.embeddings.mirrored)
    return verify(found, aligner, least)


def merge_groups(task: Task, report: Report, *, search: Search, groups: Sequence[str]) -> None:
    """Sorts what was found in some groups by row."""
    own = groups[task.number * _GROUPS_AT_ONCE : (task.number + 1) * _GROUPS_AT_ONCE]
    parts = [mapped.open_columns(path, search.cache) for path in own]
    mapped.write_columns(task.output, _best([Near(**part) for part in parts])._asdict())


def _best(parts: Sequence[Near]) -> Near:
    """Near-duplicates by dropped row, each once: with its most similar partner."""
    found = Near(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.lexsort((found.alike, -found.similarity, found.dropped))
    found = Near(*(column[order] for column in found))
    _, first = np.unique(found.dropped, return_index=True)
    return Near(*(column[first] for column in found))


def merge_block(task: Task, report: Report, *, search: Search, exact: int, partial: int) -> None:
    """All duplicates of a block, by row: "dropped", "alike", "similarity", and "kind" 0 or 1.

    A row that is an exact copy is compared no more, so that it is found once.
    """
    near = _best([NOTHING, *(Near(**part) for part in _between(search, PARTIAL, partial, task))])
    parts = _between(search, EXACT, exact, task)
    dropped, alike = (
        np.concatenate([np.empty(0, np.int64), *(part[name] for part in parts)])
        for name in ("dropped", "kept")
    )
    columns = {
        "dropped": np.concatenate([dropped, near.dropped]),
        "alike": np.concatenate([alike, near.alike]),
        "similarity": np.concatenate([np.ones(len(dropped), np.float32), near.similarity]),
        "kind": np.repeat(np.array([0, 1], np.uint8), [len(dropped), len(near.dropped)]),
    }
    order = np.argsort(columns["dropped"])
    mapped.write_columns(task.output, {name: part[order] for name, part in columns.items()})
