"""A small data set of coloured squares, and a config that trains on it in seconds."""

import io
import pathlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from diht_jax.config import default_config
from diht_jax.data.schema import Record, encode_record
from diht_jax.data.tfrecord import TFRecordWriter

NUM_RECORDS = 52


def colored_square(index: int) -> Record:
    rng = np.random.default_rng(index)
    color = tuple(int(value) for value in rng.integers(0, 256, 3))
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(buffer, "PNG")
    caption = "a square of red {}, green {} and blue {}".format(*color)
    return Record(key=f"square_{index:03d}", image=buffer.getvalue(), caption=caption)


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> pathlib.Path:
    """Two shards of records, 31 and 21 long."""
    directory = tmp_path_factory.mktemp("squares")
    for shard, indices in enumerate([range(31), range(31, NUM_RECORDS)]):
        with TFRecordWriter(directory / f"squares-{shard}.tfrecord") as writer:
            for index in indices:
                writer.write(encode_record(colored_square(index)))
    return directory


@pytest.fixture
def config(squares) -> ml_collections.ConfigDict:
    """A run of 20 steps of 16 examples; patch dropout makes the step depend on its random key."""
    config = default_config()
    config.total_steps = 20
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.patch_dropout = 0.25
    config.model.overrides.update(
        image_size=16,
        patch_size=4,
        vision_layers=1,
        vision_width=32,
        text_layers=1,
        text_width=32,
        embed_dim=16,
        context_length=24,
    )
    config.loss.beta = 0.25
    config.optimizer.warmup_steps = 4
    config.data.train = str(squares)
    config.data.batch_size = 16
    config.data.num_workers = 0
    config.log_every_steps = 1
    config.checkpoint.every_steps = 5
    return config
