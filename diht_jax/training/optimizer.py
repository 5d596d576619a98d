"""The optimiser of a recipe: clipped AdamW with warm-up and cosine decay.

Built once by the training loop from the config section `optimizer` (paper note sec. 6).
"""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
import optax


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


def decay_mask(params: Any) -> Any:
    """True for matrices and higher; biases, LayerNorm, class token and scale are not decayed.

    Positional embeddings are matrices by shape and are decayed, as in open_clip.
    """
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def create_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW with decoupled decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_global_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
