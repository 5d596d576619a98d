r"""Command: CAT-filter image-text pairs of any source into TFRecord shards.

    python -m data_prep.filter --config prep/cat \
        --config.input='/data/raw/*.tar' --config.output=/data/kept
    python -m data_prep.filter --explain "a black cat is chasing a small brown bird"
    python -m data_prep.filter --config prep/cat --config.min_complexity=2 \
        --replay=/data/kept

Run again, it does only what is not done yet. `--engine=ray` runs it on a Ray cluster. For a job
array add `--task_index=I --num_tasks=N`: every job takes its share of the shards, and whichever
sees all of them done writes the output shards and the report. What was made with another config is
made again with `--overwrite` only, and so is what was made of other inputs, where these are more
than `config.max_changed_shards`. `--replay` reads the decisions of a
finished folder and no input, and decides anew by the limits of the config; without a config by its
own.
"""

from __future__ import annotations

import os
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from data_prep.filtering import config as filter_config
from data_prep.filtering import job as filter_job
from data_prep.filtering import replay
from data_prep.jobs.engine import ENGINES
from data_prep.jobs.failures import Failures
from data_prep.steps.cat import caption_limits
from diht_jax import command_line
from diht_jax.config.checks import validate_config
from diht_jax.terminal import print_escaped


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    config_flags.DEFINE_config_file("config", None, "Recipe: a name such as prep/cat, or a path.")
    flags.DEFINE_string("explain", None, "Print graph and decision for this caption.")
    flags.DEFINE_string("replay", None, "Finished folder: decide anew by the config, print funnel.")
    flags.DEFINE_string("lists", None, "Of --replay: folder for lists of kept and dropped keys.")
    flags.DEFINE_enum("engine", "local", ENGINES, "Local processes, or a Ray cluster.")
    flags.DEFINE_bool("overwrite", False, "Make again what has changed.")
    command_line.define_job_array_flags()


def main() -> None:
    """Runs what the flags ask for."""
    given = flags.FLAGS
    config = given.config if given.config is not None else filter_config.default_config()
    validate_config(config, filter_config.default_config())
    filter_config.check_config(config)
    if given.explain is not None:
        print_escaped(explain(given.explain, config))
        return
    if given.lists is not None and given.replay is None:
        raise ValueError(f"--lists='{given.lists}': expected with --replay=FOLDER only")
    if given.replay is not None:
        filter_config.set_quantile_limit(config)
        replay.run(given.replay, None if given.config is None else config, given.lists)
        return
    if given.config is None:
        raise ValueError("--config is not set: expected a recipe such as prep/cat")
    failures = run_filter(
        config,
        given.task_index,
        given.num_tasks,
        engine=given.engine,
        overwrite=given.overwrite,
    )
    if failures:
        sys.exit(failures.exit_status)


def explain(caption: str, config: ml_collections.ConfigDict) -> str:
    """The graph of a caption and the decision, as text."""
    from data_prep.captions import format_graph, parse_captions

    return format_graph(parse_captions([caption])[0], **caption_limits(config))


def run_filter(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    overwrite: bool = False,
) -> Failures:
    """Filters what is not filtered yet, and prints the funnel.

    Args:
        config: a valid one of `config.default_config`.
        task_index: number of this job.
        num_tasks: jobs that share the work.
        engine: one of `engine.ENGINES`.
        overwrite: make again what was made with another config, or from however many other inputs.

    Returns:
        Sources that failed, with the reason, and whether the output was written without them; the
        other shards are complete.

    Raises:
        ValueError: nothing to read, nowhere to write, no pair was kept, or something has changed,
            other than a few inputs, and `overwrite` is not set.
    """
    if engine == "ray" and config.spotter.cache is not None:
        # The same folder on all nodes, also where a worker runs in another one.
        config.spotter.cache = os.path.abspath(config.spotter.cache)
    filter_config.set_quantile_limit(config)
    return filter_job.run(config, task_index, num_tasks, engine=engine, overwrite=overwrite)


def _optional_keys() -> ml_collections.ConfigDict:
    """The config with None for every key that `--config.KEY=None` may unset."""
    config = filter_config.default_config()
    config.examples_per_shard = None
    return config


if __name__ == "__main__":
    define_flags()
    command_line.run(
        main, config_defaults=_optional_keys, comment_files=filter_config.COMMENT_FILES
    )
