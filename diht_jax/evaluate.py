"""Command: evaluate a model on zero-shot tasks, or compare results.

    python -m diht_jax.evaluate --model DIR --tasks cifar10,coco_retrieval --output results.json
    python -m diht_jax.evaluate --model DIR --tasks retrieval:/data/emoji_twitter.tar \
        --caption_template "{caption}" --output results.json
    python -m diht_jax.evaluate --compare a.json b.json

`docs/evaluation.md` describes tasks, protocols and the results file. On several hosts the same
command runs on each of them (see `diht_jax.distributed`), and the first one writes.
"""

from __future__ import annotations

import datetime
import pathlib
import re
import sys
from typing import Any

from absl import flags, logging

from diht_jax import command_line, distributed
from diht_jax.evaluation.pages.comparison import draw_comparison
from diht_jax.evaluation.results import (
    LETTERS,
    format_comparison,
    format_results,
    published_results,
    read_results,
    write_results,
)

command_line.define_model_flags()
_TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Comma-separated: cifar10, imagenet, coco_retrieval, flickr30k_retrieval=SOURCE, "
    "classification:SOURCE, retrieval:SOURCE, clip_benchmark:DIR, NAME=KIND:SOURCE; options after "
    "'?'. docs/evaluation.md lists them.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Results file (JSON) to write; of --compare: the chart."
)
_CLASS_NAMES = flags.DEFINE_string(
    "class_names", None, "File with one class name a line, in label order."
)
_TEMPLATES = flags.DEFINE_string(
    "templates", None, "'a photo of a {}.;a drawing of a {}.', @FILE, cifar10 or imagenet."
)
_CAPTION_TEMPLATE = flags.DEFINE_string(
    "caption_template",
    None,
    "Retrieval prompt, 'a photo of {caption}.' by default; '{caption}' for none.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images a batch, over all devices.")
_NUM_THREADS = flags.DEFINE_integer("num_threads", None, "Decoding threads; one per core.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first so many pairs of each task.")
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 1000, "Resamples for the confidence intervals; 0 for none."
)
_PAGES = flags.DEFINE_bool("pages", True, "Write PNG pages: one a task, or the chart.")
_COMPARE = flags.DEFINE_list(
    "compare", None, "Results files, A B ... or A,B,...: the others beside the first."
)


def main() -> None:
    """Compares results, or evaluates a model."""
    if _COMPARE.value is not None:
        compare()
        return
    for name in ("model", "tasks", "output"):
        if not flags.FLAGS[name].value:
            raise ValueError(f"--{name} is required (or --compare A.json B.json)")
    results = evaluate()
    if not _writes():
        return
    print(format_results(results))
    published = published_results(flags.FLAGS.model)
    if published is not None:
        print(f"\n{format_comparison(published, results)}")


def compare() -> None:
    """Prints results side by side, and draws them as bars."""
    files = _COMPARE.value
    if not 2 <= len(files) <= len(LETTERS):
        raise ValueError(
            f"--compare: expected two to {len(LETTERS)} results files, got "
            f"{' '.join(files) or 'none'}"
        )
    results = [read_results(file) for file in files]
    print(format_comparison(*results))
    if _PAGES.value:
        last = pathlib.Path(files[-1])
        chart = pathlib.Path(_OUTPUT.value or last.with_name(f"{last.stem}.compared.png"))
        draw_comparison(results, chart)
        logging.info("chart: %s", chart)


def evaluate() -> dict[str, Any]:
    """Runs the tasks of the flags; the results file is complete after every task."""
    from diht_jax.evaluation.task_parsing import check_source, parse_tasks

    tasks = parse_tasks(_TASKS.value, **_task_defaults())
    for task in tasks:
        check_source(task)  # a missing file should not have to wait for the model
    distributed.start_from_flags()
    import jax

    from diht_jax.evaluation.tasks import evaluate_task
    from diht_jax.loading import load_model

    model = load_model(
        flags.FLAGS.model,
        **command_line.model_options(),
        batch_size=_BATCH_SIZE.value,
        devices=jax.devices(),
    )
    output = pathlib.Path(_OUTPUT.value)
    results = {
        "model": flags.FLAGS.model,
        "step": model.step,
        "ema": flags.FLAGS.ema,
        "fingerprint": model.fingerprint(),
        "image_size": model.image_size,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": jax.device_count(),
        "device_kind": jax.local_devices()[0].device_kind,
        "results": [],
    }
    for task in tasks:
        page = output.with_name(f"{output.stem}.{task.name}.png")
        result = evaluate_task(
            model,
            task,
            batch_size=_BATCH_SIZE.value,
            num_threads=_NUM_THREADS.value,
            limit=_LIMIT.value,
            page=page if _PAGES.value and _writes() else None,
            num_resamples=_BOOTSTRAP.value,
            progress=_writes(),
        )
        results["results"].append(result)
        if _writes():
            write_results(output, results)
        logging.info(
            "task '%s': %d images in %.1f s, %.0f images/s",
            task.name,
            result["counts"]["images"],
            result["seconds"],
            result["images_per_sec"],
        )
    return results


def _writes() -> bool:
    """Whether this process writes and prints; one of a job is enough."""
    import jax

    return jax.process_index() == 0


def _task_defaults() -> dict[str, Any]:
    from diht_jax.evaluation.prompts import parse_templates, read_class_names

    defaults = {}
    if _CLASS_NAMES.value is not None:
        defaults["class_names"] = read_class_names(_CLASS_NAMES.value)
    if _TEMPLATES.value is not None:
        defaults["templates"] = parse_templates(_TEMPLATES.value)
    if _CAPTION_TEMPLATE.value is not None:
        defaults["caption_template"] = _CAPTION_TEMPLATE.value
    return defaults


def _join_compared_files(arguments: list[str]) -> list[str]:
    """`--compare A B` -> `--compare=A,B`: absl takes one value per flag."""
    joined = list(arguments)
    for i, argument in enumerate(arguments[:-1]):
        if re.fullmatch("--?compare", argument):
            end = next(
                (j for j in range(i + 1, len(joined)) if joined[j].startswith("-")), len(joined)
            )
            joined[i:end] = [f"--compare={','.join(joined[i + 1 : end])}"]
            break
    return joined


if __name__ == "__main__":
    distributed.define_flags()
    sys.argv[1:] = _join_compared_files(sys.argv[1:])
    command_line.run(main)
