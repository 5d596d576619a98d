"""Size of the filter's decisions, and time of a replay with other limits.

    python -m benchmarks.decisions

Generates the files of 10,000,000 pairs, 10,000 pairs per part. Complexity, actions and gates are
those of the web captions in `--captions`, drawn with repetition. The other values are random: image
sides around 550 px, log-normal, and captions visible in one of 14 images that reach text spotting.
The pairs are decided as by `configs/prep/cat.py`. `--distinct` parts differ; the others are renamed
copies. Then the filter's command replays the folder with `min_complexity=2` in a separate process,
with and without lists.
"""

from __future__ import annotations

import copy
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
from absl import app, flags

from benchmarks.record import write_result
from data_prep.captions import parse_captions
from data_prep.captions.graph import cat_reason
from data_prep.decisions import table
from data_prep.filtering import config as filter_config
from data_prep.jobs import shards
from diht_jax.config import load_recipe
from diht_jax.storage import files

_CAPTIONS = flags.DEFINE_string(
    "captions", "runs/data/captions_web.txt", "A text file with one caption a line."
)
_PARTS = flags.DEFINE_integer("num_parts", 1000, "Files of decisions.")
_DISTINCT = flags.DEFINE_integer("distinct", 50, "Of them that differ.")
_ROWS = 10_000  # per part
_RECIPE = "configs/prep/cat.py"
_GROUPS = {
    "keys": ("key",),
    "uids": ("uid",),
    "sizes": ("width", "height"),
    "names": ("object_names.list.element", "action_names.list.element"),
}


def main(_: Sequence[str]) -> None:
    """Measures and writes `benchmarks/results/decisions.json`."""
    path = pathlib.Path(_CAPTIONS.value)
    if not path.is_file():
        raise ValueError(f"--captions='{path}': no such file; expected one caption a line")
    captions = path.read_text(encoding="utf-8").splitlines()
    measured = [_measure_caption(graph) for graph in parse_captions(captions)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "kept"
        (folder / "parts").mkdir(parents=True)
        sizes = _write_parts(folder, measured)
        result: dict[str, Any] = {
            "pairs": _PARTS.value * _ROWS,
            "parts": _PARTS.value,
            "distinct_parts": _DISTINCT.value,
            "captions_measured": len(captions),
            "bytes_per_row": sizes,
            "replays": [_replay(folder, None), _replay(folder, folder.parent / "lists")],
        }
    for row in (sizes, *result["replays"]):
        print(row)
    print(write_result("decisions", result))


def _measure_caption(graph: Any) -> dict[str, Any]:
    """Returns the columns of a caption, and the decision of the first step."""
    reason = cat_reason(graph)
    values = {"captions": 1, "outcome": "caption" if reason else table.KEPT, "reason": reason}
    if graph.drop_reason is None:
        values |= {"complexity": graph.complexity, "actions": len(graph.actions)}
        values["object_names"] = list(graph.objects)
        values["action_names"] = sorted({edge.predicate for edge in graph.actions})
    else:
        values["gate"] = graph.drop_reason
    return values


def _write_parts(folder: pathlib.Path, measured: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Writes all files and statistics; returns the bytes per row by groups of columns."""
    rng = np.random.default_rng(0)
    paths = [folder / "parts" / f"{n:05d}{table.SUFFIX}" for n in range(_PARTS.value)]
    distinct = min(_DISTINCT.value, _PARTS.value)
    for number in range(distinct):
        log = table.DecisionWriter()
        for i, chosen in enumerate(rng.integers(len(measured), size=_ROWS)):
            # Keys numbered like those of img2dataset.
            values = measured[chosen] | {"key": f"{number:05d}{i:04d}", "uid": rng.bytes(16)}
            if values["outcome"] == table.KEPT:
                values["width"], values["height"] = np.exp(rng.normal(6.3, 0.5, 2)).astype(int)
                values |= _spot(rng)
            log.add(i, values)
        for path in paths[number::distinct]:  # written again: a copied file would not match
            copy.deepcopy(log).write(str(path))
    parts = [{"name": path.name.removesuffix(table.SUFFIX)} for path in paths]
    files.write_object(folder / "parts" / table.MANIFEST, {"parts": parts})
    config = load_recipe(_RECIPE)
    files.write_object(
        folder / shards.MERGED_STATS,
        {
            "config": filter_config.record_settings(config),
            "counts": {"read": _PARTS.value * _ROWS},
        },
    )
    return _column_bytes(paths[:distinct])


def _spot(rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 1 / 14:
        confidence = round(float(rng.uniform(0.1, 1)), 4)
        text = {"match": "".join(rng.choice(list("abcdefghij"), 8)), "match_chars": 6}
        dropped = {"outcome": "text", "reason": "shows_caption", "match_confidence": confidence}
        return {"matches": 1, **text, **dropped}
    return {"matches": 0, "format": "JPEG"}


def _column_bytes(paths: Sequence[pathlib.Path]) -> dict[str, float]:
    found = dict.fromkeys((*_GROUPS, "others"), 0.0)
    of_column = {name: group for group, names in _GROUPS.items() for name in names}
    total = 0
    for path in paths:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        total += path.stat().st_size
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                name = of_column.get(column.path_in_schema, "others")
                found[name] += column.total_compressed_size
    rows = len(paths) * _ROWS
    found = {name: round(size / rows, 3) for name, size in found.items()}
    return found | {"whole_file": round(total / rows, 3)}


def _replay(folder: pathlib.Path, lists: pathlib.Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "data_prep.filter", "--config", _RECIPE]
    command += ["--config.min_complexity=2", f"--replay={folder}"]
    command += [] if lists is None else [f"--lists={lists}"]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    secs = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {printed}")
    return {
        "lists": lists is not None,
        "secs": round(secs, 1),
        "cpu_secs": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
        "table": printed.splitlines(),
    }


if __name__ == "__main__":
    app.run(main)
