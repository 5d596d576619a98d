"""The flags that say which model a command works with, the same in all of them.

Used by `evaluate`, `fewshot`, `search`, `embed` and `export`. What they mean is the business of
`loading`.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from diht_jax.config import parse_fields

flags.disclaim_key_flags()  # they are the command's own, and its --help lists them


def define_flags() -> None:
    """Defines `--model` and what may be said of it."""
    flags.DEFINE_string("model", None, "Released name, work directory or weight file.")
    flags.DEFINE_integer("step", None, "Checkpoint of a work directory; the latest by default.")
    flags.DEFINE_bool("ema", False, "Take the moving average of the parameters.")
    flags.DEFINE_integer(
        "image_size", None, "Resize the image positions to this size; the model's own by default."
    )
    flags.DEFINE_list(
        "architecture", [], "What a bare weight file does not tell: activation=quick_gelu,..."
    )


def model_options() -> dict[str, Any]:
    """Of the flags, what `load_model` takes beside the model itself."""
    given = flags.FLAGS
    return {
        "step": given.step,
        "ema": given.ema,
        "image_size": given.image_size,
        "architecture": parse_fields(given.architecture),
    }
