r"""Command: evaluate a model on zero-shot tasks, or compare results.

    python -m diht_jax.evaluate --model DIR --tasks cifar10,coco_retrieval --output results.json
    python -m diht_jax.evaluate --model DIR --tasks retrieval:/data/emoji_twitter.tar \
        --output results.json
    python -m diht_jax.evaluate --compare a.json b.json

`docs/guides/evaluate/evaluate.md` describes tasks, protocols and the results file. On several
hosts, run the same command on each of them (see `diht_jax.distributed`); the first one writes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from diht_jax import command_line, distributed
from diht_jax.evaluation.charts import draw_comparison
from diht_jax.evaluation.comparison import (
    LETTERS,
    PUBLISHED_PERCENT,
    format_comparison,
    published_results,
)
from diht_jax.evaluation.results import (
    begin_results,
    check_output,
    drawn_path,
    format_results,
    read_results,
    write_results,
)
from diht_jax.storage.files import refuse_url
from diht_jax.terminal import print_escaped

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.base import Task


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    command_line.define_prompt_flags()
    command_line.define_task_flags()
    distributed.define_flags()
    flags.DEFINE_string("output", None, "Results file (JSON); of --compare: the chart (PNG).")
    flags.DEFINE_integer(
        "num_resamples",
        1000,
        "Resamples for the confidence intervals; 0 for none.",
        lower_bound=0,
    )
    flags.DEFINE_alias("bootstrap", "num_resamples")
    flags.DEFINE_bool("pages", True, "Write the page with examples (HTML), or the chart.")
    flags.DEFINE_list(
        "compare", None, "Results files, A B ... or A,B,...: the others next to the first."
    )


def main(arguments: Sequence[str]) -> None:
    """Compares results, or evaluates a model; `arguments` are further files to compare."""
    given = flags.FLAGS
    if given.compare is not None:
        compare([*given.compare, *arguments], given.output, draw=given.pages)
        return
    if arguments:
        raise ValueError(f"unexpected arguments: {' '.join(arguments)}")
    command_line.require_flags("model", "tasks", "output")
    tasks = open_tasks(given.model, given.tasks, given.step)
    distributed.start_from_flags()
    results = evaluate_model(
        given.model,
        tasks,
        given.output,
        **command_line.values("batch_size", "num_threads", "limit", "num_resamples", "pages"),
        **command_line.model_options(),
    )
    if not distributed.is_first():
        return
    print_escaped(format_results(results))
    if given.model in PUBLISHED_PERCENT:
        published = published_results(given.model)
        print_escaped(f"\n{format_comparison(published, results)}")


def open_tasks(model: str, texts: Sequence[str], step: int | None = None) -> list[Task]:
    """Parses `--tasks`; "validation" stands for the held-out records of the run `model`.

    For a run in an object store, the checkpoint of `step` is copied, like in `load_model`.

    Raises:
        ValueError: a task is wrong, or the model is not a run with held-out records.
    """
    from diht_jax.evaluation.task_parsing import parse_tasks
    from diht_jax.evaluation.tasks import VALIDATION, validation_tasks

    defaults = command_line.task_defaults()
    if VALIDATION not in map(str.strip, texts):
        return parse_tasks(texts, **defaults)
    from etils import epath

    from diht_jax.training.workdir.saved_run import CONFIG_FILE, read_config
    from diht_jax.training.workdir.stored_run import local_run

    workdir = epath.Path(local_run(model, step))
    held_out = validation_tasks(read_config(workdir)) if (workdir / CONFIG_FILE).exists() else []
    if not held_out:
        raise ValueError(
            f"--tasks={VALIDATION} is what a run has held out, and --model={model} is no work "
            "directory of a run with config.data.validation_share; name a source: "
            "'retrieval:SOURCE'"
        )
    others = [text for text in texts if text.strip() != VALIDATION]
    return [*held_out, *parse_tasks(others, **defaults)]


def compare(files: Sequence[str], chart: str | None = None, *, draw: bool = True) -> None:
    """Prints two or more results files side by side, and draws them as a bar chart.

    The chart is a PNG; its default path is next to the last file.
    """
    if not 2 <= len(files) <= len(LETTERS):
        raise ValueError(
            f"--compare: expected two to {len(LETTERS)} results files, got "
            f"{' '.join(files) or 'none'}"
        )
    last = pathlib.Path(files[-1])
    path = pathlib.Path(chart or last.with_name(f"{last.stem}.compared.png"))
    if draw and path in map(pathlib.Path, files):
        raise ValueError(f"--output={path}: the chart would replace these results; name another")
    results = [read_results(file) for file in files]
    print_escaped(format_comparison(*results))
    if draw:
        draw_comparison(results, path)
        logging.info("chart: %s", path)


def evaluate_model(
    model: str,
    tasks: Sequence[Task],
    output: str | pathlib.Path,
    *,
    batch_size: int = 256,
    num_threads: int | None = None,
    limit: int | None = None,
    num_resamples: int = 1000,
    pages: bool = True,
    **model_options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks; the results file is written after every task.

    Args:
        model: argument of `load_model`.
        tasks: from `parse_tasks`.
        output: the results file (JSON).
        batch_size: number of images, and of texts, in a batch over all devices.
        num_threads: decoding threads; None is one per core, at most 16.
        limit: number of first entries of each source to use; None is all.
        num_resamples: for bootstrap intervals; 0 omits them.
        pages: whether to write a page (HTML) with metrics and examples next to the results.
        **model_options: arguments of `load_model`, such as `step` and `ema`.

    Returns:
        The contents of the results file.
    """
    refuse_url(output, "output")
    import jax

    from diht_jax.evaluation.page import ResultsPage
    from diht_jax.evaluation.task_parsing import open_source
    from diht_jax.evaluation.tasks import evaluate_task
    from diht_jax.loading import load_model
    from diht_jax.training.multihost import check_same_step

    # Reports a missing file before the model is loaded.
    sources = list(map(open_source, tasks))
    output, is_first = pathlib.Path(output), distributed.is_first()
    page_path = drawn_path(output, ".html") if pages else None
    if is_first:
        check_output(output, page_path)
    loaded = load_model(model, batch_size=batch_size, **model_options)
    check_same_step(loaded.step)
    results = {
        **begin_results(model, loaded, ema=model_options.get("ema", False)),
        "context_length": loaded.context_length,
        "embed_dim": loaded.embed_dim,
        "devices": jax.device_count(),
        "device_kind": jax.local_devices()[0].device_kind,
        "results": [],
    }
    page = ResultsPage(page_path) if page_path is not None and is_first else None
    for task, units in zip(tasks, sources, strict=True):
        result = evaluate_task(
            loaded,
            task,
            units=units,
            batch_size=batch_size,
            num_threads=num_threads,
            limit=limit,
            show=None if page is None else page.add,
            num_resamples=num_resamples,
            progress=is_first,
        )
        results["results"].append(result)
        if is_first:
            write_results(output, results)
        if page is not None:
            page.write(results)
        speed = f"{result['seconds']:.1f} s, {result['images_per_sec']:.0f} images/s"
        logging.info("task '%s': %d images in %s", task.name, result["counts"]["images"], speed)
    return results


if __name__ == "__main__":
    define_flags()
    flags.FLAGS.set_gnu_getopt()  # flags may follow the files of --compare
    command_line.run(main, takes_arguments=True)
