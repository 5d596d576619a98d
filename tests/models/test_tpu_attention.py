"""The TPU kernel for short sequences gives the formula's values in every setting of a block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diht_jax.hardware.topologies import get_topology
from diht_jax.models import transformer
from diht_jax.models.attention import rotary_positions
from diht_jax.models.tpu_attention import attend_short, short_attention_obstacle, vmem_mib
from diht_jax.models.transformer import BlockInit, Execution, make_blocks, run_blocks
from tests.compiling import QUICK_COMPILE, needs_libtpu
from tests.models.test_attention import formula


def formula_and_gradients(qkv, bias, cotangent, num_heads, causal):
    """softmax(q k^T / sqrt(d)) v and its gradients, in float64 without a compiler."""
    b, t, width = qkv.shape
    q, k, v = np.moveaxis((qkv + bias).reshape(b, t, 3, num_heads, -1), (2, 3), (0, 2))
    g = np.moveaxis(cotangent.reshape(b, t, num_heads, -1), 2, 1)
    scale = q.shape[-1] ** -0.5
    scores = q @ np.swapaxes(k, 2, 3) * scale
    if causal:
        scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    by_weights = g @ np.swapaxes(v, 2, 3)
    by_scores = weights * (by_weights - (weights * by_weights).sum(axis=3, keepdims=True)) * scale
    by_query_key_value = [
        by_scores @ k,
        np.swapaxes(by_scores, 2, 3) @ q,
        np.swapaxes(weights, 2, 3) @ g,
    ]
    by_qkv = np.moveaxis(by_query_key_value, (0, 2), (2, 3)).reshape(b, t, width)
    out = np.moveaxis(weights @ v, 1, 2).reshape(b, t, width // 3)
    return out, by_qkv, by_qkv.sum(axis=(0, 1))


@pytest.mark.parametrize(
    "num_tokens, head_dim, causal, dtype, tolerance",
    [
        (50, 80, True, "bfloat16", 2e-2),
        (77, 64, True, "float32", 1e-5),
        (257, 80, False, "float32", 1e-5),
        (131, 64, False, "float32", 1e-5),
        (577, 64, False, "bfloat16", 2e-2),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    num_tokens, head_dim, causal, dtype, tolerance
):
    num_heads = 4 if head_dim == 64 else 2  # heads in two groups, and heads that fill no lanes
    width = num_heads * head_dim
    rng = np.random.default_rng(num_tokens)
    shapes = [(2, num_tokens, 3 * width), (3 * width,), (2, num_tokens, width)]
    arrays = [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(qkv, bias, cotangent):
        kernel = functools.partial(attend_short, num_heads=num_heads, causal=causal, interpret=True)
        out, pullback = jax.vjp(kernel, qkv, bias)
        return [out, *pullback(cotangent)]

    expected = formula_and_gradients(
        *(array.astype(np.float64) for array in arrays), num_heads, causal
    )
    for ours, right in zip(run(*arrays), expected, strict=True):
        assert ours.dtype == dtype
        error = np.max(np.abs(np.asarray(ours, np.float64) - right)) / np.max(np.abs(right))
        assert error <= tolerance


def tower(attention, *, scan_layers):
    """Two blocks of width 16 with two heads: definition, and the same values in either form."""

    def build():
        return make_blocks(
            Execution(scan_layers=scan_layers),
            *(2, 16, 2),
            num_tokens=None,
            mlp_width=32,
            init=BlockInit.scaled_by_depth(16, 2),
            causal=True,
            activation="gelu",
            epsilon=1e-5,
            attention=attention,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )

    graphdef, shapes = nnx.split(nnx.eval_shape(build), nnx.Param)
    leaves, structure = jax.tree.flatten(shapes)
    of_a_block = [x.shape[1:] if scan_layers else x.shape for x in leaves]
    rng = np.random.default_rng(0)
    stacked = [
        0.3 * rng.standard_normal((2, *shape), np.float32)
        for shape in of_a_block[: len(leaves) // (1 if scan_layers else 2)]
    ]
    arrays = stacked if scan_layers else [layers[i] for i in range(2) for layers in stacked]
    return graphdef, jax.tree.unflatten(structure, arrays)


def sharded_blocks(attention, remat="none", *, scan_layers=False, pooled=(9, 3, 0, 5), rotary=None):
    """Returns the blocks as a function and its arguments, on two devices of two rows each."""
    graphdef, params = tower(attention, scan_layers=scan_layers)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 10, 16)), jnp.float32)
    pooled = None if pooled is None else jnp.asarray(pooled)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    def encode(params, x, pooled):
        blocks = nnx.merge(graphdef, params)
        return run_blocks(blocks, x, pooled=pooled, rotary=rotary, remat=remat)

    return encode, (params, x, pooled)


def sharded_gradients(attention, remat, **options):
    """Returns the jitted gradients of a loss on the blocks, and their arguments."""
    encode, arguments = sharded_blocks(attention, remat, **options)

    def loss(params, x, pooled):
        return jnp.sum(jnp.sin(encode(params, x, pooled)))

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradients, compiler_options=QUICK_COMPILE), arguments


@pytest.fixture(scope="module")
def gradients_of_xla():
    """Returns the loss, and the gradients of the two blocks' parameters and input, as arrays."""
    run, arguments = sharded_gradients("xla", "none")
    loss, (by_params, by_x) = run(*arguments)
    return loss, jax.tree.leaves(by_params), by_x


@pytest.mark.parametrize("remat, scan_layers", [("dots", False), ("minimal", True)])
def test_blocks_give_the_same_numbers(monkeypatch, gradients_of_xla, remat, scan_layers):
    """The kernel is replaced by its formula, which the test above compares with the kernel."""
    calls = []

    def dense(qkv, bias, *, num_heads, causal):
        calls.append(causal)
        b, t, width = qkv.shape
        q, k, v = jnp.moveaxis((qkv + bias).reshape(b, t, 3, num_heads, -1), 2, 0)
        return formula(q, k, v, causal).reshape(b, t, width // 3)

    monkeypatch.setattr(transformer, "attend_short", dense)
    run, arguments = sharded_gradients("pallas", remat, scan_layers=scan_layers)
    loss, (by_params, by_x) = run(*arguments)
    assert calls and all(calls)
    right_loss, right_params, right_x = gradients_of_xla
    if scan_layers:
        half = len(right_params) // 2
        pairs = zip(right_params[:half], right_params[half:], strict=True)
        right_params = [np.stack(pair) for pair in pairs]
    found = [loss, *jax.tree.leaves(by_params), by_x]
    for ours, right in zip(found, [right_loss, *right_params, right_x], strict=True):
        np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * float(np.abs(right).max()))


def kernels_read(jaxpr):
    """Counts the Pallas kernels whose outputs are used in a jaxpr."""
    read = {id(variable) for eqn in jaxpr.eqns for variable in eqn.invars}
    here = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    inner = [
        jaxpr for eqn in jaxpr.eqns if eqn not in here for jaxpr in jaxprs_in_params(eqn.params)
    ]
    return sum(any(id(out) in read for out in eqn.outvars) for eqn in here) + sum(
        map(kernels_read, inner)
    )


@pytest.mark.parametrize("remat, kernels", [("minimal", 2), ("full", 3)])
def test_minimal_keeps_what_the_kernel_gives(remat, kernels):
    """Each of two blocks runs one kernel forward and one backward, and repeats none."""
    run, arguments = sharded_gradients("pallas", remat, pooled=None)
    assert kernels_read(run.trace(*arguments).jaxpr.jaxpr) == 2 * kernels


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_bias_of_all_devices_gets_its_gradient(check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    attend = jax.shard_map(
        functools.partial(attend_short, num_heads=2, causal=False),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    gradients = jax.jit(jax.grad(lambda *arrays: jnp.sum(attend(*arrays)), argnums=(0, 1)))
    traced = gradients.trace(jnp.ones((2, 10, 48)), jnp.ones(48))
    assert [aval.shape for aval in jax.tree.leaves(traced.out_info)] == [(2, 10, 48), (48,)]
    assert "psum" in str(traced.jaxpr)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_turned_queries_and_keys_go_through_the_kernel():
    rotary = rotary_positions(3, 5, 8, class_token=True)
    results = {}
    for attention in ("pallas", "xla"):
        encode, arguments = sharded_blocks(attention, pooled=None, rotary=rotary)
        with pltpu.force_tpu_interpret_mode():
            traced = jax.jit(encode).trace(*arguments)
            assert ("pallas_call" in str(traced.jaxpr)) == (attention == "pallas")
            results[attention] = traced.lower().compile()(*arguments)
    np.testing.assert_allclose(results["pallas"], results["xla"], rtol=1e-5, atol=1e-5)


def test_outside_of_shard_map_no_kernel_is_used():
    """If the compiler partitions the program over devices, it cannot partition a kernel."""
    graphdef, params = tower("pallas", scan_layers=False)
    encode = jax.jit(lambda params, x: run_blocks(nnx.merge(graphdef, params), x))
    assert "pallas_call" not in str(encode.trace(params, jnp.ones((2, 10, 16))).jaxpr)


@pytest.mark.parametrize(
    "dtype, num_tokens, width, kind, expected",
    [
        ("bfloat16", 197, 768, "TPU v4", None),
        ("bfloat16", 577, 1024, "TPU v4", "MiB of VMEM, and TPU v4 has 16"),
        ("bfloat16", 577, 1024, "TPU7x", None),
        ("bfloat16", 641, 64, "TPU v6 lite", "at most 640 tokens, and there are 641"),
        ("float16", 77, 512, "TPU v5 lite", "config.model.dtype is float16"),
    ],
)
def test_rows_that_do_not_fit_are_refused(dtype, num_tokens, width, kind, expected):
    obstacle = short_attention_obstacle(dtype, num_tokens, width // 64, 64, kind)
    assert obstacle is None if expected is None else expected in obstacle


@pytest.mark.parametrize(
    "kind, version",
    [
        ("TPU v4", pltpu.ChipVersion.TPU_V4),
        ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E),
        ("TPU v5", pltpu.ChipVersion.TPU_V5P),
        ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E),
        ("TPU7x", pltpu.ChipVersion.TPU_7X),
    ],
)
def test_the_memory_is_that_of_jaxs_table(kind, version):
    assert vmem_mib(kind) * 2**20 == pltpu.get_tpu_info_for_chip(version, 1).vmem_capacity_bytes


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernels_compile_for_every_kind_of_tpu(topology):
    """Forward and backward, all lengths and widths in one program."""
    mesh = Mesh(np.array(get_topology(topology).devices[:1]), ("data",))
    settings = [
        (num_tokens, head_dim, 4 if head_dim == 64 else 2, num_tokens == 77)
        for num_tokens in (50, 77, 197, 257, 577)
        for head_dim in (64, 80)
    ]
    settings.append((257, 80, 16, False))  # two groups of eight heads

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    def run(arrays):
        found = []
        for (*_, num_heads, causal), (cotangent, *inputs) in zip(settings, arrays, strict=True):
            attend = functools.partial(attend_short, num_heads=num_heads, causal=causal)
            out, pullback = jax.vjp(attend, *inputs)
            found.append((out, pullback(cotangent)))
        return found

    arrays = []
    for num_tokens, head_dim, num_heads, _ in settings:
        width = num_heads * head_dim
        arrays.append(
            (shape(2, num_tokens, width), shape(2, num_tokens, 3 * width), shape(3 * width))
        )
    text = jax.jit(run).lower(arrays).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * len(settings)
