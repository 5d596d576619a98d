"""Watches a run for skipped updates, loss spikes and a saturated logit scale.

Skipping itself happens inside the jitted step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
from absl import logging

# A window's mean loss this far above the lowest one so far is called a spike.
SPIKE_FACTOR, SPIKE_MARGIN = 1.5, 0.5
# Keys of a batch that a message names; each may cost the decoding of a picture.
SHOWN_KEYS = 8


class DivergedError(ValueError):
    """The run stopped itself; its last checkpoint is intact."""


class AnomalyMonitor:
    """Watches a run's metrics, and logs or ends the run where they are wrong."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        keys_of_step: Callable[[int], str],
        *,
        lowest_loss: float = math.inf,
    ):
        """Starts to watch.

        Args:
            config: the whole training config.
            keys_of_step: names this process's records in the batch of a step, by `shown_keys`.
            lowest_loss: of the windows before, where a run is resumed.
        """
        self._max_in_a_row = config.max_skipped_steps
        self._max_logit_scale = config.optimizer.max_logit_scale
        self._keys_of_step = keys_of_step
        self._in_a_row = 0
        self._lowest_loss = lowest_loss
        self._scale_is_capped = False

    def check_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Reports a skipped update.

        Raises:
            DivergedError: `config.max_skipped_steps` in a row.
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
            self._keys_of_step(step),
        )
        if self._in_a_row >= self._max_in_a_row:
            raise DivergedError(
                f"{self._in_a_row} updates in a row were skipped, up to step {step}, because loss "
                "or gradients were not finite; the parameters and the last checkpoint are as "
                "before them. Look at the records above, at config.optimizer.learning_rate and "
                "warmup_steps, at config.model.dtype, and at where it begins with config.debug_nans"
            )

    def check_window(self, step: int, scalars: Mapping[str, float]) -> None:
        """Warns of a loss spike, and once of a logit scale that has reached its cap."""
        loss = scalars["loss"]
        if loss > SPIKE_FACTOR * self._lowest_loss + SPIKE_MARGIN:
            logging.warning(
                "step %d: loss %.4g, while it has been down to %.4g", step, loss, self._lowest_loss
            )
        if math.isfinite(loss):
            self._lowest_loss = min(self._lowest_loss, loss)
        is_capped = scalars["logit_scale"] >= 0.999 * self._max_logit_scale
        if is_capped and not self._scale_is_capped:
            logging.warning(
                "step %d: the logit scale has reached config.optimizer.max_logit_scale=%g",
                step,
                self._max_logit_scale,
            )
        self._scale_is_capped = is_capped


def shown_keys(keys: Sequence[str], num_records: int) -> str:
    """The first few keys of a batch, for a message."""
    rest = f" and {num_records - len(keys)} more" if num_records > len(keys) else ""
    return f"{', '.join(keys)}{rest}"
