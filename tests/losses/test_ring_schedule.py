"""The streaming loss's transfers: how many a round has, and that the products hide them."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.cost_model.topologies import get_topology
from diht_jax.losses import contrastive_loss
from diht_jax.losses.streaming import tile_of_block

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is absent: pip install 'jax[tpu]'",
)
AXES = ("data", "fsdp")


def value_and_grads(mesh, beta=0.25, **settings):
    rows, whole = PartitionSpec(AXES), PartitionSpec()
    loss = functools.partial(contrastive_loss, axis_name=AXES, beta=beta, **settings)
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole)
    return jax.value_and_grad(mapped, argnums=(0, 1, 2))


def abstract_arguments(mesh, num_pairs, width):
    rows = NamedSharding(mesh, PartitionSpec(AXES))
    emb = jax.ShapeDtypeStruct((num_pairs, width), jnp.float32, sharding=rows)
    scale = NamedSharding(mesh, PartitionSpec())
    return emb, emb, jax.ShapeDtypeStruct((), jnp.float32, sharding=scale)


def loops_and_permutes(jaxpr):
    """How many permutes one round of every loop has that permutes, and how many are outside."""
    in_loops, outside = [], 0
    for equation in jaxpr.eqns:
        outside += equation.primitive.name == "ppermute"
        for inner in jax.core.jaxprs_in_params(equation.params):
            loops, others = loops_and_permutes(inner)
            in_loops += loops
            if equation.primitive.name in ("while", "scan"):
                in_loops += [others] if others else []
            else:
                outside += others
    return in_loops, outside


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_two_permutes_a_round_forward_and_three_backward(beta):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), AXES)
    arguments = abstract_arguments(mesh, 64, 8)
    jaxpr = jax.make_jaxpr(value_and_grads(mesh, beta))(*arguments)
    # After the loops, the texts' statistics and then their gradients come home.
    assert loops_and_permutes(jaxpr.jaxpr) == ([2, 3], 2)


def round_bodies(hlo):
    """The opcodes of every loop that permutes, in the order in which they are scheduled.

    What makes products, in a loop or a fusion of its own, is called "products".
    """
    assert "is_scheduled=true" in hlo.partition("\n")[0]
    computations = {}
    for line in hlo.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        found = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(", line)
        if header:
            current = computations["ENTRY" if header.group(1) else header.group(2)] = []
        elif found:
            called = re.findall(r"(?:calls|body)=%?([\w.\-]+)", line)
            current.append((found.group(1), called))

    def has_products(opcode, called):
        return opcode == "convolution" or any(
            has_products(*inner) for name in called for inner in computations[name]
        )

    bodies = [
        ["products" if has_products(*instruction) else instruction[0] for instruction in body]
        for name, body in computations.items()
        if name != "ENTRY"
    ]
    return [body for body in bodies if "collective-permute-start" in body]


@needs_libtpu
@pytest.mark.parametrize("num_pairs", [512, 4096])
def test_the_tpu_compiler_starts_every_transfer_before_the_products(num_pairs):
    """Blocks of one tile, and blocks of several in an inner loop."""
    devices = np.asarray(get_topology("v5e:2x2").devices).reshape(4, 1)
    mesh = Mesh(devices, AXES)
    arguments = abstract_arguments(mesh, num_pairs, 128)
    hlo = jax.jit(value_and_grads(mesh)).lower(*arguments).compile().as_text()
    bodies = round_bodies(hlo)
    assert sorted(body.count("collective-permute-start") for body in bodies) == [2, 3]
    for body in bodies:
        assert body.count("collective-permute-done") == body.count("collective-permute-start")
        starts, products, dones = (
            [index for index, opcode in enumerate(body) if opcode == kind]
            for kind in ("collective-permute-start", "products", "collective-permute-done")
        )
        assert products and max(starts) < min(products) and max(products) < min(dones)


@needs_libtpu
@pytest.mark.parametrize("num_pairs, most_mb", [(65_536, 16), (1_048_576, 160)])
def test_memory_on_a_pod(num_pairs, most_mb):
    """Peak of value and gradients in float32, arguments and results included."""
    mesh = Mesh(np.asarray(get_topology("v5e:16x16").devices).reshape(256, 1), AXES)
    arguments = abstract_arguments(mesh, num_pairs, 768)
    shardings = (arguments[2].sharding, tuple(x.sharding for x in arguments))
    step = jax.jit(value_and_grads(mesh), out_shardings=shardings)
    memory = step.lower(*arguments).compile().memory_analysis()
    assert memory.peak_memory_in_bytes <= most_mb * 1e6


@pytest.mark.parametrize(
    "num_rows, width, tile",
    [(256, 512, 512), (1024, 1024, 1024), (4096, 768, 1024), (8192, 512, 2048), (65536, 768, 2048)],
)
def test_tiles_are_as_large_as_the_block_affords(num_rows, width, tile):
    assert tile_of_block(num_rows, width) == tile
