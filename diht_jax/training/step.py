"""One optimiser step, as a pure jitted function of (state, batch).

Built once by the training loop. What is measured goes into a dict of scalars; averaging and
writing them is the loop's work.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh

from diht_jax import sharding
from diht_jax.data.transforms import normalize
from diht_jax.losses.total import contrastive_objective
from diht_jax.models.parameters import merge_model
from diht_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class TrainStep:
    """`step(state, batch) -> (state, metrics)`; the old state is donated.

    Attributes:
        trace_count: how often the function was traced; more than once in a run is a defect.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: Mesh,
        config: ml_collections.ConfigDict,
        state: TrainState,
    ):
        """Prepares the jitted step.

        Args:
            graphdef: static half of the model, of `models.parameters.model_definition`.
            optimizer: as used to create `state`.
            schedule: the learning rate by step, for the metrics.
            mesh: axes `data` and `fsdp`.
            config: the whole training config.
            state: any state (or shapes with shardings) of the run.
        """
        self.trace_count = 0
        placement = jax.tree.map(lambda leaf: leaf.sharding, state)
        update = functools.partial(
            train_step,
            graphdef=graphdef,
            optimizer=optimizer,
            schedule=schedule,
            mesh=mesh,
            config=config,
        )

        def counted(state, batch):
            self.trace_count += 1
            return update(state, batch)

        self._jitted = jax.jit(
            counted, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh))
        )

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        """Runs the step.

        Args:
            state: donated.
            batch: `images` uint8 [N, h, w, 3] and `tokens` int32 [N, t], split over the mesh.

        Returns:
            The new state, and float32 scalars.
        """
        return self._jitted(state, batch)


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: ml_collections.ConfigDict,
) -> tuple[TrainState, Metrics]:
    """The pure step; see `TrainStep`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
    by_example = sharding.batch_sharding(mesh)

    def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
        # fsdp: parameters are stored in parts and gathered for use. Left to itself the compiler
        # would split the products instead and move activations around.
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        model = merge_model(graphdef, params)
        images = normalize(batch["images"], jnp.dtype(config.model.dtype))
        image_emb = model.encode_image(images, patch_dropout=config.model.patch_dropout, key=key)
        text_emb = model.encode_text(batch["tokens"])
        return contrastive_objective(
            jax.lax.with_sharding_constraint(image_emb, by_example),
            jax.lax.with_sharding_constraint(text_emb, by_example),
            jnp.exp(params["log_logit_scale"]),
            mesh=mesh,
            axis_names=sharding.BATCH_AXES,
            alpha=config.loss.alpha,
            beta=config.loss.beta,
            impl=config.loss.impl,
            stop_weight_gradient=config.loss.stop_weight_gradient,
        )

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params["log_logit_scale"] = jnp.minimum(
        params["log_logit_scale"], math.log(config.optimizer.max_logit_scale)
    )
    metrics = {
        **metrics,
        "logit_scale": jnp.exp(state.params["log_logit_scale"]),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    new_state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state, key_data=state.key_data
    )
    return new_state, metrics
