"""Command: CAT-filter image-text pairs of any source into TFRecord shards.

    python -m data_prep.filter --config configs/prep/cat.py \\
        --config.input='/data/raw/*.tar' --config.output=/data/kept
    python -m data_prep.filter --explain "a black cat is chasing a small brown bird"

Run again, it does only what is not done yet. For a job array add `--task_index=I --num_tasks=N`:
every job takes its share of the shards, and whichever sees all of them done writes the summary.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from data_prep import cat, shards, sources
from data_prep.engine import run_tasks
from data_prep.funnel import Funnel
from diht_jax import command_line
from diht_jax.config import validate_config
from diht_jax.data.dataset_info import write_dataset_info

_CONFIG = config_flags.DEFINE_config_file("config", None, "Such as configs/prep/cat.py.")
_EXPLAIN = flags.DEFINE_string("explain", None, "Print graph and decision for this caption.")
_TASK_INDEX = flags.DEFINE_integer("task_index", 0, "Number of this job of a job array, from 0.")
_NUM_TASKS = flags.DEFINE_integer("num_tasks", 1, "Jobs in the array.")


def main() -> None:
    """Runs what the flags ask for."""
    config = _CONFIG.value if _CONFIG.value is not None else cat.default_config()
    validate_config(config, cat.default_config())
    cat.check_config(config)
    if _EXPLAIN.value is not None:
        print(explain(_EXPLAIN.value, config))
        return
    if _CONFIG.value is None:
        raise ValueError("--config is not set: expected a file such as configs/prep/cat.py")
    failures = run_filter(config, _TASK_INDEX.value, _NUM_TASKS.value)
    if failures:
        sys.exit(1)


def explain(caption: str, config: ml_collections.ConfigDict) -> str:
    """The graph of a caption and the decision, as text.

    Args:
        caption: any text.
        config: its C and A decide.
    """
    from data_prep.captions import format_graph, parse_captions

    return format_graph(parse_captions([caption])[0], **cat.caption_limits(config))


def run_filter(
    config: ml_collections.ConfigDict, task_index: int = 0, num_tasks: int = 1
) -> dict[str, str]:
    """Filters what is not filtered yet, and prints the funnel.

    Args:
        config: a valid one of `cat.default_config`.
        task_index: number of this job.
        num_tasks: jobs that share the work.

    Returns:
        Sources that failed, with the reason; the other shards are complete.

    Raises:
        ValueError: nothing to read, nowhere to write, or no pair was kept.
    """
    inputs = sources.list_sources(config.input, config.source)
    folder = sources.check_output(config.output, inputs)
    tasks = shards.plan_tasks(
        inputs,
        folder,
        dataset=config.dataset_name,
        split=config.split,
        config_hash=cat.hash_config(config),
    )
    mine = sources.take_share(tasks, task_index, num_tasks)
    pending = [task for task in mine if shards.load_finished(task) is None]
    if pending:
        shards.remove_merged(folder)
    logging.info("%d shards, %d of them done before", len(mine), len(mine) - len(pending))
    function = functools.partial(cat.filter_shard, config=config)
    failures = {}
    for outcome in run_tasks(function, pending, num_workers=config.num_workers, label="filter"):
        if outcome.error is not None:
            failures[str(outcome.task.source)] = outcome.error
            logging.error("%s failed: %s", outcome.task.source, outcome.error)
    _summarize(config, tasks, mine, folder)
    for source, error in failures.items():
        print(f"failed: {source}: {error}", file=sys.stderr)
    return failures


def _summarize(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
) -> None:
    """Prints the funnel; writes the folder's metadata when every shard of every job is done."""
    finished = [shards.load_finished(task) for task in tasks]
    done = [stats for stats in finished if stats is not None]
    funnel = Funnel(config.samples_per_outcome, config.seed)
    for stats in done:
        funnel.merge(Funnel.from_json(stats["counts"], funnel.samples_per_outcome, funnel.seed))
    if done:
        print(funnel.format_table())
    if len(done) < len(tasks):
        print(
            f"{len(done)} of {len(tasks)} shards are done; run the command again, or wait for the "
            "other jobs"
        )
        return
    if not funnel.kept:
        raise ValueError(
            f"none of the {funnel.read} pairs of '{config.input}' was kept; the reasons are in the "
            f"table above, examples in {folder}/*{shards.STATS_SUFFIX}"
        )
    _write_metadata(config, done, funnel, folder)
    print(f"{funnel.kept:,} pairs in {len(tasks)} shards: {folder}")


def _write_metadata(
    config: ml_collections.ConfigDict, done: list[dict[str, Any]], funnel: Funnel, folder: str
) -> None:
    merged = {
        "config": cat.record_settings(config),
        "input": config.input,
        "config_hash": done[0]["config_hash"],
        "shards": len(done),
        "counts": funnel.to_json(),
    }
    shards.write_json(pathlib.Path(folder) / shards.MERGED_STATS, merged)
    write_dataset_info(
        folder,
        dataset=config.dataset_name,
        split=config.split,
        shard_lengths=[stats["output"]["records"] for stats in done],
        num_bytes=sum(stats["output"]["bytes"] for stats in done),
        image_formats=funnel.image_formats,
        description=f"Image-text pairs of {config.input}, by data_prep.filter.",
    )


if __name__ == "__main__":
    command_line.run(main)
