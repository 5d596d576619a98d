"""A whole job: from pairs, or embeddings, to the table of duplicates and its report.

The folder of the output, on a local disk or in a store:

    scan/            of each unit of the input: keys, content hashes, embeddings, thumbnails
    exact.npz, centroids.npz, clusters.npz, groups/    what the stages found
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of, kept_key
    dropped.arrow    what the filter looks up
    report.html, duplicates.json
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates import descriptor, given, mapped, report, stages
from data_prep.duplicates.near import Near, find_roots
from data_prep.duplicates.scan import ROWS, Rows, Unit, scan_unit
from data_prep.duplicates.table import LOOKUP, SUMMARY, read_summary, write_lookup, write_summary
from data_prep.jobs import claim, files
from data_prep.jobs.engine import RaySettings, print_failures, run_pending
from data_prep.sources.list import check_output, list_sources, shards_of_task
from diht_jax.data.readers.base import SourceShard
from diht_jax.data.records.remote import file_size
from diht_jax.data.stores import is_remote

SETTINGS, TABLE, SCAN = "settings.json", "duplicates", "scan"
# What a stage is decided by, and what goes when that changes; later stages go with it.
_LATER = (
    (("exact",), (stages.EXACT,)),
    (("clusters", "seed"), (stages.CENTROIDS, stages.CLUSTERS)),
    (
        ("threshold", "keep", "verify"),
        (TABLE, stages.GROUPS, stages.ORDER, report.PAGE, LOOKUP, SUMMARY),
    ),
)


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
) -> dict[str, str]:
    """Does what is not done yet.

    Args:
        config: a valid one of `duplicates.config.default_config`.
        task_index: number of this job of a job array.
        num_tasks: jobs that share the scan; the last of them to end goes on alone.
        engine: one of `engine.ENGINES`.

    Returns:
        Units that failed, with the reason; nothing when the table is complete.

    Raises:
        ValueError: nothing to read, nowhere to write, or a folder of another input.
    """
    sources = [] if config.input is None else list_sources(config.input, config.source)
    folder = check_output(config.output, sources)
    units = _list_units(config, sources, folder)
    for where in (folder, files.join(folder, SCAN)):
        files.make_folder(where)
    with claim.take(folder) as own:
        if own is None:
            return {}
        _settle(config, units, folder)
    if read_summary(folder) is None:
        options = {
            "num_workers": config.num_workers,
            "retries": config.retries,
            "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
        }
        mine = shards_of_task(units, task_index, num_tasks)
        failures = _scan(config, mine, folder, options)
        if not failures and not _unscanned(units, folder):
            with claim.take(folder) as own:
                if own is None:
                    return {}
                own.announce_writing()
                if read_summary(folder) is None:
                    failures = _find(config, units, folder, options)
        if failures:
            return print_failures(failures)
    summary = read_summary(folder)
    if summary is None:
        missing = len(_unscanned(units, folder))
        print(f"{missing} of {len(units)} units are not scanned; run again, or wait for other jobs")
        return {}
    mapped.forget(mapped.cache_folder(folder))
    print(report.describe(summary))
    print(f"look at {files.join(folder, report.PAGE)}")
    return {}


def _unscanned(units: Sequence[Unit], folder: str) -> list[Unit]:
    present = set(files.list_names(files.join(folder, SCAN)))
    return [unit for unit in units if os.path.basename(unit.stem) + ROWS not in present]


def _scan(
    config: ml_collections.ConfigDict,
    units: Sequence[Unit],
    folder: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    pending = _unscanned(units, folder)
    logging.info("%d units, %d of them done before", len(units), len(units) - len(pending))
    function = functools.partial(scan_unit, config=config)
    return run_pending(function, pending, label="scan", **options)


def _find(
    config: ml_collections.ConfigDict,
    units: Sequence[Unit],
    folder: str,
    options: dict[str, Any],
) -> dict[str, str]:
    rows = Rows(units, mapped.cache_folder(folder))
    if not len(rows):
        raise ValueError(f"config.input='{config.input}': no pairs")
    exact = {"dropped": np.empty(0, np.int64), "kept": np.empty(0, np.int64)}
    if config.exact and config.input is not None:
        exact = stages.find_exact(rows, folder)
    chosen = stages.rows_to_compare(rows, exact["dropped"])
    near = stages.NOTHING
    clusters = {"cluster": np.empty((0, 1), np.int32)}
    if len(chosen):
        clusters = stages.make_clusters(rows, chosen, config, folder)
        near, failures = stages.find_all_near(rows, chosen, clusters, config, folder, options)
        if failures:
            return failures
    cluster_of = np.full(len(rows), -1, np.int32)
    cluster_of[chosen] = clusters["cluster"][:, 0]
    _write_table(config, rows, exact, near, cluster_of, folder)
    return {}


def _write_table(
    config: ml_collections.ConfigDict,
    rows: Rows,
    exact: dict[str, np.ndarray],
    near: Near,
    cluster_of: np.ndarray,
    folder: str,
) -> None:
    import pyarrow

    near_root = find_roots(near)
    # A copy stays with the picture that its own one stays with.
    kept = exact["kept"]
    position = np.minimum(np.searchsorted(near.dropped, kept), max(len(near.dropped) - 1, 0))
    root = kept.copy()
    if len(near.dropped):
        root = np.where(near.dropped[position] == kept, near_root[position], kept)
    dropped = np.concatenate([exact["dropped"], near.dropped])
    order = np.argsort(dropped)
    dropped = dropped[order]
    alike = np.concatenate([kept, near.alike])[order]
    root = np.concatenate([root, near_root])[order]
    kinds = np.repeat([0, 1], [len(kept), len(near.dropped)])[order].astype(np.uint8)
    cosines = np.concatenate([np.ones(len(kept)), near.similarity])[order].astype(np.float32)
    alike_keys = rows.keys(alike)
    files.make_folder(files.join(folder, TABLE))
    for unit in range(len(rows.units)):
        start, stop = np.searchsorted(dropped, rows.starts[unit : unit + 2])
        own = slice(int(start), int(stop))
        _write_part(
            files.join(folder, TABLE, f"{unit:05d}.parquet"),
            rows,
            unit,
            cluster_of,
            (dropped[own], kinds[own], cosines[own], alike_keys[own], rows.keys(root[own])),
        )
    hashes = rows.column("hash")
    # A key that several pairs have names none of them.
    values, counts = np.unique(hashes, return_counts=True)
    repeated = values[counts > 1]
    is_clear = ~np.isin(hashes[dropped], repeated)
    clear = np.flatnonzero(is_clear)
    digest = write_lookup(
        folder,
        hashes[dropped[clear]],
        kinds[clear],
        cosines[clear],
        alike_keys.filter(pyarrow.array(is_clear)),
    )
    least = config.verify.correlation
    summary = {
        "pairs": len(rows),
        "exact": int((kinds == 0).sum()),
        "near": int((kinds == 1).sum()),
        "kept": len(rows) - len(dropped),
        "without_embedding": int((cluster_of < 0).sum()) - len(kept),
        "clusters": int(cluster_of.max(initial=-1)) + 1,
        "pairs_of_repeated_keys": int(counts[counts > 1].sum()),
        "threshold": config.threshold if least is None else least,
        "verified": least is not None,
        "keep": config.keep,
        "digest": digest,
    }
    shown = report.choose_pairs(dropped, alike, kinds, cosines, config)
    page = report.render(summary, shown, rows, cosines[kinds == 1], cluster_of)
    files.write_bytes(files.join(folder, report.PAGE), page.encode("utf-8", "replace"))
    write_summary(folder, summary)


def _write_part(path: str, rows: Rows, unit: int, cluster_of: np.ndarray, found: tuple) -> None:
    """The table of a unit: a row for each of its pairs, in their order."""
    import pyarrow
    import pyarrow.parquet

    dropped, kinds, cosines, alike_keys, root_keys = found
    start, stop = rows.starts[unit : unit + 2]
    count, local = int(stop - start), dropped - start
    kind = np.full(count, 2, np.int8)
    kind[local] = kinds
    similarity: list[float | None] = [None] * count
    duplicate_of: list[str | None] = [None] * count
    kept_key: list[str | None] = [None] * count
    keys = alike_keys.to_pylist(), root_keys.to_pylist()
    for row, cosine, alike, root in zip(local, cosines, *keys, strict=True):
        similarity[row], duplicate_of[row], kept_key[row] = float(cosine), alike, root
    clusters = cluster_of[start:stop]
    names = pyarrow.array(["exact", "near", "kept"])
    table = pyarrow.table(
        {
            "key": rows.unit_keys(unit),
            "kind": pyarrow.DictionaryArray.from_arrays(kind, names),
            "cluster": pyarrow.array(clusters, mask=clusters < 0),
            "similarity": pyarrow.array(similarity, pyarrow.float32()),
            "duplicate_of": pyarrow.array(duplicate_of, pyarrow.string()),
            "kept_key": pyarrow.array(kept_key, pyarrow.string()),
        }
    )
    with files.local_output(path) as local:
        pyarrow.parquet.write_table(table, local)


def _list_units(
    config: ml_collections.ConfigDict, sources: Sequence[SourceShard], folder: str
) -> list[Unit]:
    stem = files.join(folder, SCAN, "{:05d}")
    if config.input is None:
        paths = given.find_files(config.embeddings.files)
        if not paths:
            raise ValueError(
                f"config.embeddings.files='{config.embeddings.files}': no such file; expected "
                ".npz or .parquet files"
            )
        return [Unit(path, stem.format(i)) for i, path in enumerate(paths)]
    if config.embeddings.kind != "files":
        return [Unit(source, stem.format(i)) for i, source in enumerate(sources)]
    files_of = given.files_of_shards(config.embeddings.files, len(sources))
    _check_embedded(config, sources, files_of)
    return [
        Unit(source, stem.format(i), found)
        for i, (source, found) in enumerate(zip(sources, files_of, strict=True))
    ]


def _check_embedded(
    config: ml_collections.ConfigDict,
    sources: Sequence[SourceShard],
    files_of: Sequence[tuple[str, ...]],
) -> None:
    try:
        before = given.list_shards(config.embeddings.files)
    except ValueError as error:
        raise ValueError(f"config.embeddings.files={error}") from error
    now = [(s["path"], s["start"]) for s in (source.identity() for source in sources)]
    if before != now or not all(files_of):
        raise ValueError(
            f"config.embeddings.files='{config.embeddings.files}' is of another input than "
            f"config.input='{config.input}', or not complete; run diht_jax.embed on this input"
        )


def _settle(config: ml_collections.ConfigDict, units: Sequence[Unit], folder: str) -> None:
    """Removes of the folder what other settings have decided.

    Raises:
        ValueError: it holds the units of another input, or other embeddings.
    """
    settings = json.loads(json.dumps(_describe(config, units)))
    path = files.join(folder, SETTINGS)
    before = files.read_object(path)
    if before is not None:
        later = {key for keys, _ in _LATER for key in keys}
        changed = sorted(k for k in settings if before.get(k) != settings[k])
        refused = [key for key in changed if key not in later]
        if refused:
            raise ValueError(
                f"'{folder}' holds duplicates of other settings; changed: {', '.join(refused)}. "
                "Choose another config.output, or delete the folder"
            )
        if changed:
            first = min(i for i, (keys, _) in enumerate(_LATER) if set(keys) & set(changed))
            for name in reversed([name for _, names in _LATER[first:] for name in names]):
                _remove(files.join(folder, name))
    if before != settings:
        files.write_bytes(path, (json.dumps(settings, indent=1) + "\n").encode())


def _describe(config: ml_collections.ConfigDict, units: Sequence[Unit]) -> dict[str, Any]:
    settings = duplicates_config.record_settings(config)
    # How many rows lie on the devices does not decide.
    settings["clusters"].pop("chunk_rows")
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = descriptor.VERSION
    elif config.verify.correlation is not None:
        settings["thumbnails"] = True
    settings["units"] = [
        unit.source if isinstance(unit.source, str) else unit.source.identity() for unit in units
    ]
    settings["given"] = [[p, file_size(p)] for unit in units for p in unit.embeddings]
    return settings


def _remove(path: str) -> None:
    """Removes a file, and the files of a folder."""
    for name in files.list_names(path):
        files.remove(files.join(path, name))
    if is_remote(path) or not os.path.isdir(path):
        files.remove(path)
