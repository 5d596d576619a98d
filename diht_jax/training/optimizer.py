"""The optimiser of a recipe: clipped AdamW with warm-up and cosine decay.

Built once by the training loop from the config section `optimizer` (paper note sec. 6). Which
parameters it trains, and with which factors, is the table of `update_rules`.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
import optax

from diht_jax.sharding import path_name
from diht_jax.training.update_rules import UpdateRule, split_parameters, update_rules


def learning_rate_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then half a cosine down to the final value.

    Args:
        config: the section `optimizer`.
        total_steps: length of the run, warm-up included.

    Raises:
        ValueError: the warm-up is not shorter than the run.
    """
    if not 0 <= config.warmup_steps < total_steps:
        raise ValueError(
            f"config.optimizer.warmup_steps={config.warmup_steps}: expected less than the "
            f"{total_steps} steps of the run; shorten the warm-up or train longer"
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.final_learning_rate,
    )


def create_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW with the factors of `update_rules.update_rules`.

    `init(params)` takes all parameters and makes moments for the trained ones only.
    `update(grads, state, params)` takes gradients of the trained ones
    (`update_rules.split_parameters`) and all parameters, and returns updates of the trained ones.

    Args:
        config: the section `optimizer`.
        schedule: the learning rate by step.
    """
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_global_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        _decay_and_scale(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )

    def init(params: dict[str, Any]) -> optax.OptState:
        return inner.init(split_parameters(config, params)[0])

    def update(grads: dict[str, Any], state: optax.OptState, params: dict[str, Any]):
        rules = update_rules(config, params)
        return inner.update(grads, state, split_parameters(config, params)[0], rules=rules)

    return optax.GradientTransformation(init, update)


def _decay_and_scale(weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """`factor * (update + weight_decay * parameter)` with each parameter's own two factors."""

    def update(updates, state, params, *, rules: dict[str, UpdateRule]):
        def apply(path, update, param):
            rule = rules[path_name(path)]
            if decay := weight_decay * rule.weight_decay:
                update = update + decay * param
            return rule.learning_rate * update

        return jax.tree_util.tree_map_with_path(apply, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
