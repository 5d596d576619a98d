"""Device peaks by the names that JAX reports, and counted FLOPs against formulas.

Also those of the concept heads in the train step of a real recipe.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from diht_jax.config import load_recipe
from diht_jax.hardware.chips import count_flops, find_chip
from diht_jax.training.program import TrainProgram


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU7x", 2307 / 2),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("v5e", 197),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("TPU v5 lite+", None),
    ],
)
def test_peaks_of_the_kinds_of_devices(kind, teraflops):
    chip = find_chip(kind)
    assert (chip and chip.peak_flops) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize(
    ("kind", "gib"),
    [("Tesla V100-SXM2-16GB", 16), ("Tesla V100-SXM2-32GB", 32), ("NVIDIA A100-SXM4-80GB", 80)],
)
def test_memory_of_kinds_that_come_in_two_sizes(kind, gib):
    assert find_chip(kind).hbm_bytes == gib * 2**30


M, K = 6, 10
LEFT = jax.ShapeDtypeStruct((M, K), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((K, K), jnp.float32)


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def test_remat_counts_the_recomputation():
    def layer(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    def loss(x, w, layer):
        def body(c, _):
            return layer(c, w), None

        return jnp.sum(lax.scan(body, x, None, length=5)[0])

    one = 2 * M * K * K

    def grads(layer):
        return count_flops(lambda x, w: jax.grad(loss, argnums=(0, 1))(x, w, layer), LEFT, SQUARE)

    # 2 products forward, 4 backward; remat repeats both, since the cosines need their values.
    assert grads(layer) == 5 * 6 * one
    assert grads(jax.checkpoint(layer)) == 5 * 8 * one
    saved = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    assert grads(saved) == 5 * 6 * one


@pytest.mark.parametrize("count", [1, 8])
def test_shard_map_counts_every_device(count):
    """Each device multiplies its rows by all columns: together one full product."""
    by_rows, whole = PartitionSpec("data"), PartitionSpec()
    rows = jax.ShapeDtypeStruct((16, K), jnp.float32)

    def local(a, b):
        return a @ b, lax.psum(jnp.sum(a), "data")

    def fn(a, b):
        return jax.shard_map(
            local, mesh=mesh_of(count), in_specs=(by_rows, whole), out_specs=(by_rows, whole)
        )(a, b)

    assert count_flops(fn, rows, SQUARE) == 2 * 16 * K * K

    def replicated(a, b):
        return jax.shard_map(
            lambda a, b: a @ b, mesh=mesh_of(count), in_specs=(whole, whole), out_specs=whole
        )(a, b)

    assert count_flops(replicated, rows, SQUARE) == count * 2 * 16 * K * K


def test_a_loop_of_unknown_length_is_an_error():
    def loops(x):
        return lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="trip count"):
        count_flops(loops, SQUARE)


def test_cond_counts_the_dearer_branch():
    def fn(x, flag):
        return lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(fn, SQUARE, jax.ShapeDtypeStruct((), jnp.bool_)) == 2 * 2 * K**3


def test_patch_convolution_and_its_gradients():
    """Patches do not overlap, so each of the three is one product with a matrix of patches."""
    examples, side, patch, channels = 4, 32, 8, 24
    images = jax.ShapeDtypeStruct((examples, side, side, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((patch, patch, 3, channels), jnp.float32)

    def conv(images, kernel):
        return lax.conv_general_dilated(
            images, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    one = 2 * examples * (side // patch) ** 2 * patch * patch * 3 * channels
    assert count_flops(conv, images, kernel) == one
    grads = jax.grad(lambda *args: jnp.sum(conv(*args) ** 2), argnums=(0, 1))
    assert count_flops(grads, images, kernel) == 3 * one


def test_cudnn_attention_by_formula(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda *_: False)
    batch, tokens, heads, depth = 2, 64, 4, 64
    query = jax.ShapeDtypeStruct((batch, tokens, heads, depth), jnp.bfloat16)

    def attend(q):
        return jnp.sum(jax.nn.dot_product_attention(q, q, q, implementation="cudnn") ** 2)

    one = 2 * batch * heads * tokens * tokens * depth
    assert count_flops(attend, query) == 2 * one
    assert count_flops(jax.grad(attend), query) == (2 + 5) * one


def test_pallas_kernel_counts_its_grid():
    from jax.experimental import pallas as pl

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = a_ref[...] @ b_ref[...]

    def fn(a, b):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((8, 32), lambda i: (i, 0)),
                pl.BlockSpec((32, 16), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
        )(a, b)

    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 32), (32, 16)))
    assert count_flops(fn, a, b) == 2 * 32 * 32 * 16


def step_flops(concept_weight):
    """Returns the FLOPs of one step at the recipe's global batch, on the tests' eight devices."""
    config = load_recipe("configs/diht_vitb16.py")
    config.model.scan_layers = True  # traces faster
    config.concepts.object_weight = config.concepts.attribute_weight = concept_weight
    program = TrainProgram(config, total_steps=10_000)
    state = program.abstract_state()
    return count_flops(program.step(state), state, program.abstract_batch())


def test_concept_heads_cost_at_most_1_percent():
    without, heads = step_flops(0.0), step_flops(1.0)
    assert without < heads <= 1.01 * without
