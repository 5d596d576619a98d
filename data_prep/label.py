r"""Command: label filtered shards with the concepts that a frozen teacher recognises in each image.

    python -m data_prep.label --config prep/concepts \
        --config.input=/data/kept --config.output=/data/labelled

A job has three stages: embeddings of the shards used to train the heads, two linear heads trained
on them, and the labels. Results are kept, and the same command resumes the unfinished work. Labels
are small shards that training joins with the input (`config.data.labels`), or new shards with
`--config.merge=True`. `--engine=ray` runs on a Ray cluster. For a job array, add `--task_index=I
--num_tasks=N` and start it twice: in the first run every job embeds its share of the training
shards (the last job trains the heads), in the second run it labels its share.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from data_prep.jobs.engine import ENGINES
from data_prep.labelling import config as label_config
from data_prep.labelling.job import run_label
from diht_jax import command_line


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe: a name such as prep/concepts, or a path."
    )
    flags.DEFINE_enum("engine", "local", ENGINES, "Local processes, or a Ray cluster.")
    command_line.define_job_array_flags()


def main() -> None:
    """Labels the shards given by the flags."""
    given = flags.FLAGS
    if given.config is None:
        raise ValueError("--config is not set: expected a recipe such as prep/concepts")
    failures = run_label(given.config, given.task_index, given.num_tasks, engine=given.engine)
    if failures:
        sys.exit(failures.exit_status)


if __name__ == "__main__":
    define_flags()
    command_line.run(
        main,
        config_defaults=label_config.default_config,
        optional_keys=label_config.OPTIONAL_KEYS,
        comment_files=label_config.COMMENT_FILES,
    )
