"""Command: search images by text.

    python -m diht_jax.search --model runs/b32 --input photos "a red car" "two dogs on a beach"

Prints the best matches of every query; `--output=found.html` also writes a page with the images.
`--input` is a folder of images, or any source of `diht_jax.readers.registry`.

    python -m diht_jax.search --model runs/b32 --input photos --index photos_index "a red car"
    python -m diht_jax.search --model runs/b32 --index photos_index --serve

With `--index` the embeddings are stored on disk, so images are embedded only once. `--input` adds
new images and removes deleted ones; without it the index is not updated. `--serve` serves a web
page with a search field.

On a cluster, run the same command on every host: each reads a part of the images, and the first one
searches and writes. An index must then be in a folder that all hosts share.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags, logging

from diht_jax import command_line, distributed
from diht_jax.terminal import print_escaped


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    distributed.define_flags()
    flags.DEFINE_string("input", None, "Folder of pictures, tar, or another source.")
    flags.DEFINE_alias("images", "input")
    flags.DEFINE_string("output", None, "Page (HTML) of the matches, which are printed too.")
    flags.DEFINE_integer("num_matches", 8, "Pictures a query.", lower_bound=1)
    flags.DEFINE_alias("count", "num_matches")
    flags.DEFINE_string("index", None, "Folder of an index, which is made or brought up to date.")
    flags.DEFINE_enum("dtype", "float16", ("float16", "int8"), "Of the embeddings in an index.")
    flags.DEFINE_bool("thumbnails", True, "Keep small pictures in an index, of other than folders.")
    flags.DEFINE_bool("serve", False, "Serve a web page that searches --index, until ^C.")
    flags.DEFINE_string("host", "127.0.0.1", "Address of the page; 0.0.0.0 is every machine.")
    flags.DEFINE_integer("port", 8000, "Of the page; 0: any that is free.")
    flags.DEFINE_string("caption_template", "{caption}", "Prompt around a query.")
    flags.DEFINE_alias("template", "caption_template")


def main(queries: list[str]) -> None:
    """Searches for the queries on the command line, and updates or serves an index."""
    from diht_jax.evaluation.embedding.inputs import list_inputs
    from diht_jax.evaluation.embedding.picture_index import PictureIndex, import_usearch
    from diht_jax.evaluation.embedding.search import fill_queries

    given = flags.FLAGS
    if given.output and not given.output.endswith((".html", ".htm")):
        raise ValueError(
            f"--output={given.output}: the page is HTML; expected a name that ends in .html"
        )
    if given.serve and not given.index:
        raise ValueError("--serve searches an index: give --index=FOLDER, and --input to make it")
    command_line.require_flags("model", *(() if given.index else ("input",)))
    if not (queries or given.index):
        raise ValueError('expected at least one query, such as "a red car", behind the flags')
    if not (queries or given.serve or given.input):
        raise ValueError("--index: expected queries, --serve, or --input to bring it up to date")
    # Reports missing files and packages before the model is loaded.
    shards = list_inputs(given.input, needs_caption=False) if given.input else []
    texts = fill_queries(queries, given.caption_template) if queries else {}
    if given.index and (queries or given.serve):
        import_usearch()
    index = None if shards else PictureIndex(given.index)
    model = _load_model()
    if not given.index:
        _search_source(model, shards, queries)
        return
    if shards:
        _update_index(model, shards)
    if not distributed.is_first():
        return
    index = index or PictureIndex(given.index)
    index.check_model(model)
    if texts:
        found = index.search(model.encode_text(list(texts.values())), given.num_matches)
        matches = dict(zip(texts, found, strict=True))
        _show(matches, index.load_pictures, given.index, len(index))
    if given.serve:
        _serve(index, model)


def _load_model() -> Any:
    """Joins the distributed job, and loads the model onto the devices of each process."""
    distributed.start_from_flags()
    import jax

    from diht_jax.loading import load_model
    from diht_jax.training.multihost import check_same_step

    given = flags.FLAGS
    if given.serve and jax.process_count() > 1:
        raise ValueError("--serve answers on one host: start it there when the index is made")
    model = load_model(given.model, **command_line.model_options(), batch_size=given.batch_size)
    check_same_step(model.step)
    return model


def _search_source(model: Any, shards: list[Any], queries: list[str]) -> None:
    """Embeds the source, and searches it."""
    from diht_jax.evaluation.embedding.encoding import Batching
    from diht_jax.evaluation.embedding.entries import Processes
    from diht_jax.evaluation.embedding.search import load_pictures, search_pictures

    given = flags.FLAGS
    is_first = distributed.is_first()
    batching = Batching(given.batch_size, given.num_threads, is_first, Processes.of_job())
    count, template = given.num_matches, given.caption_template
    matches, encoded = search_pictures(
        model, shards, queries, count=count, template=template, batching=batching
    )
    if not is_first:
        return
    if encoded.dropped:
        logging.warning("left out: %s", encoded.dropped)
    load = functools.partial(load_pictures, shards)
    _show(matches, load, given.input, len(encoded.notes))


def _update_index(model: Any, shards: list[Any]) -> None:
    """Brings the index up to date with the source."""
    from diht_jax.evaluation.embedding.encoding import Batching
    from diht_jax.evaluation.embedding.entries import Processes
    from diht_jax.evaluation.embedding.index_update import update_index
    from diht_jax.evaluation.embedding.inputs import refuse_unusable

    given = flags.FLAGS
    update = update_index(
        model,
        shards,
        given.index,
        dtype=given.dtype,
        batching=Batching(given.batch_size, given.num_threads),
        thumbnails=given.thumbnails,
        processes=Processes.of_job(),
    )
    logging.info(
        "%s: %d pictures added, %d removed, %d as before; left out: %s",
        given.index,
        update.added,
        update.removed,
        update.kept,
        update.dropped or "none",
    )
    if update.added + update.kept == 0:
        refuse_unusable(f"--input={given.input}", update.dropped)


def _show(
    matches: dict[str, Any],
    load: Callable[[Iterable[Any]], dict[Any, Any]],
    source: str,
    count: int,
) -> None:
    """Prints the matches, and draws them on a page if `--output` is given."""
    from diht_jax.evaluation.embedding.search import draw_matches, format_matches

    given = flags.FLAGS
    print_escaped(format_matches(matches))
    if not given.output:
        return
    pictures = load(itertools.chain(*matches.values()))
    title = f"Search in {pathlib.PurePath(source).name}"
    note = f"{count:,} pictures, model {given.model}; cosines"
    draw_matches(matches, pictures, given.output, title=title, note=note)
    logging.info("page: %s", given.output)


def _serve(index: Any, model: Any) -> None:
    from diht_jax.evaluation.embedding.search import make_server
    from diht_jax.evaluation.protocols.base import fill_caption_template

    given = flags.FLAGS

    def encode_text(queries: list[str]) -> Any:
        template = given.caption_template
        return model.encode_text([fill_caption_template(template, query) for query in queries])

    encode_text(["compiled before the first visitor comes"])
    server = make_server(
        index, encode_text, host=given.host, port=given.port, clock=time.perf_counter
    )
    with server:
        host = "localhost" if given.host in ("127.0.0.1", "0.0.0.0") else given.host
        address = f"http://{host}:{server.server_port}/"
        logging.info("%d pictures: %s (^C ends it)", len(index), address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
