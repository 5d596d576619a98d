"""The table of duplicates, block by block, and what the filter looks up, by ranges of key hashes.

    duplicates/    a row for each pair of a unit, in the unit's file
    named/         of each block the dropped pairs, sorted by a hash of their keys
    described/     of each block what the report needs, written last
    keys/          of each range of hashes the dropped pairs that a filter by keys can find

A row has key, kind, cluster, similarity, duplicate_of and kept_key.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.duplicates import mapped, report, stages
from data_prep.duplicates.near import find_roots
from data_prep.duplicates.search import Processes, Search, Task, file_name, rows_between
from data_prep.duplicates.table import bucket_of
from data_prep.jobs.engine import Report
from diht_jax.storage import files

TABLE, NAMED, DESCRIBED, KEYS = STAGES = "duplicates", "named", "described", "keys"


def write_all(search: Search, processes: Processes) -> int:
    """Runs the stages that follow `stages.find_all`; arguments and errors as there.

    Returns:
        How many ranges of key hashes there are.
    """
    for stage in (TABLE, NAMED):
        files.make_folder(search.path(stage))
    tasks = search.block_tasks(DESCRIBED, ".json")
    processes.run(functools.partial(describe_block, search=search), tasks, "table")
    tasks = search.tasks(KEYS, max(1, int(search.starts[-1]) // stages.HASHES_AT_ONCE))
    function = functools.partial(collect_keys, search=search, buckets=len(tasks))
    processes.run(function, tasks, "keys")
    return len(tasks)


def describe_block(task: Task, progress: Report, *, search: Search) -> None:
    """Writes the table of the units of a block, and what the later stages need of it."""
    import pyarrow

    rows, found = search.rows, search.open(stages.FOUND, task.number)
    alike = found["alike"]
    alike_keys = rows.keys(alike)
    root_keys = rows.keys(find_roots(alike, functools.partial(_follow, search)))
    chosen = search.open(stages.ROWS, task.number)["row"]
    cluster_of = np.full(task.stop - task.start, -1, np.int32)
    if len(chosen):
        cluster_of[chosen - task.start] = stages.nearest_clusters(search, task.number)
    for unit in range(*search.blocks[task.number]):
        start, stop = rows.starts[unit : unit + 2]
        own = rows_between(found, "dropped", start, stop)
        _write_part(
            search.path(TABLE, f"{unit:05d}.parquet"),
            rows.unit_keys(unit),
            cluster_of[start - task.start : stop - task.start],
            (
                found["dropped"][own] - start, found["kind"][own], found["similarity"][own],
                alike_keys[own], root_keys[own],
            ),
        )  # fmt: skip
        progress(int(stop - start))
    hashes = rows.take("hash", found["dropped"])
    order = np.argsort(hashes, kind="stable")
    named = {
        "hash": hashes[order],
        "kind": found["kind"][order],
        "similarity": found["similarity"][order],
        "duplicate_of": alike_keys.take(pyarrow.array(order)),
    }
    mapped.write_columns(search.path(NAMED, file_name(task.number)), named)
    facts = {
        "exact": int((found["kind"] == 0).sum()),
        "near": int((found["kind"] == 1).sum()),
        "without_cluster": int((cluster_of < 0).sum()),
        "report": report.describe_block(found, search.config),
    }
    files.write_bytes(task.output, json.dumps(facts).encode())


def _follow(search: Search, rows: np.ndarray) -> np.ndarray:
    """The row that each of some rows is alike, or -1 where it stays."""
    following = np.full(len(rows), -1, np.int64)
    for task in search.block_tasks(stages.FOUND):
        mine = np.flatnonzero((rows >= task.start) & (rows < task.stop))
        if not len(mine):
            continue
        found = search.open(stages.FOUND, task.number)
        position = np.searchsorted(found["dropped"], rows[mine])
        position = position.clip(max=len(found["dropped"]) - 1)
        if len(found["dropped"]):
            is_dropped = found["dropped"][position] == rows[mine]
            following[mine[is_dropped]] = found["alike"][position[is_dropped]]
    return following


def _write_part(path: str, all_keys: list[str], clusters: np.ndarray, found: tuple) -> None:
    """The table of a unit: a row for each of its pairs, in their order."""
    import pyarrow
    import pyarrow.parquet

    dropped, kinds, cosines, alike_keys, root_keys = found
    kind = np.full(len(all_keys), 2, np.int8)
    kind[dropped] = kinds
    similarity: list[float | None] = [None] * len(all_keys)
    duplicate_of: list[str | None] = [None] * len(all_keys)
    kept_key: list[str | None] = [None] * len(all_keys)
    keys = alike_keys.to_pylist(), root_keys.to_pylist()
    for row, cosine, alike, root in zip(dropped, cosines, *keys, strict=True):
        similarity[row], duplicate_of[row], kept_key[row] = float(cosine), alike, root
    names = pyarrow.array(["exact", "near", "kept"])
    table = pyarrow.table(
        {
            "key": all_keys,
            "kind": pyarrow.DictionaryArray.from_arrays(kind, names),
            "cluster": pyarrow.array(clusters, mask=clusters < 0),
            "similarity": pyarrow.array(similarity, pyarrow.float32()),
            "duplicate_of": pyarrow.array(duplicate_of, pyarrow.string()),
            "kept_key": pyarrow.array(kept_key, pyarrow.string()),
        }
    )
    with files.local_output(path) as local:
        pyarrow.parquet.write_table(table, local)


def read_facts(search: Search) -> list[dict[str, Any]]:
    """What `describe_block` states of each block."""
    paths = [task.output for task in search.block_tasks(DESCRIBED, ".json")]
    return [json.loads(data) for data in files.read_many(paths)]


def collect_keys(task: Task, progress: Report, *, search: Search, buckets: int) -> None:
    """The dropped pairs of a range of key hashes; a key that several pairs have names none of them.

    Writes them sorted by hash, and how many pairs share their key with others.
    """
    import pyarrow

    parts = [np.empty(0, np.uint64)]
    for unit in range(len(search.units)):
        hashes = search.rows.unit_column(unit, "hash")
        parts.append(hashes[bucket_of(hashes, buckets) == task.number])
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    repeated = values[counts > 1]
    batches = []
    for number in range(len(search.blocks)):
        path = search.path(NAMED, file_name(number))
        batch = mapped.open_batch(path, search.cache)
        bucket = bucket_of(batch.column("hash").to_numpy(), buckets)
        first, last = np.searchsorted(bucket, [task.number, task.number + 1])
        batches.append(batch.slice(first, last - first))
    table = pyarrow.Table.from_batches(batches).combine_chunks()
    hashes = table["hash"].to_numpy()
    order = np.argsort(hashes, kind="stable")
    order = order[~np.isin(hashes[order], repeated)]
    columns = {
        name: pyarrow.concat_arrays(table[name].take(pyarrow.array(order)).chunks)
        if len(order)
        else batches[0].column(name).slice(0, 0)
        for name in table.schema.names
    }
    count = int(counts[counts > 1].sum())
    files.write_bytes(task.output + ".json", json.dumps({"repeated": count}).encode())
    mapped.write_columns(task.output, columns)


def count_repeated(search: Search, buckets: int) -> int:
    """How many pairs share their key with others."""
    paths = [task.output + ".json" for task in search.tasks(KEYS, buckets)]
    return sum(json.loads(data)["repeated"] for data in files.read_many(paths))


def read_keys(search: Search, buckets: int) -> Iterator[Any]:
    """The record batches of `collect_keys`, in the order of the hashes."""
    for task in search.tasks(KEYS, buckets):
        yield mapped.open_batch(task.output, search.cache)
