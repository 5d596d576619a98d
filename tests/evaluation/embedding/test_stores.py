"""Embedding, evaluation and search on an S3 server give the results of local files."""

import pathlib

import fsspec
import numpy as np

from diht_jax.evaluation.embedding.encoding import Batching
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.evaluation.embedding.inputs import list_inputs
from diht_jax.evaluation.embedding.search import load_pictures, search_pictures
from diht_jax.evaluation.task_parsing import open_source, parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from tests import make


def test_pairs_on_s3_are_embedded_evaluated_and_searched(tiny_model, tmp_path, s3_bucket):
    for number in range(2):
        captions = [f"photo {i} of {number}" for i in range(5)]
        make.write_pair_tar(tmp_path / f"{number}.tar", captions)
    url = f"{s3_bucket}/embedding"
    system = fsspec.filesystem("s3")
    for path in tmp_path.glob("*.tar"):
        system.pipe_file(f"{url}/{path.name}", path.read_bytes())

    options = EmbedOptions(shard_size=3, batch_size=8)
    here, there = str(tmp_path / "out"), f"{url}/out"
    expected = embed_source(tiny_model, f"{tmp_path}/*.tar", here, options)
    assert expected["files"] == 4
    assert embed_source(tiny_model, f"{url}/*.tar", there, options) == expected
    for path in pathlib.Path(here).glob("*.npz"):
        assert system.cat_file(f"{there}/{path.name}") == path.read_bytes()
    # A second run recreates only the part that was lost.
    system.rm_file(f"{there}/embeddings-00001-00000.json")
    before = system.info(f"{there}/embeddings-00000-00000.npz", refresh=True)["LastModified"]
    assert embed_source(tiny_model, f"{url}/*.tar", there, options) == expected
    now = system.info(f"{there}/embeddings-00000-00000.npz", refresh=True)["LastModified"]
    assert now == before and system.exists(f"{there}/embeddings-00001-00000.json")

    results = []
    for folder in (str(tmp_path), url):
        (task,) = parse_tasks(f"retrieval:{folder}/1.tar")
        open_source(task)
        results.append(evaluate_task(tiny_model, task, batch_size=8)["metrics"])
        shards = list_inputs(f"{folder}/*.tar")
        found, _ = search_pictures(tiny_model, shards, ["a photo"], count=3, batching=Batching(8))
        pictures = load_pictures(shards, found["a photo"])
        results[-1]["search"] = found, [np.asarray(p).sum() for p in pictures.values()]
    assert results[0] == results[1]
    system.rm(url, recursive=True)
