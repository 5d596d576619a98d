r"""Command: few-shot linear probing, initialised from the prompts and from scratch.

    python -m diht_jax.fewshot --model runs/b32 --task cifar10 \
        --train cifar10_train.tar --test cifar10_test.tar --output fewshot.json

Writes the JSON file and, next to it, a plot. On a cluster, run the same command on every host: each
reads a part of the images, and the first one writes. `docs/guides/evaluate/few_shot.md` describes
the protocol.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from absl import flags

from diht_jax import command_line, distributed
from diht_jax.terminal import print_escaped


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    command_line.define_prompt_flags()
    distributed.define_flags()
    flags.DEFINE_string("train", None, "Source the shots are drawn from; options after '?'.")
    flags.DEFINE_string("test", None, "Source the accuracy is measured on; options after '?'.")
    flags.DEFINE_string(
        "validation", None, "Source the settings are chosen on; unset: a part of --train."
    )
    flags.DEFINE_string("output", None, "Results file (JSON) to write; the plot goes next to it.")
    flags.DEFINE_string(
        "task",
        None,
        "Built-in task whose class names and templates to take, or NAME=classification; options "
        "after '?', such as '?class_names=FILE'.",
    )
    flags.DEFINE_list("shots", ["1", "2", "4", "8", "16", "all"], "Training images a class.")
    flags.DEFINE_integer("num_draws", 5, "How often the shots are drawn.", lower_bound=1)
    flags.DEFINE_alias("draws", "num_draws")
    flags.DEFINE_integer("seed", 0, "Of the draws and of the validation split.", lower_bound=0)
    flags.DEFINE_float("validation_fraction", 0.2, "Share of --train held out, class by class.")
    flags.register_validator(
        "validation_fraction", lambda given: 0 < given < 1, "expected a number between 0 and 1"
    )
    flags.DEFINE_integer(
        "validation_per_class", None, "Most images to hold out; unset: no limit.", lower_bound=1
    )
    flags.DEFINE_integer("num_steps", 500, "Gradient steps of a fit.", lower_bound=1)
    flags.DEFINE_alias("fit_steps", "num_steps")
    flags.DEFINE_list(
        "alphas",
        [],
        "WiSE-FT of the classifier: weights of the fitted one in its mean with the zero-shot one.",
    )


def main() -> None:
    """Evaluates few-shot accuracy, and writes and prints the results."""
    from diht_jax.evaluation.task_parsing import open_source

    given = flags.FLAGS
    command_line.require_flags("model", "train", "test", "output", "shots")
    options = _options()
    tasks = _tasks()
    for task in tasks.values():
        open_source(task)  # reports a missing file before the model is loaded
    distributed.start_from_flags()
    from diht_jax.evaluation.charts import draw_few_shot
    from diht_jax.evaluation.embedding.encoding import Batching
    from diht_jax.evaluation.embedding.entries import Processes
    from diht_jax.evaluation.few_shot import evaluate_few_shot, format_few_shot
    from diht_jax.evaluation.results import begin_results, check_output, drawn_path, write_results
    from diht_jax.loading import load_model
    from diht_jax.training.multihost import check_same_step

    output, is_first = pathlib.Path(given.output), distributed.is_first()
    plot = drawn_path(output, ".png")
    if is_first:
        check_output(output, plot)
    model = load_model(given.model, **command_line.model_options(), batch_size=given.batch_size)
    check_same_step(model.step)
    batching = Batching(given.batch_size, given.num_threads, is_first, Processes.of_job())
    result = {
        **begin_results(given.model, model, ema=given.ema),
        **evaluate_few_shot(model, **tasks, options=options, batching=batching),
    }
    if not is_first:
        return
    write_results(output, result)
    draw_few_shot(result, plot)
    print_escaped(format_few_shot(result))


def _options():
    from diht_jax.evaluation.few_shot import ALL, FewShotOptions

    shots = []
    for text in flags.FLAGS.shots:
        if text != ALL and not re.fullmatch("0*[1-9][0-9]*", text):
            raise ValueError(f"--shots: expected numbers from 1 or '{ALL}', got '{text}'")
        shots.append(text if text == ALL else int(text))
    names = ("num_draws", "seed", "validation_fraction", "validation_per_class", "num_steps")
    alphas = command_line.fractions("alphas")
    return FewShotOptions(tuple(shots), **command_line.values(*names), alphas=alphas)


def _tasks() -> dict[str, Any]:
    """Returns the given splits as classification tasks with the same prompts."""
    from diht_jax.evaluation.suite import CLASSIFICATION
    from diht_jax.evaluation.task_parsing import parse_tasks

    given, defaults, tasks = flags.FLAGS, command_line.task_defaults(), {}
    for name in ("train", "validation", "test"):
        source = given[name].value
        if source is not None:
            (tasks[name],) = parse_tasks([task_text(given.task, source)], **defaults)
            if tasks[name].kind != CLASSIFICATION:
                raise ValueError(f"--task {given.task}: expected a classification task")
    return tasks


def task_text(task: str | None, source: str) -> str:
    """Returns one split in the syntax of `parse_tasks`.

    Args:
        task: the flag `--task`: a built-in task, or [NAME=]KIND; options after "?".
        source: source of the split; its options after "?" take precedence over the task's.
    """
    from diht_jax.evaluation.protocols.registry import PROTOCOLS
    from diht_jax.evaluation.suite import CLASSIFICATION, TASKS_BY_NAME

    options_begin = r"\?(?=\w+=)"  # a "?" alone also stands in globs
    body, *of_task = re.split(options_begin, task or CLASSIFICATION, maxsplit=1)
    path, *of_source = re.split(options_begin, source, maxsplit=1)
    name, equals, kind = body.rpartition("=")
    is_kind = kind in PROTOCOLS and body not in TASKS_BY_NAME
    if ":" in body or (equals and not (name and is_kind)):
        raise ValueError(
            f"--task='{task}': expected a built-in task such as cifar10, or NAME={CLASSIFICATION}; "
            "its pictures are those of --train and --test"
        )
    options = "&".join([*of_task, *of_source])
    return f"{body}{':' if is_kind else '='}{path}" + (f"?{options}" if options else "")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
