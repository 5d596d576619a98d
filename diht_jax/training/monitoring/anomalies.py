"""Watches a run for skipped updates, loss spikes and a saturated logit scale.

The jitted step itself skips non-finite updates. With `config.debug_nans` the step of a skipped
update is recomputed eagerly, with every module watched, to find the first non-finite values; the
training step stays as fast as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import logging
from etils import epath
from flax import nnx

from diht_jax.models.parameters import ModelDefinition
from diht_jax.models.transformer import Execution
from diht_jax.sharding import path_name
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.objective import active_terms
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import pictures_of
from diht_jax.training.step import TrainState, encode_examples, loss_gradients, with_kept_patches

# A window whose mean loss exceeds the lowest one so far by this much is called a spike.
SPIKE_FACTOR, SPIKE_MARGIN = 1.5, 0.5
# Keys of a batch that a message shows; each may cost decoding a picture.
SHOWN_KEYS = 8
_NAMES_SHOWN = 5


class DivergedError(ValueError):
    """The run stopped itself; its last checkpoint is intact."""


@dataclasses.dataclass
class AnomalyMonitor:
    """Watches a run's metrics; warns about or ends a run that goes wrong."""

    config: ml_collections.ConfigDict
    keys_of_step: Callable[[int], str]  # names this process's records in the batch of a step
    lowest_loss: float = math.inf  # over earlier windows, for a resumed run
    _in_a_row: int = 0
    _scale_is_capped: bool = False

    def check_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Reports a skipped update.

        Raises:
            DivergedError: `config.max_skipped_steps` updates in a row were skipped.
        """
        if not float(metrics["skipped"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        logging.warning(
            "step %d: update skipped, loss %.4g and gradient norm %.4g are not both finite; "
            "the batch's records: %s",
            step,
            float(metrics["loss"]),
            float(metrics["grad_norm"]),
            self.keys_of_step(step),
        )
        if self._in_a_row >= self.config.max_skipped_steps:
            raise DivergedError(
                f"{self._in_a_row} updates in a row were skipped, up to step {step}, because loss "
                "or gradients were not finite; the parameters and the last checkpoint are as "
                "before them. Look at the records above, at config.optimizer.learning_rate and "
                "warmup_steps, at config.model.dtype, and at where it begins with config.debug_nans"
            )

    def check_window(self, step: int, scalars: Mapping[str, float]) -> None:
        """Warns of a loss spike, and once of a logit scale that reached its cap."""
        loss = scalars["loss"]
        # A loss without its positive in the denominator (alpha 0) falls below 0.
        rise = (SPIKE_FACTOR - 1) * max(self.lowest_loss, 0.0) + SPIKE_MARGIN
        if loss > self.lowest_loss + rise:
            logging.warning(
                "step %d: loss %.4g, while it has been down to %.4g", step, loss, self.lowest_loss
            )
        if math.isfinite(loss):
            self.lowest_loss = min(self.lowest_loss, loss)
        most = self.config.optimizer.max_logit_scale
        is_capped = scalars["logit_scale"] >= 0.999 * most
        if is_capped and not self._scale_is_capped:
            logging.warning(
                "step %d: the logit scale has reached config.optimizer.max_logit_scale=%g",
                step,
                most,
            )
        self._scale_is_capped = is_capped


def lowest_loss(workdir: epath.Path, start_step: int) -> float:
    """Returns the lowest loss in a run's metrics up to a step.

    Process 0 removes later lines, but the other processes may still see them.
    """
    rows = read_metrics(workdir)
    losses = (row["loss"] for row in rows if row["step"] <= start_step and "loss" in row)
    return min(filter(math.isfinite, losses), default=math.inf)


class NonFiniteError(DivergedError):
    """Loss or gradients were not finite; the message says where it starts."""


def explain_nonfinite(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> str:
    """Finds the first non-finite value in the order of the computation.

    Compares the outputs of modules, innermost first: it names `vision/blocks/3/mlp/fc_in` and not
    the block around it. All processes of a job must call it.

    Returns:
        A sentence for the user.
    """
    before = dataclasses.replace(state, step=state.step - 1)
    where = _first_in_towers(program, config, before, batch)
    where = where or _after_towers(program, config, before, batch)
    bad = _nonfinite_names(before.params)
    parameters = ""
    if bad:
        rest = f" and {len(bad) - _NAMES_SHOWN} more" if len(bad) > _NAMES_SHOWN else ""
        parameters = f"; parameters that are not finite: {', '.join(bad[:_NAMES_SHOWN])}{rest}"
    return f"the first value that is not finite is {where}{parameters}"


class _Found(Exception):
    """Aborts the watched computation."""


def _first_in_towers(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> str | None:
    watched: Any = _WatchedDefinition(program.definition)
    try:
        encoded = encode_examples(
            state.params,
            with_kept_patches(state, batch, program.arch, config.model.patch_dropout, program.mesh),
            definition=watched,
            terms=active_terms(config),
            gather=None,
            pictures=pictures_of(config),
        )
    except _Found as found:
        return str(found)
    wrong = [name for name, value in encoded.items() if not _is_finite(value)]
    return f"in {wrong[0]}, after the towers" if wrong else None


def _after_towers(
    program: TrainProgram,
    config: ml_collections.ConfigDict,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> str:
    execution = Execution(remat=config.model.remat, attention="xla")
    gradients = functools.partial(
        loss_gradients,
        definition=dataclasses.replace(program.definition, execution=execution),
        mesh=program.mesh,
        config=config,
    )
    grads, metrics, _ = jax.jit(gradients)(state, batch)
    wrong = [name for name in metrics if name.endswith("loss") and not _is_finite(metrics[name])]
    if wrong:
        wrong.sort(key=lambda name: name == "loss")  # the sum of the others comes last
        return f"the {wrong[0].replace('_', ' ')} itself; the embeddings are finite"
    names = sorted(_nonfinite_names(grads), key=_backward_order)
    if names:
        return (
            f"the gradient of {names[0]} (first in the order of the backward pass, of {len(names)} "
            "arrays); loss and activations are finite"
        )
    if not _is_finite(optax.global_norm(grads)):
        return "the norm of the gradients: each of them is finite, but the sum of squares is not"
    return (
        "found nowhere when the step is computed once more without jit: it comes from how the "
        "step is compiled or from the hardware"
    )


def _watching_class(kind: type, name: str) -> type:
    class Watching(kind):  # ty: ignore[unsupported-base]  # one of the model's classes
        def __call__(self, x, *args, **kwargs):
            if not _is_finite(x):
                raise _Found(f"what goes into {name}")
            out = super().__call__(x, *args, **kwargs)
            if not _is_finite(out):
                raise _Found(f"the output of {name}")
            return out

    return Watching


class _WatchedDefinition:
    """A definition of the same model whose modules check their inputs and outputs."""

    def __init__(self, plain: ModelDefinition):
        self.arch, self.dtype, self.execution = plain.arch, plain.dtype, Execution(attention="xla")
        self._plain = plain

    def build(self, key: jax.Array, execution: Execution) -> nnx.Module:
        """See `ModelDefinition`; `merge_model` calls it to build the model."""
        model = self._plain.build(key, execution)
        for path, module in list(nnx.iter_modules(model)):
            name = "/".join(map(str, path))
            if name and callable(module) and not isinstance(module, nnx.List):
                object.__setattr__(module, "__class__", _watching_class(type(module), name))
        return model


def _is_finite(value: Any) -> bool:
    is_floating = jnp.issubdtype(jnp.result_type(value), jnp.inexact)
    return not is_floating or bool(_all_finite(value))


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _nonfinite_names(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [path_name(path) for path, leaf in leaves if not _is_finite(leaf)]


def _backward_order(name: str) -> tuple[int, int]:
    """Sorts by the order of the backward pass: heads first, then blocks from the top down."""
    block = re.search(r"/blocks/(\d+)/", name)
    if block:
        return 1, -int(block[1])
    return (2, 0) if "embedding" in name else (0, 0)
