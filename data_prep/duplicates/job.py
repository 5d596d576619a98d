"""A whole job: from pairs, or embeddings, to the table of duplicates and its report.

The folder of the output:

    scan/            of each unit of the input: keys, content hashes, embeddings
    exact.npz, centroids.npz, clusters.npz, groups/    what the stages found
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of, kept_key
    dropped.arrow    what the filter looks up
    report.html, duplicates.json
"""

from __future__ import annotations

import functools
import glob
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates import descriptor, report, stages
from data_prep.duplicates.near import Near
from data_prep.duplicates.scan import Rows, Unit, scan_unit
from data_prep.duplicates.table import LOOKUP, SUMMARY, read_summary, write_lookup, write_summary
from data_prep.jobs.engine import print_failures, run_pending
from data_prep.sources.list import check_output, list_sources
from diht_jax.data.atomic_file import open_atomically, write_atomically
from diht_jax.data.readers.base import SourceShard
from diht_jax.data.records.remote import refuse_url

SETTINGS, TABLE, SCAN = "settings.json", "duplicates", "scan"
# What a stage is decided by, and what goes when that changes; later stages go with it.
_LATER = (
    (("exact",), (stages.EXACT,)),
    (("clusters", "seed"), (stages.CENTROIDS, stages.CLUSTERS)),
    (("threshold", "keep"), (TABLE, stages.GROUPS, stages.ORDER, report.PAGE, LOOKUP, SUMMARY)),
)


def run(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Does what is not done yet.

    Args:
        config: a valid one of `duplicates.config.default_config`.

    Returns:
        Units that failed, with the reason; nothing when the table is complete.

    Raises:
        ValueError: nothing to read, nowhere to write, or a folder of another input.
    """
    sources = [] if config.input is None else list_sources(config.input, config.source)
    refuse_url(config.output, "config.output")
    folder = pathlib.Path(check_output(config.output, sources))
    units = _list_units(config, sources, folder)
    _claim(config, units, folder)
    if read_summary(folder) is None:
        failures = _find(config, units, folder)
        if failures:
            return print_failures(failures)
    summary = read_summary(folder)
    print(report.describe(summary))
    print(f"look at {folder / report.PAGE}")
    return {}


def _find(
    config: ml_collections.ConfigDict, units: Sequence[Unit], folder: pathlib.Path
) -> dict[str, str]:
    pending = [unit for unit in units if not unit.is_done()]
    logging.info("%d units, %d of them done before", len(units), len(units) - len(pending))
    failures = run_pending(
        functools.partial(scan_unit, config=config),
        pending,
        num_workers=config.num_workers,
        retries=config.retries,
        label="scan",
    )
    if failures:
        return failures
    rows = Rows(units)
    if not len(rows):
        raise ValueError(f"config.input='{config.input}': no pairs")
    exact = {"dropped": np.empty(0, np.int64), "kept": np.empty(0, np.int64)}
    if config.exact and config.input is not None:
        exact = stages.find_exact(rows, folder)
    chosen = stages.rows_to_compare(rows, exact["dropped"])
    near = Near(*(np.empty(0, np.int64) for _ in range(4)))
    clusters = {"cluster": np.empty(0, np.int32)}
    if len(chosen):
        clusters = stages.make_clusters(rows, chosen, config, folder)
        near, failures = stages.find_all_near(rows, chosen, clusters, config, folder)
        if failures:
            return failures
    cluster_of = np.full(len(rows), -1, np.int32)
    cluster_of[chosen] = clusters["cluster"]
    _write_table(config, rows, exact, near, cluster_of, folder)
    return {}


def _write_table(
    config: ml_collections.ConfigDict,
    rows: Rows,
    exact: dict[str, np.ndarray],
    near: Near,
    cluster_of: np.ndarray,
    folder: pathlib.Path,
) -> None:
    import pyarrow

    # A copy stays with the picture that its own one stays with.
    kept = exact["kept"]
    position = np.minimum(np.searchsorted(near.dropped, kept), max(len(near.dropped) - 1, 0))
    root = kept.copy()
    if len(near.dropped):
        root = np.where(near.dropped[position] == kept, near.root[position], kept)
    dropped = np.concatenate([exact["dropped"], near.dropped])
    order = np.argsort(dropped)
    dropped = dropped[order]
    alike = np.concatenate([kept, near.alike])[order]
    root = np.concatenate([root, near.root])[order]
    kinds = np.repeat([0, 1], [len(kept), len(near.dropped)])[order].astype(np.uint8)
    cosines = np.concatenate([np.ones(len(kept)), near.cosine])[order].astype(np.float32)
    alike_keys = rows.keys(alike)
    (folder / TABLE).mkdir(exist_ok=True)
    for unit in range(len(rows.units)):
        start, stop = np.searchsorted(dropped, rows.starts[unit : unit + 2])
        own = slice(int(start), int(stop))
        _write_part(
            folder / TABLE / f"{unit:05d}.parquet",
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
    summary = {
        "pairs": len(rows),
        "exact": int((kinds == 0).sum()),
        "near": int((kinds == 1).sum()),
        "kept": len(rows) - len(dropped),
        "without_embedding": int((cluster_of < 0).sum()) - len(kept),
        "clusters": int(cluster_of.max(initial=-1)) + 1,
        "pairs_of_repeated_keys": int(counts[counts > 1].sum()),
        "threshold": config.threshold,
        "keep": config.keep,
        "digest": digest,
    }
    shown = report.choose_pairs(dropped, alike, kinds, cosines, config)
    page = report.render(summary, shown, rows, cosines[kinds == 1], cluster_of)
    write_atomically(folder / report.PAGE, page.encode("utf-8", "replace"))
    write_summary(folder, summary)


def _write_part(
    path: pathlib.Path, rows: Rows, unit: int, cluster_of: np.ndarray, found: tuple
) -> None:
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
    with open_atomically(path) as file:
        pyarrow.parquet.write_table(table, file)


def _list_units(
    config: ml_collections.ConfigDict, sources: Sequence[SourceShard], folder: pathlib.Path
) -> list[Unit]:
    stem = str(folder / SCAN / "{:05d}")
    if config.input is None:
        paths = sorted(glob.glob(config.embeddings.files))
        if not paths:
            raise ValueError(
                f"config.embeddings.files='{config.embeddings.files}': no such file; expected "
                ".npz or .parquet files"
            )
        return [Unit(path, stem.format(i)) for i, path in enumerate(paths)]
    if config.embeddings.kind != "files":
        return [Unit(source, stem.format(i)) for i, source in enumerate(sources)]
    files = [_embedded(config.embeddings.files, i) for i in range(len(sources))]
    _check_embedded(config, sources, files)
    return [
        Unit(source, stem.format(i), found)
        for i, (source, found) in enumerate(zip(sources, files, strict=True))
    ]


def _embedded(folder: str, number: int) -> tuple[str, ...]:
    """The files that `diht_jax.embed` wrote of a shard."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"embeddings-{number:05d}-*"))
    return tuple(sorted(path for path in paths if path.endswith((".npz", ".parquet"))))


def _check_embedded(
    config: ml_collections.ConfigDict,
    sources: Sequence[SourceShard],
    files: Sequence[tuple[str, ...]],
) -> None:
    path = pathlib.Path(config.embeddings.files) / "embeddings.json"
    try:
        before = [(s["path"], s["start"]) for s in json.loads(path.read_bytes())["source"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"config.embeddings.files='{config.embeddings.files}': expected the --output of "
            f"diht_jax.embed ({type(error).__name__}: {error})"
        ) from error
    now = [(s["path"], s["start"]) for s in (source.identity() for source in sources)]
    if before != now or not all(files):
        raise ValueError(
            f"config.embeddings.files='{config.embeddings.files}' is of another input than "
            f"config.input='{config.input}', or not complete; run diht_jax.embed on this input"
        )


def _claim(config: ml_collections.ConfigDict, units: Sequence[Unit], folder: pathlib.Path) -> None:
    """Makes the folder, or removes of it what other settings have decided.

    Raises:
        ValueError: it holds the units of another input, or other embeddings.
    """
    settings = json.loads(json.dumps(_describe(config, units)))
    path = folder / SETTINGS
    (folder / SCAN).mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_bytes())
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
                _remove(folder / name)
    write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def _describe(config: ml_collections.ConfigDict, units: Sequence[Unit]) -> dict[str, Any]:
    settings = duplicates_config.record_settings(config)
    # How many rows lie on the devices does not decide.
    settings["clusters"].pop("chunk_rows")
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = descriptor.VERSION
    settings["units"] = [
        unit.source if isinstance(unit.source, str) else unit.source.identity() for unit in units
    ]
    settings["given"] = [[p, os.path.getsize(p)] for unit in units for p in unit.embeddings]
    return settings


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
