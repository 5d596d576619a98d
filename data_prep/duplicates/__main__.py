r"""Command: find the duplicates in a data set, before it is filtered.

    python -m data_prep.duplicates --config prep/duplicates \
        --config.input='/data/raw/*.tar' --config.output=/data/duplicates

Exact copies are found by their bytes. Near-duplicates are found by embeddings: k-means on the
devices of one process, cosines within each cluster (SemDeDup, arXiv 2303.09540), and verification
by thumbnails. The same command resumes unfinished work; with another threshold, it reuses the
clusters. The filter drops the duplicates with --config.duplicates.table=/data/duplicates. On
several hosts, run the command on each (see `diht_jax.distributed`) or as a job array with
--task_index=I --num_tasks=N; the jobs share the scan, and one of them searches.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates import job
from data_prep.jobs.engine import ENGINES
from diht_jax import command_line
from diht_jax.config.checks import validate_config


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    from diht_jax import distributed  # needs JAX, which slows the start of workers

    config_flags.DEFINE_config_file(
        "config", None, "Recipe: a name such as prep/duplicates, or a path."
    )
    flags.DEFINE_enum("engine", "local", ENGINES, "Local processes, or a Ray cluster.")
    command_line.define_job_array_flags()
    distributed.define_flags()


def main() -> None:
    """Runs the search with the flags of the command line."""
    import jax
    from jax.experimental import multihost_utils

    from diht_jax import distributed

    values = flags.FLAGS
    config = values.config
    if config is None:
        raise ValueError("--config is not set: expected a recipe such as prep/duplicates")
    validate_config(config, duplicates_config.default_config())
    duplicates_config.check_config(config)
    index, count = values.task_index, values.num_tasks
    if count == 1:
        distributed.start_from_flags()
    elif values.coordinator_address is not None:
        raise ValueError("--num_tasks and --coordinator_address: expected one of them")
    if jax.distributed.is_initialized():
        index, count = jax.process_index(), jax.process_count()
    try:
        failures = job.run(config, index, count, engine=values.engine)
        if jax.distributed.is_initialized():  # its processes end together
            multihost_utils.sync_global_devices("data_prep.duplicates")
    except Exception as error:
        if jax.distributed.is_initialized():
            distributed.end_job(error)
        raise
    if failures:
        sys.exit(failures.exit_status)


if __name__ == "__main__":
    define_flags()
    command_line.run(
        main,
        config_defaults=duplicates_config.default_config,
        comment_files=duplicates_config.COMMENT_FILES,
    )
