"""Memory of the filter with few and with many shards, of equal size and of equal total size.

    python -m benchmarks.filter_memory

There are three data sets of web captions as metadata (`configs/prep/metadata.py`, with parsing),
and three of pairs with images (`configs/prep/convert.py`, with resharding): 8 shards, 256 shards of
the same size, and 256 shards with the same total rows as the first. Each job runs alone with one
worker. Reports the peak resident memory of the main process and of the worker. If the memory is
determined by a shard, the second data set needs as much as the first.

Then three jobs run with two workers: 10,000 shards of one pair, 10,000 shards of one row of
metadata, and one table of 100,000 rows. The main process should need no more memory for them than
for 8 shards. `--jobs` runs only the jobs with the given numbers, and prints without writing.
"""

from __future__ import annotations

import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks.record import write_result

_CAPTIONS = flags.DEFINE_string(
    "captions", "runs/data/captions_web.txt", "A text file with one caption a line."
)
_CHOSEN = flags.DEFINE_multi_integer("jobs", [], "Numbers of jobs, from 0; all by default.")
# Kind of data, shards, rows per shard, workers.
_JOBS = (
    ("metadata", 8, 64, 1),
    ("metadata", 256, 64, 1),
    ("metadata", 256, 2, 1),
    ("pairs", 8, 32, 1),
    ("pairs", 256, 32, 1),
    ("pairs", 256, 1, 1),
    ("pairs", 10_000, 1, 2),
    ("metadata", 10_000, 1, 2),
    ("metadata", 1, 100_000, 2),
)

_JOB = """
import json, resource, sys, time
from data_prep.filter import run_filter
from diht_jax.config import load_recipe

if __name__ == "__main__":
    config = load_recipe(sys.argv[1])
    config.update({"input": sys.argv[2], "output": sys.argv[3], "num_workers": int(sys.argv[4])})
    config.examples_per_shard = 1000
    config.source.rows_per_shard = 2_000_000
    start = time.perf_counter()
    assert run_filter(config) == {}
    secs = time.perf_counter() - start
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peaks = [resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds]
    usages = [resource.getrusage(kind) for kind in kinds]
    cpu_secs = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(json.dumps([*peaks, secs, cpu_secs]))
"""


def main(_: Sequence[str]) -> None:
    """Measures and writes `benchmarks/results/filter_memory.json`."""
    path = pathlib.Path(_CAPTIONS.value)
    if not path.is_file():
        raise ValueError(f"--captions='{path}': no such file; expected one caption a line")
    captions = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, job in enumerate(_JOBS):
        if not _CHOSEN.value or number in _CHOSEN.value:
            with tempfile.TemporaryDirectory() as folder:
                row = _measure(*job, captions, pathlib.Path(folder))
            print(row, flush=True)
            rows.append(row)
    if not _CHOSEN.value:
        print(write_result("filter_memory", {"jobs": rows}))


def _measure(
    kind: str,
    shards: int,
    per_shard: int,
    workers: int,
    captions: Sequence[str],
    folder: pathlib.Path,
) -> dict[str, Any]:
    (folder / "in").mkdir()
    write = _write_table if kind == "metadata" else _write_tar
    for number in range(shards):
        first = number * per_shard
        write(
            folder / "in" / f"{number:05d}",
            # Generated lazily: a process starts with the peak memory of its parent.
            ((f"{first + i:09d}", captions[(first + i) % len(captions)]) for i in range(per_shard)),
        )
    recipe = "metadata" if kind == "metadata" else "convert"
    script = folder / "job.py"
    script.write_text(_JOB)
    done = subprocess.run(
        [
            *(sys.executable, script, f"configs/prep/{recipe}.py", f"{folder}/in/*"),
            *(f"{folder}/out", str(workers)),
        ],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": str(pathlib.Path.cwd()), "PATH": "/usr/bin:/bin"},
    )
    main_mb, worker_mb, secs, cpu_secs = json.loads(done.stdout.splitlines()[-1])
    return {
        "job": kind,
        "shards": shards,
        "rows_per_shard": per_shard,
        "workers": workers,
        "main_peak_mb": round(main_mb, 1),
        "worker_peak_mb": round(worker_mb, 1),
        "secs": round(secs, 1),
        "cpu_secs": round(cpu_secs, 1),
    }


def _write_table(path: pathlib.Path, rows: Iterable[tuple[str, str]]) -> None:
    lines = (json.dumps({"key": key, "caption": caption}) + "\n" for key, caption in rows)
    with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        file.writelines(lines)


def _write_tar(path: pathlib.Path, rows: Iterable[tuple[str, str]]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for key, caption in rows:
            for extension, data in (("jpg", buffer.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    app.run(main)
