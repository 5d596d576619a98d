"""Inputs, configs and readers of outputs that the tests of filter jobs share."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
import ml_collections
import pyarrow
import pyarrow.parquet

from data_prep.decisions.table import SUFFIX, read_decisions, read_manifest
from data_prep.filtering import config as filter_config
from diht_jax.config import load_recipe, validate_config
from diht_jax.records.formats import open_source
from diht_jax.records.schema import Record, decode_record
from diht_jax.weights.tensor_files import write_safetensors
from tests import make

# For processes that start a Ray cluster. Workers start on demand instead of one per core at once,
# and run at normal priority (niceness 0). Ray notices a lost node after a few refused connections
# within two seconds; a slow node has as much time as by default.
RAY_ENVIRONMENT = {
    "RAY_health_check_period_ms": "400",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
# Files that depend on the location of the input or on the run time.
_NOT_COMPARED = re.compile(r"^report\.|\.(seconds|place)\.json$|^manifest\.json$")


def job_config(
    source: str, output: pathlib.Path, recipe: str = "convert", **changes: Any
) -> ml_collections.ConfigDict:
    """A recipe of configs/prep, without workers; set keys by `section__key=value`."""
    config = load_recipe(make.PREP_RECIPES / f"{recipe}.py")
    # Text-spotting has separate tests.
    config.update({"num_workers": 0, "text_spotting": False})
    config.update({"input": source, "output": str(output)})
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    validate_config(config, filter_config.default_config())
    filter_config.check_config(config)
    return config


def snapshot(folder: pathlib.Path | str) -> dict[str, bytes]:
    """Returns all files except those that depend on the run time or the input's location.

    Args:
        folder: Path, or URL in a store.
    """
    system, root = fsspec.url_to_fs(str(folder))
    system.invalidate_cache()
    return {
        path.removeprefix(f"{root}/"): system.cat_file(path)
        for path in system.find(root)
        if not _NOT_COMPARED.search(path.rpartition("/")[2])
    }


def write_tars(folder: pathlib.Path, count: int, pairs_per_tar: int = 5) -> str:
    """Writes webdataset tars with one picture and captions "name TAR PAIR"; returns a glob."""
    image = make.encoded(make.plain("red"))
    for tar in range(count):
        members: dict[str, bytes] = {}
        for i in range(pairs_per_tar):
            members |= make.pair_members(f"{tar}-{i}", f"name {tar} {i}", image)
        make.write_tar(folder / f"{tar:05d}.tar", members)
    return str(folder / "*.tar")


def write_table(
    folder: pathlib.Path, rows: Iterable[dict[str, Any]], pictures: Mapping[str, bytes]
) -> str:
    """Writes a jsonl table and the pictures that it names; returns the table's path."""
    folder.mkdir(exist_ok=True)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "t.jsonl")


def write_clip(path: pathlib.Path, image_size: int) -> str:
    """Writes random weights of a small CLIP; returns their path."""
    arch = make.small_architecture(image_size=image_size, embed_dim=24, context_length=8)
    write_safetensors(path, make.clip_tensors(arch))
    return str(path)


def part_names(output: pathlib.Path) -> dict[str, str]:
    """Maps each input's path below its root to the name of its part, in the order of the inputs."""
    return {entry["path"]: entry["name"] for entry in read_manifest(str(_parts_folder(output)))}


def _parts_folder(output: pathlib.Path) -> pathlib.Path:
    return output / "parts" if (output / "parts").exists() else output


def when_done(output: pathlib.Path) -> dict[str, int]:
    """Maps the path of each finished input to the time at which it was marked as done."""
    paths = {
        path: _parts_folder(output) / f"{n}.stats.json" for path, n in part_names(output).items()
    }
    return {name: path.stat().st_mtime_ns for name, path in paths.items() if path.exists()}


def read_records(output: pathlib.Path) -> list[Record]:
    """Returns all records of an output, in order."""
    return [decode_record(data) for data in open_source(output)]


def read_dropped(output: pathlib.Path) -> dict[str, dict[str, int]]:
    """Returns stage -> reason -> pairs for the stages that dropped any."""
    return {stage: found for stage, found in read_counts(output)["dropped"].items() if found}


def read_outcomes(output: pathlib.Path) -> list[tuple[str, str, str | None]]:
    """Returns key, outcome and reason of every input entry, in order, read by pyarrow alone."""
    paths = [*output.glob("parts/*.decisions.parquet"), *output.glob("decisions/*.parquet")]
    tables = [pyarrow.parquet.read_table(path) for path in sorted(paths)]
    rows = pyarrow.concat_tables(tables).select(["key", "outcome", "reason"]).to_pylist()
    return [tuple(row.values()) for row in rows]


def read_scores(output: pathlib.Path, name: str) -> list[float]:
    """Returns a column of the decisions of an output with a single part."""
    (path,) = output.glob(f"parts/*{SUFFIX}")
    return [value for rows in read_decisions(str(path), [name]) for value in rows[name].to_pylist()]


def read_counts(output: pathlib.Path) -> dict[str, Any]:
    """Returns the counts of the merged statistics."""
    return json.loads((output / "stats.json").read_text())["counts"]
