"""Search in an index of a million images: time, memory, and recall of eight-bit embeddings.

    python -m benchmarks.search

The embeddings are simulated: 512 dimensions, around 20,000 centres, as similar to each other as
photos of the same object. Indexes of both dtypes answer the same queries, alternately with the
exact float32 search in NumPy, which holds all embeddings in memory and defines the correct result.
"""

from __future__ import annotations

import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.evaluation.embedding import index_update, picture_index
from diht_jax.evaluation.embedding.files import SETTINGS_FILE
from diht_jax.storage.files import write_object
from diht_jax.terminal import ProgressBar

_DTYPES = ("float16", "int8")  # of an index
_CENTRES = 20_000
_SPREAD = 0.9  # of an image around its centre, which has length 1
_MATCHES = 10


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_integer("num_pictures", 1_000_000, "In the index.")
    flags.DEFINE_integer("dim", 512, "Numbers of an embedding.")
    flags.DEFINE_integer("num_queries", 40, "That are measured, one after the other.")


def main() -> None:
    """Measures, prints a table and writes `benchmarks/results/search.json`."""
    jax.config.update("jax_platforms", "cpu")  # sufficient for the record of the machine
    given = flags.FLAGS
    rng = np.random.default_rng(0)
    centres = unit_rows(rng.standard_normal((_CENTRES, given.dim), np.float32))
    queries = perturb(rng, centres[rng.choice(_CENTRES, given.num_queries, replace=False)])
    with tempfile.TemporaryDirectory() as folder:
        image_emb = write_indexes(rng, centres, given.num_pictures, pathlib.Path(folder))
        searches = {"numpy float32": lambda query: search_exactly(image_emb, query)}
        sizes = {"numpy float32": image_emb.nbytes}
        opening = {}
        for dtype in _DTYPES:
            start = time.perf_counter()
            index = picture_index.PictureIndex(pathlib.Path(folder, dtype))
            opening[dtype] = time.perf_counter() - start
            searches[dtype] = make_search(index)
            sizes[dtype] = sum(
                path.stat().st_size for path in pathlib.Path(folder, dtype).iterdir()
            )
        payload = measure(searches, queries)
    for name, figures in payload.items():
        figures["bytes"] = sizes[name]
        figures["opening_secs"] = opening.get(name)
        print(
            f"{name:14s} {figures['median_secs']:6.3f} s a query (at most "
            f"{figures['largest_secs']:.3f}), recall@{_MATCHES} {figures['recall']:.4f}, "
            f"{sizes[name] / 1e6:,.0f} MB"
        )
    result = {
        "settings": {name: given[name].value for name in ("num_pictures", "dim", "num_queries")},
        "usearch": metadata.version("usearch"),
        "load_average": os.getloadavg(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "searches": payload,
    }
    print("written:", write_result("search", result))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Normalises rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def perturb(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Returns normalised rows near the given rows."""
    noise = rng.standard_normal(rows.shape, np.float32) * (_SPREAD / rows.shape[1] ** 0.5)
    return unit_rows(rows + noise)


def write_indexes(
    rng: np.random.Generator, centres: np.ndarray, count: int, folder: pathlib.Path
) -> np.ndarray:
    """Writes an index of each dtype; returns the embeddings, float32 [count, d]."""
    image_emb = np.empty((count, centres.shape[1]), np.float32)
    settings = {dtype: {"index": picture_index.LAYOUT, "dtype": dtype} for dtype in _DTYPES}
    for dtype in _DTYPES:
        (folder / dtype).mkdir()
        path = str(folder / dtype / SETTINGS_FILE)
        write_object(path, settings[dtype], with_checksum=True)
    size = index_update.PART_ROWS
    for number, first in enumerate(ProgressBar(range(0, count, size), desc="parts", unit="part")):
        part = image_emb[first : first + size]
        part[:] = perturb(rng, centres[rng.integers(0, _CENTRES, len(part))])
        notes = [(f"{first + row:09d}.jpg", "", b"") for row in range(len(part))]
        manifest = {
            "unit": "",
            "folder": str(folder),
            "entries": len(part),
            "is_last": True,
            "part": 0,
            "states": [],
            "dropped": {},
        }
        for dtype in _DTYPES:
            stored = picture_index.quantize(part, dtype)
            rows = picture_index.make_rows(notes, stored)
            picture_index.write_part(folder / dtype, number, rows, manifest, settings[dtype])
    return image_emb


def search_exactly(image_emb: np.ndarray, query: np.ndarray) -> list[int]:
    """Returns the numbers of the nearest rows."""
    similarities = image_emb @ query
    nearest = np.argpartition(-similarities, _MATCHES)[:_MATCHES]
    return nearest[np.argsort(-similarities[nearest])].tolist()


def make_search(index: picture_index.PictureIndex) -> Callable[[np.ndarray], list[int]]:
    """Returns a function that searches an index."""

    def search(query: np.ndarray) -> list[int]:
        return [int(hit.key.removesuffix(".jpg")) for hit in index.search(query[None], _MATCHES)[0]]

    return search


def measure(
    searches: dict[str, Callable[[np.ndarray], list[int]]], queries: np.ndarray
) -> dict[str, Any]:
    """Measures seconds and recall of each search over the queries, alternately."""
    secs: dict[str, list[float]] = {name: [] for name in searches}
    shared: dict[str, list[float]] = {name: [] for name in searches}
    for search in searches.values():
        search(queries[0])  # loads the memory-mapped file
    for query in ProgressBar(queries, desc="queries", unit="query"):
        truth = None
        for name, search in searches.items():
            start = time.perf_counter()
            found = search(query)
            secs[name].append(time.perf_counter() - start)
            truth = found if truth is None else truth
            shared[name].append(len(set(found) & set(truth)) / len(truth))
    return {
        name: {
            "median_secs": statistics.median(secs[name]),
            "largest_secs": max(secs[name]),
            "recall": statistics.mean(shared[name]),
        }
        for name in searches
    }


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
