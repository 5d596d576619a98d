"""A model of the smallest architecture with its initial weights, and real photos."""

import pathlib

import jax
import pytest

from diht_jax import load_model
from diht_jax.config import default_config
from diht_jax.weights.inference import LoadedModel
from tests import make


def _write_run(folder: pathlib.Path, **overrides) -> pathlib.Path:
    """Writes a work directory of a model with one layer in each tower."""
    config = default_config()
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(vision_layers=1, text_layers=1, **overrides)
    return make.write_run(folder, config)


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory) -> LoadedModel:
    """Returns the model on all eight devices."""
    assert jax.local_device_count() == 8
    return load_model(_write_run(tmp_path_factory.mktemp("tiny"), vocab_size=700), batch_size=64)


@pytest.fixture(scope="package")
def workdir(tmp_path_factory):
    """Returns a read-only work directory with the initial weights as the checkpoint of step 7."""
    return _write_run(tmp_path_factory.mktemp("workdir"))


@pytest.fixture(scope="package")
def photos() -> list[bytes]:
    """Returns five different encoded images."""
    return [make.png(seed) for seed in range(5)]
