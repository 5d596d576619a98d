"""Work repeated by a filter job after a few of many input shards were removed, added and replaced.

    python -m benchmarks.changed_inputs
    python -m benchmarks.changed_inputs --parts_are_output

Tars with one pair each are filtered by `configs/prep/convert.py`, and then some in the middle are
changed. Counts the parts that were made, by the modification times of their statistics, and the
maximum number of times that the statistics of an unchanged or new part were opened. The seconds are
those of the whole command; the first row includes the filtering of all shards.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from PIL import Image

from benchmarks.record import write_result
from data_prep.filter import run_filter
from diht_jax.config import load_recipe

_NUM_SHARDS = flags.DEFINE_integer("num_shards", 10_000, "Input shards.", lower_bound=20)
_PARTS_ARE_OUTPUT = flags.DEFINE_bool("parts_are_output", False, "examples_per_shard=None.")


class _Opened:
    """Counts how often the statistics of parts are opened for reading."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(".tfrecord.stats.json"):
            self.counts[str(args[0])] += not args[2] & os.O_WRONLY


def main(_: Sequence[str]) -> None:
    """Measures and writes `benchmarks/results/changed_inputs*.json`."""
    os.fsync = lambda _: None  # only useful against power failures; would take most of the time
    opened, rows = _Opened(), []
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        (folder / "in").mkdir()
        for number in range(_NUM_SHARDS.value):
            _write(folder / "in" / f"{number:05d}.tar", "first")
        for change, apply in _changes(folder / "in", _NUM_SHARDS.value // 2):
            apply()
            before, start_secs = _when_made(folder / "out"), time.perf_counter()
            opened.counts.clear()
            assert run_filter(_config(folder)) == {}  # few changes need no --overwrite
            now = _when_made(folder / "out")
            parts = _part_names(folder / "out")
            rows.append(
                {
                    "change": change,
                    "parts": len(parts),
                    "parts_made": sum(before.get(name) != now[name] for name in parts),
                    "most_reads_of_statistics": max(
                        opened.counts[name]
                        for name in parts
                        if before.get(name) in (None, now[name])
                    ),
                    "secs": round(time.perf_counter() - start_secs, 1),
                }
            )
            print(rows[-1], flush=True)
    name = "changed_inputs_parts" if _PARTS_ARE_OUTPUT.value else "changed_inputs"
    print(write_result(name, {"shards": _NUM_SHARDS.value, "changes": rows}))


def _changes(folder: pathlib.Path, middle: int) -> list[tuple[str, Callable[[], None]]]:
    def path(number: int, suffix: str = "") -> pathlib.Path:
        return folder / f"{number:05d}{suffix}.tar"

    return [
        ("all are new", lambda: None),
        ("nothing", lambda: None),
        ("one removed", lambda: path(middle).unlink()),
        ("one added", lambda: _write(path(middle + 2, "b"), "added")),
        ("one replaced", lambda: _write(path(middle + 4), "replaced")),
        ("three removed", lambda: [path(middle + i).unlink() for i in (6, 8, 10)] and None),
    ]


def _config(folder: pathlib.Path) -> Any:
    config = load_recipe("configs/prep/convert.py")
    config.update({"input": f"{folder}/in/*.tar", "output": f"{folder}/out", "num_workers": 0})
    config.update({"report_samples": 1, "samples_per_outcome": 1})
    config.examples_per_shard = None if _PARTS_ARE_OUTPUT.value else 1000
    return config


def _write(path: pathlib.Path, word: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    caption = f"{word} {path.stem}".encode()
    with tarfile.open(path, "w") as tar:
        for extension, data in (("png", buffer.getvalue()), ("txt", caption)):
            info = tarfile.TarInfo(f"{path.stem}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _folder(output: pathlib.Path) -> pathlib.Path:
    return output if _PARTS_ARE_OUTPUT.value else output / "parts"


def _part_names(output: pathlib.Path) -> list[str]:
    return [str(path) for path in _folder(output).glob("*.tfrecord.stats.json")]


def _when_made(output: pathlib.Path) -> dict[str, int]:
    return {name: os.stat(name).st_mtime_ns for name in _part_names(output)}


if __name__ == "__main__":
    app.run(main)
