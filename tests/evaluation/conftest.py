"""A model of the smallest architecture with its initial weights, and real photos."""

import jax
import pytest

from diht_jax import sharding
from diht_jax.config import default_config
from diht_jax.models.parameters import ModelDefinition
from diht_jax.models.zoo import get_architecture
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.source import ModelFiles
from tests import make
from tests.make import png


def _config(**overrides):
    """Returns a config with one layer in each tower."""
    config = default_config()
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(vision_layers=1, text_layers=1, **overrides)
    return config


@pytest.fixture(scope="package")
def tiny_model() -> LoadedModel:
    """Returns the model on all eight devices."""
    config = _config(vocab_size=700)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    definition = ModelDefinition(arch, config.model.dtype, config.model.param_dtype)
    mesh = sharding.create_mesh(data=-1, fsdp=1)
    assert mesh.size == 8
    params = jax.device_put(make.draw_parameters(definition.init_params), sharding.replicated(mesh))
    files = ModelFiles(arch, params, "drawn", config=config)
    return LoadedModel(definition, files, mesh, batch_size=64)


@pytest.fixture(scope="package")
def workdir(tmp_path_factory):
    """Returns a read-only work directory with the initial weights as the checkpoint of step 7."""
    return make.write_run(tmp_path_factory.mktemp("workdir"), _config())


@pytest.fixture(scope="package")
def photos() -> list[bytes]:
    """Returns five different encoded images."""
    return [png(seed) for seed in range(5)]
