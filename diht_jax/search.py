"""Command: find pictures by text.

    python -m diht_jax.search --model runs/b32 --input photos "a red car" "two dogs on a beach"

Prints the best matches of every query, and draws them on a page (`--output`). `--input` is a
folder of pictures, or any source of `diht_jax.data.readers.registry`.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging

from diht_jax import command_line


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    flags.DEFINE_string("input", None, "Folder of pictures, tar, or another source.")
    flags.DEFINE_alias("images", "input")
    flags.DEFINE_string("output", "search.png", "Page (PNG) to write.")
    flags.DEFINE_integer("num_matches", 8, "Pictures a query.")
    flags.DEFINE_alias("count", "num_matches")
    flags.DEFINE_string("caption_template", "{caption}", "Prompt around a query.")
    flags.DEFINE_alias("template", "caption_template")


def main(queries: list[str]) -> None:
    """Searches for the queries that stand on the command line."""
    from diht_jax.evaluation.embedding.files import list_inputs
    from diht_jax.evaluation.embedding.search import format_matches, load_pictures, search_pictures
    from diht_jax.evaluation.pages.search import draw_search_page

    given = flags.FLAGS
    command_line.require_flags("model", "input", "output")
    if not queries:
        raise ValueError('expected at least one query, such as "a red car", behind the flags')
    shards = list_inputs(given.input)  # a missing folder should not have to wait for the model
    from diht_jax.loading import load_model

    model = load_model(
        given.model,
        **command_line.model_options(),
        batch_size=given.batch_size,
    )
    result = search_pictures(
        model,
        shards,
        queries,
        count=given.num_matches,
        template=given.caption_template,
        batch_size=given.batch_size,
        num_threads=given.num_threads,
        progress=True,
    )
    if result.encoded.dropped:
        logging.warning("left out: %s", result.encoded.dropped)
    print(format_matches(result))
    positions = {match.position for matches in result.matches.values() for match in matches}
    draw_search_page(
        result,
        load_pictures(shards, positions),
        given.output,
        title=f"Search in {pathlib.PurePath(given.input).name}",
        note=f"{len(result.encoded.positions):,} pictures, model {given.model}; cosines",
    )
    logging.info("page: %s", given.output)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
