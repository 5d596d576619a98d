"""Metadata files that make a folder of shards a data set for other tools.

They are written after all shards. With two of them, `tfds.builder_from_directory(FOLDER)` opens a
folder of TFRecord or ArrayRecord shards. A third one tells webdataset's users the number of samples
in each tar. `tensorflow_datasets` is imported inside the function; TensorFlow is not needed.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diht_jax.records import schema
from diht_jax.storage.files import write_bytes
from diht_jax.storage.stores import is_remote

FILES = ("dataset_info.json", "features.json")
# Tar name -> number of samples; open_clip takes the size of its epochs from it.
SIZES = "sizes.json"
# Statistics of inputs and outputs, next to each shard that `data_prep` writes.
STATS_SUFFIX = ".stats.json"

# Formats that TFDS can decode; a folder with any other is declared to hold encoded bytes.
_TFDS_IMAGE_FORMATS = frozenset(("JPEG", "PNG"))
_SHARD_TEMPLATE = "{DATASET}-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"


def write_dataset_info(
    folder: str | os.PathLike[str],
    *,
    dataset: str,
    split: str,
    shard_lengths: Sequence[int],
    num_bytes: int,
    image_formats: Collection[str],
    with_concepts: bool = False,
    description: str = "",
    file_format: str = "tfrecord",
) -> None:
    """Writes `dataset_info.json` and `features.json`.

    Args:
        folder: folder of the shards, or its URL. Shard names are those of `shard_files.shard_name`.
        shard_lengths: records per shard, with `num_bytes` in total.
        image_formats: image formats that occur. If TFDS cannot decode one of them (only JPEG and
            PNG), the feature `image` is declared as encoded bytes.
        with_concepts: whether every record has the field `concepts`, declared as bytes.
    """
    import tensorflow_datasets as tfds

    # TFDS supports few stores, and the files do not name the folder.
    data_dir = "." if is_remote(os.fspath(folder)) else os.fspath(folder)
    decodable = set(image_formats) <= _TFDS_IMAGE_FORMATS
    names = [schema.KEY, schema.IMAGE, schema.CAPTION, schema.METADATA]
    names += [schema.CONCEPTS] if with_concepts else []
    features: dict[str, Any] = {name: tfds.features.Text() for name in names}
    if decodable:
        features[schema.IMAGE] = tfds.features.Image(shape=(None, None, 3))
    version = tfds.core.Version("1.0.0")
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset, version=version, data_dir=data_dir, module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features),
        description=description,
    )
    info.set_file_format(tfds.core.FileFormat(file_format))
    template = tfds.core.ShardedFileTemplate(
        data_dir=data_dir,
        template=_SHARD_TEMPLATE,
        dataset_name=dataset,
        split=split,
        filetype_suffix=file_format,
    )
    split_info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=list(shard_lengths),
        num_bytes=num_bytes,
        filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split_info]))
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        for name in FILES:
            data = (pathlib.Path(scratch) / name).read_bytes()
            write_bytes(f"{os.fspath(folder)}/{name}", data)


def write_sizes(folder: str | os.PathLike[str], sizes: Mapping[str, int]) -> None:
    """Writes `sizes.json`."""
    text = json.dumps(dict(sizes), indent=1)
    write_bytes(f"{os.fspath(folder)}/{SIZES}", f"{text}\n".encode())
