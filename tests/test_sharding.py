"""Meshes and partition rules on real architectures and optimiser states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diht_jax import sharding
from diht_jax.config import default_config
from diht_jax.models import get_architecture
from diht_jax.models.parameters import model_definition
from diht_jax.training.optimizer import create_optimizer, learning_rate_schedule
from diht_jax.training.state import abstract_state


@pytest.mark.parametrize(
    "data, fsdp, expected", [(-1, 1, (8, 1)), (2, -1, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))]
)
def test_mesh_shapes(data, fsdp, expected):
    mesh = sharding.create_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == expected


@pytest.mark.parametrize("data, fsdp", [(-1, -1), (0, 8), (3, 2), (-1, 16), (-2, 1)])
def test_wrong_meshes_are_refused(data, fsdp):
    with pytest.raises(ValueError, match="config.mesh"):
        sharding.create_mesh(data, fsdp)


def local_share(tree, mesh):
    """Share of a tree's bytes that one device holds."""
    whole = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    local = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
    return local / whole


@pytest.mark.parametrize("name", ["diht_vitb32_224px", "diht_vitl14_336px"])
def test_fsdp_divides_parameters_and_optimizer_state(name):
    config = default_config()
    optimizer = create_optimizer(
        config.optimizer, learning_rate_schedule(config.optimizer, total_steps=10_000)
    )
    _, init = model_definition(get_architecture(name), jnp.bfloat16, jnp.float32)
    mesh = sharding.create_mesh(1, 8)
    state = abstract_state(init, optimizer, mesh)
    # An eighth, and the little that is not worth a split.
    assert local_share(state.params, mesh) < 0.13
    assert local_share(state.opt_state, mesh) < 0.13
    whole = abstract_state(init, optimizer, sharding.create_mesh(8, 1))
    assert local_share(whole.params, mesh) == 1.0


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.create_mesh(1, 8)
    rule = "text/projection/kernel"
    assert sharding.partition_spec(rule, (16, 5), mesh) == PartitionSpec("fsdp", None)
    assert sharding.partition_spec(rule, (12, 5), mesh) == PartitionSpec(None, None)
    assert sharding.partition_spec("text/final_norm/scale", (16,), mesh) == PartitionSpec()


def test_a_rule_of_another_rank_is_an_error():
    mesh = sharding.create_mesh(1, 8)
    with pytest.raises(ValueError, match="has 2 axes, but 'text/projection/kernel'"):
        sharding.partition_spec("text/projection/kernel", (16,), mesh)
