"""Command: compile the training step of a recipe for a machine that is not here.

    python -m diht_jax.compile --config configs/diht_vitl14.py --topology v5e:16x16

Prints, for one device and one step, memory, floating-point operations, traffic, communication and a
roofline estimate. Exits with 1 when the step does not fit, after having looked for settings of
`config.micro_batch` and `config.model.remat` that do.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from diht_jax import command_line
from diht_jax.training.recipe import check_config, default_config


def define_flags() -> None:
    """The command line of `main`."""
    config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/emoji.py.")
    flags.DEFINE_string(
        "topology",
        None,
        "What to compile for, such as v5e:16x16, v4:4x4x8, h100:8, or local; the recipe's own "
        "(config.topology) by default.",
    )
    flags.DEFINE_integer(
        "batch_size", None, "Examples a batch, over all devices; unset: config.data.batch_size."
    )
    flags.DEFINE_alias("global_batch", "batch_size")
    flags.DEFINE_bool("search", True, "Look for settings that fit when the recipe's do not.")
    flags.mark_flag_as_required("config")


def main() -> None:
    """Compiles, prints the report, and exits with the verdict."""
    values = flags.FLAGS
    config = values.config
    check_config(config)
    name = values.topology or config.topology
    if not name:
        raise ValueError(
            "the recipe names no config.topology; name what to compile for: --topology v5e:16x16"
        )
    if values.batch_size is not None:
        config.data.batch_size = values.batch_size
    import jax

    if name != "local":
        # The machine's own devices are of no use here.
        jax.config.update("jax_platforms", "cpu")

    from diht_jax.hardware.topologies import get_topology
    from diht_jax.training.aot_compile import compile_step, settings_that_fit
    from diht_jax.training.step_report import describe_settings, describe_step

    topology = get_topology(name)
    logging.info("compiling for %d devices; minutes for a large model", len(topology.devices))
    report = compile_step(config, topology)
    print(describe_step(report))
    if report.fits:
        return
    if values.search:
        print("\nlooking for settings that fit:")
        found = settings_that_fit(config, topology, report, on_try=_print_try)
        print(describe_settings(found))
    sys.exit(1)


def _print_try(report: Any) -> None:
    from diht_jax.training.step_report import describe_try

    print(describe_try(report), flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, config_defaults=default_config)
