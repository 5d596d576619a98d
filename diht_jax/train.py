"""Command: train a model.

    python -m diht_jax.train --config emoji --config.data.train=DIR --workdir DIR

A recipe with stages trains them one after the other, each in its own folder. Running the same
command again resumes the run. On SIGTERM or ^C, a run saves its state and exits with 75. A
non-retryable error exits with 78. On a cluster, run the same command on every host; see
`diht_jax.distributed`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from diht_jax import command_line, distributed
from diht_jax.hardware import compiler
from diht_jax.training.multihost import EXIT_CODE, Stopped, begin_job, exit_status, job_status
from diht_jax.training.recipe import COMMENT_FILES, check_config, default_config


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    config_flags.DEFINE_config_file("config", None, "Recipe: a name such as emoji, or a path.")
    flags.DEFINE_string("workdir", None, "Directory of the run, or its URL in an object store.")
    distributed.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Validates the config, then trains."""
    began = time.monotonic()
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    try:
        if not workdir:  # an empty path would be the current folder
            raise ValueError("--workdir is required")
        check_config(config)
        stages = load_stages(config)
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            command_line.keep_freed_memory()
        platform, more = compiler.accelerator(), ()
        if config.deterministic:
            more = compiler.deterministic_flags(platform, f"{workdir}/autotuned")
        xla_flags = compiler.set_flags(platform, more)
        distributed.start_from_flags(functools.partial(begin_job, workdir))
    except ValueError as error:
        command_line.set_exit_status(error, exit_status(error))
        raise
    except ConnectionError as error:
        command_line.set_exit_status(error, job_status(error, workdir))
        raise
    if xla_flags:
        logging.info("%s", xla_flags)
    compiler.keep_programs(config.get("compilation_cache"), config.compilation_cache_max_gib)
    if jax.process_count() > 1 and distributed.is_first():
        begin_job(workdir)
    try:
        # Imported after the validation, to report a mistyped key without delay.
        from diht_jax.training.loop import train

        flag: Any = flags.FLAGS["config"]
        run = functools.partial(train, set_keys=flag.override_values, began=began)
        if stages:
            train_stages(run, stages, workdir)
        else:
            run(config, workdir)
    except Stopped as stopped:
        # The state is saved. Another SIGTERM must not replace the exit status for launchers.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        logging.warning("%s; the same command goes on from there", stopped)
        if stopped.input_stalls:
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        sys.exit(EXIT_CODE)
    except Exception as error:
        distributed.end_job(error, functools.partial(job_status, workdir=workdir))
        command_line.set_exit_status(error, exit_status(error))
        raise
    logging.info("finished; results in %s", workdir)


def load_stages(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """Returns the checked configs of the stages to train; empty for a recipe without stages."""
    if not config.stage.count:
        return []
    if config.stage.number:
        return [config]
    if config.stage.previous is not None:
        raise ValueError(
            f"config.stage.previous={config.stage.previous}: all stages would begin there, none "
            "with the one before; name a stage by the recipe's argument, such as :stage=2, or take "
            "config.model.init_from for the first one"
        )
    numbers = range(1, config.stage.count + 1)
    stages = [command_line.load_again(f"stage={number}") for number in numbers]
    for stage in stages:
        check_config(stage)
    return stages


def train_stages(
    train: Callable[..., object], stages: Sequence[ml_collections.ConfigDict], workdir: str
) -> None:
    """Trains stages, each in its own folder, starting with the last one with a checkpoint."""
    from diht_jax.training.initial_parameters import open_stage, stage_folder

    first = open_stage(workdir, stages[-1].stage.count) if len(stages) > 1 else 1
    for config in stages[first - 1 :]:
        number = config.stage.number
        if number > 1 and config.stage.previous is None:
            config.stage.previous = stage_folder(workdir, number - 1)
        logging.info("stage %d of %d", number, config.stage.count)
        train(config, stage_folder(workdir, number))
        train = functools.partial(train, began=None)  # the process started before this stage


if __name__ == "__main__":
    define_flags()
    command_line.run(main, config_defaults=default_config, comment_files=COMMENT_FILES)
