"""The streaming loss's transfers: rounds, transfers per round, and products that hide them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.hardware.topologies import get_topology
from diht_jax.losses import contrastive_loss, ring
from tests.compiling import needs_libtpu
from tests.losses import formulas

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
    """Returns (rounds, permutes per round) of each loop with permutes, and the permutes outside."""
    in_loops, outside = [], 0
    for equation in jaxpr.eqns:
        outside += equation.primitive.name == "ppermute"
        for inner in jaxprs_in_params(equation.params):
            loops, others = loops_and_permutes(inner)
            in_loops += loops
            if equation.primitive.name == "scan":
                in_loops += [(equation.params["length"], others)] if others else []
            else:
                assert equation.primitive.name != "while" or not others
                outside += others
    return in_loops, outside


def traced(shape, beta=0.25, num_pairs=64):
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), AXES)
    return jax.make_jaxpr(value_and_grads(mesh, beta))(*abstract_arguments(mesh, num_pairs, 8))


@pytest.mark.parametrize(
    "shape, rounds, beta", [((8, 1), 8, 0.25), ((4, 2), 4, 0.25), ((2, 4), 2, 0.0)]
)
def test_two_permutes_a_round_forward_and_three_backward(shape, rounds, beta):
    """There are as many rounds as groups along fsdp: 64 and not 512 on 64 hosts of 8."""
    jaxpr = traced(shape, beta)
    # After the loops, the texts' statistics and then their gradients return to their devices.
    assert loops_and_permutes(jaxpr.jaxpr) == ([(rounds, 2), (rounds, 3)], 2)


def test_a_group_of_all_devices_sends_nothing_round():
    assert loops_and_permutes(traced((1, 8)).jaxpr) == ([], 0)


def test_groups_of_some_of_the_neighbours_equal_the_defining_formula(monkeypatch):
    """With blocks of 2 x 8 float32 and a limit of 128 bytes: 2 of the 4 along fsdp are gathered."""
    monkeypatch.setattr(ring, "_GATHERED_BYTES", 128)
    assert loops_and_permutes(traced((2, 4), num_pairs=16).jaxpr) == ([(4, 2), (4, 3)], 2)

    def loss(image_emb, text_emb, scale, alpha, beta):
        return contrastive_loss(image_emb, text_emb, scale, alpha=alpha, beta=beta, axis_name=AXES)

    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), AXES)
    value_and_grads = formulas.differentiate_on_mesh(loss, mesh, AXES)
    cases = [("random", 100.0, *weighting) for weighting in [(1.0, 0.0), (0.999, 0.25)]]
    assert formulas.find_errors(value_and_grads, cases) == []


def round_bodies(hlo):
    """Returns the scheduled opcodes of every loop with permutes.

    A loop or fusion that computes products is called "products".
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
@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_tpu_compiler_starts_every_transfer_before_the_products(num_pairs, fsdp):
    """Blocks of one tile, and blocks of several in an inner loop; one level and two."""
    devices = np.asarray(get_topology("v5e:2x2").devices).reshape(4 // fsdp, fsdp)
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
