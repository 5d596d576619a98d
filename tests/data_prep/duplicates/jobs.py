"""Inputs, configs and results for the tests of duplicates."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import numpy as np
import pyarrow.parquet
from PIL import Image

from data_prep.duplicates.config import check_config
from diht_jax.config import load_recipe
from tests.make import pair_members, write_tar


def scene(seed: int, cells: int = 5, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A picture of smooth colours that differs from those of other seeds."""
    small = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_pictures(
    path: pathlib.Path, pictures: dict[str, bytes], captions: dict[str, str] | None = None
) -> None:
    """Writes pictures by key to a tar; a key without a caption gets "a picture"."""
    members: dict[str, bytes] = {}
    for key, data in pictures.items():
        members |= pair_members(key, (captions or {}).get(key, "a picture"), data)
    write_tar(path, members)


def duplicates_config(
    source: pathlib.Path, output: pathlib.Path | str, **changes: Any
) -> ml_collections.ConfigDict:
    """The recipe for the tars of a folder, without workers; set keys by `section__key=value`."""
    config = load_recipe("configs/prep/duplicates.py")
    config.update({"input": str(source / "*.tar"), "output": str(output), "num_workers": 0})
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    check_config(config)
    return config


def read_rows(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of the table by key."""
    files = sorted((output / "duplicates").iterdir())
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    return {row.pop("key"): row for row in rows}


def read_dropped(output: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Returns the kind and the kept key of each dropped pair."""
    rows = read_rows(output).items()
    return {key: (row["kind"], row["kept_key"]) for key, row in rows if row["kind"] != "kept"}
