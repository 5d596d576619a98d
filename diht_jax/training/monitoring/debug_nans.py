"""Origin of numbers that are not finite (`config.debug_nans`).

After an update that was skipped, the step is computed once more, eagerly and with every module
watched; the step that trains stays as fast as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from diht_jax import sharding
from diht_jax.models.parameters import ModelDefinition
from diht_jax.models.transformer import Execution
from diht_jax.sharding import path_name
from diht_jax.training.monitoring.anomalies import DivergedError
from diht_jax.training.objective import active_terms
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import pictures_of
from diht_jax.training.state import TrainState
from diht_jax.training.step import encode_examples, loss_gradients, with_kept_patches

_NAMES_SHOWN = 5

IsFinite = Callable[[Any], bool]


class NonFiniteError(DivergedError):
    """Loss or gradients were not finite; the message names where it begins."""


def explain_nonfinite(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> str:
    """Looks for the first value that is not finite in the order of the computation.

    Modules are compared by their outputs, innermost first: `vision/blocks/3/mlp/fc_in` is named
    and not the block around it. All processes of a job must call.

    Returns:
        A sentence for people.
    """
    before = dataclasses.replace(state, step=state.step - 1)
    is_finite = _finite_check(program)
    where = _first_in_towers(program, config, before, batch, is_finite)
    where = where or _after_towers(program, config, before, batch, is_finite)
    bad = _nonfinite_names(before.params, is_finite)
    parameters = ""
    if bad:
        rest = f" and {len(bad) - _NAMES_SHOWN} more" if len(bad) > _NAMES_SHOWN else ""
        parameters = f"; parameters that are not finite: {', '.join(bad[:_NAMES_SHOWN])}{rest}"
    return f"the first value that is not finite is {where}{parameters}"


class _Found(Exception):
    """Ends the watched computation."""


def _first_in_towers(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
    is_finite: IsFinite,
) -> str | None:
    try:
        encoded = encode_examples(
            state.params,
            with_kept_patches(state, batch, program.arch, config.model.patch_dropout, program.mesh),
            definition=_watched(program.definition, is_finite),
            terms=active_terms(config),
            gather=None,
            pictures=pictures_of(config),
        )
    except _Found as found:
        return str(found)
    wrong = [name for name, value in encoded.items() if not is_finite(value)]
    return f"in {wrong[0]}, after the towers" if wrong else None


def _after_towers(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
    is_finite: IsFinite,
) -> str:
    execution = Execution(remat=config.model.remat, attention="xla")
    gradients = functools.partial(
        loss_gradients,
        definition=dataclasses.replace(program.definition, execution=execution),
        mesh=program.mesh,
        config=config,
    )
    grads, metrics, _ = jax.jit(gradients)(state, batch)
    wrong = [name for name in metrics if name.endswith("loss") and not is_finite(metrics[name])]
    if wrong:
        wrong.sort(key=lambda name: name == "loss")  # the sum of the others comes last
        return f"the {wrong[0].replace('_', ' ')} itself; the embeddings are finite"
    names = sorted(_nonfinite_names(grads, is_finite), key=_backward_order)
    if names:
        return (
            f"the gradient of {names[0]} (first in the order of the backward pass, of {len(names)} "
            "arrays); loss and activations are finite"
        )
    if not is_finite(optax.global_norm(grads)):
        return "the norm of the gradients: each of them is finite, but the sum of squares is not"
    return (
        "found nowhere when the step is computed once more without jit: it comes from how the "
        "step is compiled or from the hardware"
    )


def _watched(definition: ModelDefinition, is_finite: IsFinite) -> Any:
    """The definition of the same model with modules that look at what goes in and out."""
    plain = dataclasses.replace(definition, execution=Execution(attention="xla"))
    model = nnx.eval_shape(lambda: plain.build(jax.random.key(0), plain.execution))
    for path, module in list(nnx.iter_modules(model)):
        name = "/".join(map(str, path))
        if name and callable(module) and not isinstance(module, nnx.List):
            object.__setattr__(module, "__class__", _watching_class(type(module), name, is_finite))
    return _WatchedDefinition(plain, nnx.split(model, nnx.Param)[0])


def _watching_class(kind: type, name: str, is_finite: IsFinite) -> type:
    class Watching(kind):  # ty: ignore[unsupported-base]  # one of the model's classes
        def __call__(self, x, *args, **kwargs):
            if not is_finite(x):
                raise _Found(f"what goes into {name}")
            out = super().__call__(x, *args, **kwargs)
            if not is_finite(out):
                raise _Found(f"the output of {name}")
            return out

    return Watching


class _WatchedDefinition:
    """The part of a `ModelDefinition` that `merge_model` and `encode_examples` use."""

    def __init__(self, plain: ModelDefinition, graphdef: nnx.GraphDef):
        self.arch, self.dtype, self.execution = plain.arch, plain.dtype, plain.execution
        self.graphdef = graphdef


def _finite_check(program: TrainProgram) -> IsFinite:
    check = jax.jit(
        lambda x: jnp.isfinite(x).all(), out_shardings=sharding.replicated(program.mesh)
    )

    def is_finite(value: Any) -> bool:
        if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
            return True
        return bool(check(value))

    return is_finite


def _nonfinite_names(tree: Any, is_finite: IsFinite) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [path_name(path) for path, leaf in leaves if not is_finite(leaf)]


def _backward_order(name: str) -> tuple[int, int]:
    """Small for what the backward pass reaches early: heads, then blocks from the top down."""
    block = re.search(r"/blocks/(\d+)/", name)
    if block:
        return 1, -int(block[1])
    return (2, 0) if "embedding" in name else (0, 0)
