"""Command: print the version and the recipes for `--config NAME`.

    python -m diht_jax --version

The other commands are `python -m diht_jax.train`, `diht_jax.evaluate`, `data_prep.filter` and so
on; each lists its flags with `--help`.
"""

from __future__ import annotations

import ast
import textwrap

from absl import flags

import diht_jax
from diht_jax import command_line
from diht_jax.config import RECIPE_FOLDER, list_recipes
from diht_jax.terminal import print_escaped


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_bool("version", False, "Print nothing but the version.")


def main() -> None:
    """Prints the version, and without `--version` also the recipes."""
    print_escaped(f"diht_jax {diht_jax.__version__}")
    if flags.FLAGS.version:
        return
    print_escaped(f"\nRecipes in {RECIPE_FOLDER}:\n")
    for name, path in list_recipes().items():
        summary = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
        margin = " " * 6
        lines = textwrap.fill(summary, 80, initial_indent=margin, subsequent_indent=margin)
        print_escaped(f"  {name}\n{lines}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
