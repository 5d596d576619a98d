r"""Command: label filtered shards with the concepts that a frozen teacher sees in each image.

    python -m data_prep.label --config prep/concepts \
        --config.input=/data/kept --config.output=/data/labelled

Three stages, each kept, so that the same command again does only what is not done yet: embeddings
of the shards that the heads learn from, two linear heads trained on them, and the labels: a
small shard for each shard, which training joins (`config.data.labels`), or new shards with
`--config.merge=True`. `--engine=ray` runs it on a Ray cluster. For a job array add
`--task_index=I --num_tasks=N` and start it twice: the first time every job embeds its share of what
the heads learn from (the last one trains them), the second time it labels its share.
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
    """Defines this command's flags; not at import, since commands share names."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe: a name such as prep/concepts, or a path."
    )
    flags.DEFINE_enum("engine", "local", ENGINES, "Local processes, or a Ray cluster.")
    command_line.define_job_array_flags()


def main() -> None:
    """Labels the shards that the flags name."""
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
