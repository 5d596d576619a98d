"""Flags shared by several commands.

They follow one convention. Names are in lower_snake_case, and a name means the same in all
commands: `--input` is what is read, `--output` what is written, `num_` starts a count of things,
`--batch_size` counts examples over all devices. A help text states the unit and what an unset flag
means. A renamed flag keeps its old spelling as an alias.
"""

from __future__ import annotations

import math
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # each command's --help lists them as its own flags


def define_model_flags() -> None:
    """Defines `--model` and its related flags."""
    flags.DEFINE_string(
        "model", None, "clipart_tiny, a released name, a run, a weight file, or hf-hub:OWNER/NAME."
    )
    flags.DEFINE_integer("step", None, "Checkpoint of a work directory; unset: the latest.")
    flags.DEFINE_bool("ema", False, "Take the moving average of the parameters.")
    flags.DEFINE_integer(
        "image_size", None, "Resize the image positions to it, in pixels; unset: the model's own."
    )
    flags.DEFINE_integer(
        "context_length",
        None,
        "Stretch the text positions to this many tokens; unset: the model's.",
    )
    flags.DEFINE_integer("dim", None, "First numbers of the embeddings to take; unset: all.")
    flags.DEFINE_list(
        "architecture", [], "What a bare weight file does not hold: activation=quick_gelu,..."
    )


def model_options() -> dict[str, Any]:
    """Returns the arguments of `load_model` other than the model, from the flags."""
    from diht_jax.models.zoo import parse_fields  # imports JAX, which `--help` need not wait for

    return {
        **values("step", "ema", "image_size", "context_length", "dim"),
        "architecture": parse_fields(flags.FLAGS.architecture),
    }


def define_encoding_flags() -> None:
    """Defines the flags of the commands that encode a source of images."""
    flags.DEFINE_integer(
        "batch_size", 256, "Images, or texts, a batch, over all devices.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_threads", None, "Decoding threads; unset: one per core, at most 16.", lower_bound=1
    )


def define_prompt_flags() -> None:
    """Defines the flags for the words of a zero-shot classifier."""
    flags.DEFINE_string("class_names", None, "File with one class name a line, in label order.")
    flags.DEFINE_string(
        "templates", None, "'a photo of a {}.;a drawing of a {}.', @FILE, cifar10 or imagenet."
    )


def define_task_flags() -> None:
    """Defines `--tasks` and its related flags, except those for prompts."""
    flags.DEFINE_list(
        "tasks",
        [],
        "Comma-separated: cifar10, imagenet, coco_retrieval, flickr30k_retrieval=SOURCE, "
        "classification:SOURCE, retrieval:SOURCE, clip_benchmark:DIR, NAME=KIND:SOURCE; options "
        "after '?'. docs/reference/tasks.md lists them.",
    )
    flags.DEFINE_string(
        "caption_template",
        None,
        "Prompt around a caption, '{caption}' for none; unset: that of the model's training, or of "
        "a benchmark its own.",
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "Only this many pairs of each task, the first ones; unset: all.",
        lower_bound=1,
    )


def task_defaults() -> dict[str, Any]:
    """Returns the arguments of `parse_tasks` other than the tasks, from the flags."""
    from diht_jax.evaluation.protocols.base import parse_templates, read_class_names

    found: dict[str, Any] = {}
    parsers = {"class_names": read_class_names, "templates": parse_templates}
    for name in ("class_names", "templates", "caption_template"):
        text: Any = flags.FLAGS[name].value if name in flags.FLAGS else None
        if text is not None:
            found[name] = parsers[name](text) if name in parsers else text
    return found


def define_job_array_flags() -> None:
    """Defines the flags that divide a command's shards between the jobs of an array."""
    flags.DEFINE_integer("task_index", 0, "Number of this job of a job array, from 0.")
    flags.DEFINE_integer("num_tasks", 1, "Jobs in the array.")
    flags.register_multi_flags_validator(
        ["task_index", "num_tasks"],
        lambda given: 0 <= given["task_index"] < given["num_tasks"],
        "expected a number from 0 to --num_tasks minus 1 as --task_index",
    )


def values(*names: str) -> dict[str, Any]:
    """Returns the values of flags by name, as keyword arguments with the same names."""
    return {name: flags.FLAGS[name].value for name in names}


def fractions(name: str) -> tuple[float, ...]:
    """Returns the numbers from 0 to 1 in a list flag; raises ValueError for anything else."""
    texts: Any = flags.FLAGS[name].value
    try:
        found = tuple(map(float, texts))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= value <= 1 for value in found):
        raise ValueError(f"--{name}={','.join(texts)}: expected numbers from 0 to 1")
    return found


def require_flags(*names: str) -> None:
    """Raises ValueError for a flag that is not set; unlike a required flag, it permits `--help`."""
    for name in names:
        if not flags.FLAGS[name].value:
            raise ValueError(f"--{name} is required")
