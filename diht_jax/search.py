"""Command: find pictures by text.

    python -m diht_jax.search --model runs/b32 --images photos "a red car" "two dogs on a beach"

Prints the best matches of every query, and draws them on a page (`--output`). `--images` is a
folder of pictures, or any source of `diht_jax.data.readers.registry`.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging

from diht_jax import command_line


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    flags.DEFINE_string("images", None, "Folder of pictures, tar, or another source.")
    flags.DEFINE_string("output", "search.png", "Page (PNG) to write.")
    flags.DEFINE_integer("count", 8, "Pictures a query.")
    flags.DEFINE_string("template", "{caption}", "Prompt around a query.")
    flags.DEFINE_integer("batch_size", 256, "Pictures a batch, over all devices.")
    flags.DEFINE_integer("num_threads", None, "Decoding threads; one per core.")


def main(queries: list[str]) -> None:
    """Searches for the queries that stand on the command line."""
    from diht_jax.evaluation.embedding.files import list_inputs
    from diht_jax.evaluation.embedding.search import format_matches, load_pictures, search_pictures
    from diht_jax.evaluation.pages.search import draw_search_page

    given = flags.FLAGS
    for name in ("model", "images", "output"):
        if not given[name].value:
            raise ValueError(f"--{name} is required")
    if not queries:
        raise ValueError('expected at least one query, such as "a red car", behind the flags')
    shards = list_inputs(given.images)  # a missing folder should not have to wait for the model
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
        count=given.count,
        template=given.template,
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
        title=f"Search in {pathlib.PurePath(given.images).name}",
        note=f"{len(result.encoded.positions):,} pictures, model {given.model}; cosines",
    )
    logging.info("page: %s", given.output)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
