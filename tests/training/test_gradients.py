"""Gradients of the global batch are the same for any split into layers, micro-batches, devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxprs_in_params

from diht_jax import sharding
from diht_jax.input.transforms import normalize
from diht_jax.losses import contrastive_loss
from diht_jax.models.dual_encoder import choose_patches, l2_normalize
from diht_jax.models.parameters import merge_model
from diht_jax.training.optimizer import split_parameters
from diht_jax.training.program import TrainProgram
from diht_jax.training.step import TrainState, loss_gradients, training_execution
from tests import make
from tests.compiling import QUICK_COMPILE
from tests.training.conftest import SIGLIP

BATCH_SIZE = 32


def tiny_config(**changes) -> ml_collections.ConfigDict:
    config = make.tiny_config()
    config.model.update(patch_dropout=0.25, scan_layers=True)
    config.model.overrides.update(
        patch_size=4, vision_layers=2, text_layers=2, text_width=16, context_length=8, vocab_size=64
    )
    config.loss.update(impl="gathered", beta=0.25)
    config.data.batch_size = BATCH_SIZE
    config.update_from_flattened_dict(changes)
    return config


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (BATCH_SIZE, 16, 16, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 64, (BATCH_SIZE, 8)).astype(np.int32),
    }


# Config overrides for the components of PE-Core's towers.
PE_CORE = {"vision_pool_heads": 4, "rotary_grid": 6, "vision_projection": "bias"}


def config_of(parts: tuple[tuple[str, object], ...], **changes) -> ml_collections.ConfigDict:
    return tiny_config(**{f"model.overrides.{k}": v for k, v in parts}, **changes)


@functools.cache
def make_params(parts: tuple[tuple[str, object], ...] = ()) -> dict:
    return make.draw_parameters(program_of(config_of(parts), 1, 1).init_params, seed=1)


def make_state(mesh, params=None) -> TrainState:
    params = make_params() if params is None else params
    return TrainState(
        step=jnp.int32(3),
        params=jax.device_put(params, sharding.tree_shardings(params, mesh)),
        opt_state=(),
        key_data=jax.random.key_data(jax.random.key(5)),
    )


def program_of(config, data, fsdp) -> TrainProgram:
    config.mesh.update(data=data, fsdp=fsdp)
    return TrainProgram(config, 10, jax.devices()[: data * fsdp])


def gradient_function(program):
    config, mesh = program.config, program.mesh
    execution = training_execution(config.model, mesh)
    definition = dataclasses.replace(program.definition, execution=execution)
    return jax.jit(
        functools.partial(loss_gradients, definition=definition, mesh=mesh, config=config),
        compiler_options=QUICK_COMPILE,
    )


def gradients(config, data, fsdp, params=None, **changed):
    program = program_of(config, data, fsdp)
    batch = {**make_batch(), **changed}
    batch = jax.make_array_from_process_local_data(sharding.batch_sharding(program.mesh), batch)
    return gradient_function(program)(make_state(program.mesh, params), batch)[:2]


@functools.cache
def reference_function(parts: tuple[tuple[str, object], ...] = ()):
    """Maps parameters and tokens to loss and gradient, on one device, in the simplest form."""
    config = config_of(parts, **{"model.scan_layers": False})
    program = program_of(config, 1, 1)
    batch = make_batch()
    key = jax.random.fold_in(jax.random.key(5), 3)
    kept = choose_patches(key, BATCH_SIZE, 16, 0.25)

    def loss_fn(params, tokens):
        model = merge_model(program.definition, params)
        features = model.vision.features(normalize(batch["images"], jnp.float32), kept_patches=kept)
        return contrastive_loss(
            l2_normalize(model.vision.projection(features)),
            model.encode_text(tokens),
            jnp.exp(params["log_logit_scale"]),
            beta=0.25,
            impl="gathered",
        )

    return jax.jit(jax.value_and_grad(loss_fn), compiler_options=QUICK_COMPILE)


@functools.cache
def reference():
    """Loss and gradient of the batch from the simple form."""
    return jax.device_get(reference_function()(make_params(), make_batch()["tokens"]))


def relative_error(found, expected):
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    difference = jax.tree.map(np.subtract, found, expected)
    norms = [sum(np.sum(x**2) for x in jax.tree.leaves(t)) for t in (difference, expected)]
    return np.sqrt(norms[0] / norms[1])


@pytest.mark.parametrize(
    "data, fsdp, scan_layers, remat, micro_batch",
    [
        (8, 1, True, "dots", 16),
        (1, 8, True, "full", 8),
        (2, 4, False, "none", None),
    ],
)
def test_gradients_do_not_depend_on_how_the_batch_is_split(
    data, fsdp, scan_layers, remat, micro_batch
):
    config = tiny_config(
        **{"model.scan_layers": scan_layers, "model.remat": remat, "micro_batch": micro_batch},
    )
    grads, metrics = gradients(config, data, fsdp)
    loss, expected = reference()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert relative_error(grads, expected) < 2e-6
    for part in ("vision", "text", "log_logit_scale"):
        assert relative_error(grads[part], expected[part]) < 5e-6, part
    kernel = grads["vision"]["blocks"]["1"]["mlp"]["fc_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32, 128 // fsdp)


@pytest.mark.parametrize(
    "parts",
    [SIGLIP | {"vision_pool_heads": 2, "embed_dim": 32}, PE_CORE],
    ids=["SigLIP", "PE-Core"],
)
def test_gradients_of_other_towers_do_not_depend_on_it_either(parts):
    parts = tuple(parts.items())
    config = config_of(parts, **{"model.remat": "minimal", "micro_batch": 16})
    grads, metrics = gradients(config, 2, 4, make_params(parts))
    loss, expected = reference_function(parts)(make_params(parts), make_batch()["tokens"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert relative_error(grads, expected) < 2e-6
    for part in ("probe", "in_proj", "mlp"):
        pool, wanted = (tree["vision"]["pool"][part] for tree in (grads, expected))
        assert relative_error(pool, wanted) < 1e-5, part
    kernel = grads["vision"]["pool"]["in_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32, 96 // 4)


def test_frozen_parameters_get_no_gradient_and_change_nothing_else():
    frozen = ("vision/blocks/0/", "^text/", "log_logit_scale")
    config = tiny_config(**{"micro_batch": 16})
    config.optimizer.frozen = frozen
    grads, _ = gradients(config, 4, 2)
    expected, _ = split_parameters(config.optimizer, reference()[1])
    assert "text" not in grads and "0" not in grads["vision"]["blocks"]
    assert relative_error(grads, expected) < 2e-6


def with_adapters(config):
    """Returns parameters with random adapters that compute the same as `make_params`."""
    program = program_of(config, 1, 1)
    rng, scale = np.random.default_rng(2), config.lora.alpha / config.lora.rank
    shapes = flatten_dict(jax.eval_shape(program.init_params, jax.random.key(0)), sep="/")
    params = flatten_dict(make_params(), sep="/")
    for name in shapes.keys() - params.keys():
        params[name] = 0.1 * rng.standard_normal(shapes[name].shape, np.float32)
    for name in (n.removesuffix("/lora_a") for n in shapes if n.endswith("/lora_a")):
        change = scale * params[f"{name}/lora_a"] @ params[f"{name}/lora_b"]
        params[f"{name}/kernel"] = params[f"{name}/kernel"] - change
    return unflatten_dict(params, sep="/")


def test_adapters_alone_get_gradients_those_of_the_merged_kernels():
    changes = {"model.scan_layers": True, "model.remat": "full", "micro_batch": 16}
    config = tiny_config(**{"lora.rank": 3, "lora.alpha": 6.0, **changes})
    params = with_adapters(config)
    scale, flat = config.lora.alpha / config.lora.rank, flatten_dict(params, sep="/")
    grads, metrics = gradients(config, 2, 2, params)
    loss, whole = reference()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    kernels, expected = flatten_dict(whole, sep="/"), {}
    for name in (n.removesuffix("/lora_a") for n in flat if n.endswith("/lora_a")):
        a, b, of_kernel = flat[f"{name}/lora_a"], flat[f"{name}/lora_b"], kernels[f"{name}/kernel"]
        expected[f"{name}/lora_a"] = scale * of_kernel @ b.T
        expected[f"{name}/lora_b"] = scale * a.T @ of_kernel
    assert len(expected) == 2 * 4 * 2 * len(config.lora.towers)
    assert relative_error(grads, unflatten_dict(expected, sep="/")) < 1e-5


def temporary_bytes(config, data=1, fsdp=1):
    program = program_of(config, data, fsdp)
    lowered = gradient_function(program).lower(program.abstract_state(), program.abstract_batch())
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_micro_batch_only():
    def measure(batch_size, micro_batch):
        return temporary_bytes(
            tiny_config(**{"data.batch_size": batch_size, "micro_batch": micro_batch})
        )

    small, twice_the_batch = measure(128, 32), measure(256, 32)
    assert twice_the_batch < 1.1 * small
    assert measure(128, 64) > 1.6 * small


def test_no_more_than_one_layer_is_whole_at_a_time():
    def measure(layers):
        config = tiny_config(**{"data.batch_size": 8})
        config.model.overrides.update(vision_layers=layers, vision_width=128)
        return temporary_bytes(config, fsdp=8)

    layer_bytes = 4 * 12 * 128**2
    # A device holds an eighth of a layer, stacked and as its gradient.
    assert (measure(8) - measure(4)) / 4 < 0.5 * layer_bytes


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_softmax_norm_statistics_and_loss_are_float32_under_bfloat16():
    config = tiny_config(**{"model.dtype": "bfloat16"})
    program = program_of(config, 1, 1)
    execution = training_execution(config.model, program.mesh)
    definition = dataclasses.replace(program.definition, execution=execution)
    state, batch = program.abstract_state(), program.abstract_batch()

    def forward(params, images, tokens):
        model = merge_model(definition, params)
        image_emb = model.encode_image(normalize(images, jnp.bfloat16))
        return contrastive_loss(
            image_emb, model.encode_text(tokens), jnp.exp(params["log_logit_scale"]), beta=0.25
        )

    found = list(equations(jax.make_jaxpr(forward)(state.params, *batch.values()).jaxpr))
    dtypes = {}
    for eqn in (eqn for eqn in found if eqn.invars):
        dtypes.setdefault(eqn.primitive.name, []).append(eqn.invars[0].aval.dtype)
    # exp and max are in softmax and the loss; rsqrt is in LayerNorm and the L2 norms.
    for name in ("exp", "log", "rsqrt", "reduce_sum", "reduce_max"):
        assert jnp.float32 in dtypes[name] and jnp.bfloat16 not in dtypes[name], name
    # Each tower has four linear layers and two products of attention; there are two projections.
    # The rest is the loss.
    assert sum(dtype == jnp.bfloat16 for dtype in dtypes["dot_general"]) == 2 * 6 + 2
    assert jnp.dtype("float32") in dtypes["dot_general"]
