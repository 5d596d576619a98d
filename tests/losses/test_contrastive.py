"""The contrastive loss against its defining formula, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from diht_jax.losses import contrastive_loss
from tests.losses import formulas

WHOLE = PartitionSpec()
SOME_WEIGHTINGS = [(1.0, 0.0), (0.5, 0.0), (0.999, 0.25), (1.0, 1.0)]


@pytest.fixture(params=["streaming", "gathered"])
def impl(request):
    return request.param


def loss_over(axis_name, **fixed):
    """Returns `contrastive_loss` with positional (possibly traced) alpha and beta."""

    def loss(image_emb, text_emb, scale, alpha, beta):
        return contrastive_loss(
            image_emb, text_emb, scale, alpha=alpha, beta=beta, axis_name=axis_name, **fixed
        )

    return loss


def random_case(weighting):
    return ("random", 100.0, *weighting)


@pytest.mark.parametrize("num_devices, dtype", [(1, np.float32), (8, np.float32), (8, np.float64)])
def test_value_and_gradients_equal_the_defining_formula(impl, num_devices, dtype):
    with jax.enable_x64(dtype is np.float64):
        mesh = formulas.mesh_of(num_devices)
        value_and_grads = formulas.differentiate_on_mesh(loss_over("data", impl=impl), mesh)
        assert formulas.find_errors(value_and_grads, dtype=dtype) == []


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.5, 1.0)])
def test_weighting_known_at_trace_time_equals_the_defining_formula(impl, alpha, beta):
    def loss(image_emb, text_emb, scale, *_):
        return loss_over("data", impl=impl)(image_emb, text_emb, scale, alpha, beta)

    value_and_grads = formulas.differentiate_on_mesh(loss, formulas.mesh_of(8))
    cases = [case for case in formulas.CASES if case[2:] == (alpha, beta)]
    assert len(cases) == 15
    assert formulas.find_errors(value_and_grads, cases) == []


@pytest.mark.parametrize("order, check_vma", [(("data", "fsdp"), False), (("fsdp", "data"), True)])
def test_batch_split_over_two_axes_in_either_order(impl, order, check_vma):
    """Taken outside of `shard_map`, gradients do not depend on `check_vma`."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    value_and_grads = formulas.differentiate_on_mesh(
        loss_over(order, impl=impl), mesh, order, check_vma
    )
    cases = [random_case(weighting) for weighting in SOME_WEIGHTINGS]
    assert formulas.find_errors(value_and_grads, cases) == []


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_taken_inside_of_shard_map(impl, check_vma):
    """The contract of the module docstring: exact, or pmean / division without check_vma."""
    mesh = formulas.mesh_of(8)
    rows = PartitionSpec("data")

    def local(*arrays):
        value, grads = jax.value_and_grad(loss_over("data", impl=impl), argnums=(0, 1, 2))(*arrays)
        if not check_vma:
            num_devices = jax.lax.axis_size("data")
            grads = (
                grads[0] / num_devices,
                grads[1] / num_devices,
                jax.lax.pmean(grads[2], "data"),
            )
        return value, grads

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, WHOLE, WHOLE, WHOLE),
        out_specs=(WHOLE, (rows, rows, WHOLE)),
        check_vma=check_vma,
    )
    cases = [random_case(weighting) for weighting in SOME_WEIGHTINGS]
    assert formulas.find_errors(jax.jit(mapped), cases) == []


def test_constant_weights(impl):
    constant = formulas.differentiate_on_mesh(
        loss_over("data", stop_weight_gradient=True, impl=impl), formulas.mesh_of(8)
    )
    cases = [case for case in formulas.CASES if case[0] in ("random", "aligned")]
    assert formulas.find_errors(constant, cases, constant_weights=True) == []
    hard = [random_case((1.0, 0.5))]
    assert formulas.find_errors(constant, hard, constant_weights=False)


def test_bfloat16_embeddings_are_multiplied_and_summed_in_float32(impl):
    rounded = [jnp.asarray(emb, jnp.bfloat16) for emb in formulas.embeddings("random")]
    truth = formulas.defining_loss(*(np.float64(emb) for emb in rounded), 100.0, 1.0, 0.25)
    step = formulas.differentiate_on_mesh(loss_over("data", impl=impl), formulas.mesh_of(8))
    value, grads = step(*rounded, 100.0, 1.0, 0.25)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, truth, rtol=1e-5)
    _, exact = step(*(np.float32(emb) for emb in rounded), 100.0, 1.0, 0.25)
    for grad, wide in zip(grads, exact, strict=True):
        tolerance = 8e-3 * np.abs(wide).max()  # from rounding the result
        np.testing.assert_allclose(np.float32(grad), wide, rtol=0, atol=tolerance)


def test_alpha_0_has_finite_gradients(impl):
    image_emb, text_emb = formulas.embeddings("random")
    value, grads = jax.jit(jax.value_and_grad(loss_over(None, impl=impl), argnums=(0, 1, 2)))(
        np.float32(image_emb), np.float32(text_emb), 100.0, 0.0, 0.5
    )
    truth = formulas.defining_loss(image_emb, text_emb, 100.0, 0.0, 0.5)
    np.testing.assert_allclose(value, truth, rtol=1e-5)
    for grad in grads:
        assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"impl": "steaming"}, "impl: expected one of auto, streaming, gathered.*'steaming'"),
        ({"beta": -0.1}, "beta: expected a finite number >= 0, got -0.1"),
        ({"logit_scale": np.ones(2)}, r"logit_scale: expected a scalar, got shape \(2,\)"),
    ],
)
def test_wrong_arguments(change, message):
    rows = np.ones((3, 4), np.float32)
    arguments = {"image_emb": rows, "text_emb": rows, "logit_scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)
