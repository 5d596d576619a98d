"""Bars that know their end: without it tqdm shows no ETA."""

import io
import json
import tarfile

import pytest

from diht_jax.evaluation.embedding.files import list_inputs
from diht_jax.evaluation.embedding.search import search_pictures
from diht_jax.evaluation.fewshot.grid import FewShotOptions, evaluate_few_shot
from diht_jax.evaluation.sources.entry_counts import estimate_total, shard_lengths
from diht_jax.evaluation.sources.registry import count_source, read_source
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.readers.base import SourceShard


def _write_tar(path, photos, note):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, photo in enumerate(photos):
            for name, data in ((f"{i}.png", photo), (f"{i}.{note}", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """The same five pictures in every kind of source."""
    root = tmp_path_factory.mktemp("data")
    _write_tar(root / "a.tar", photos, "txt")
    _write_tar(root / "benchmark" / "test" / "0.tar", photos, "cls")
    (root / "benchmark" / "test" / "nshards.txt").write_text("1")
    (root / "benchmark" / "classnames.txt").write_text("cat\ndog\n")
    (root / "benchmark" / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    images = root / "images"
    for i, photo in enumerate(photos):
        for name in (images / f"{i}.png", root / "classes" / "ab"[i % 2] / f"{i}.png"):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(photo)
    rows = [{"image": f"{i}.png", "caption": f"{j} of {i}"} for i in range(5) for j in range(3)]
    (images / "rows.json").write_text(json.dumps(rows))
    (images / "table.jsonl").write_text("\n".join(map(json.dumps, rows[::3])))
    examples = [
        {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a b", "caption_1": "b a"},
        {"id": 1, "image_0": "2", "image_1": "3", "caption_0": "c d", "caption_1": "d c"},
    ]
    (images / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return root


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("{}/a.tar", 5),
        ("clip_benchmark:{}/benchmark", 5),
        ("{}/classes", 5),
        ("annotations:{}/images/rows.json", 5),
        ("{}/images/table.jsonl", 5),
        ("winoground:{}/images/examples.jsonl", 4),
    ],
)
def test_sources_know_their_length(data, source, count):
    source = source.format(data)
    options = {"image_root": str(data / "images")} if source.startswith("winoground") else {}
    assert len(list(read_source(source, options))) == count
    assert count_source(source, options) == count


def test_lengths_of_further_tars_are_estimated_by_their_bytes(data):
    shards = [SourceShard("webdataset", str(data / "a.tar"))] * 2
    assert shard_lengths(shards) == [5, None]
    assert estimate_total([5, None], [100, 300]) == 20
    assert estimate_total([None], [100]) is None


def test_bars_of_an_evaluation(tiny_model, data, capsys):
    (task,) = parse_tasks(f"clip_benchmark:{data}/benchmark")
    evaluate_task(tiny_model, task, batch_size=3, progress=True)
    shown = capsys.readouterr().err
    assert " 5/5 [" in shown  # the images, without a limit
    assert " 4/4 [" in shown  # two prompts for each class: more than one batch
    evaluate_task(tiny_model, task, batch_size=4, limit=2, progress=True)
    shown = capsys.readouterr().err
    assert " 2/2 [" in shown
    assert "texts" not in shown  # a single batch needs no bar
    evaluate_task(tiny_model, task, batch_size=4)
    assert capsys.readouterr().err == ""


def test_bars_of_search_and_few_shot(tiny_model, data, capsys):
    search_pictures(tiny_model, list_inputs(str(data / "a.tar")), ["a dog"], progress=True)
    assert " 5/5 [" in capsys.readouterr().err
    (task,) = parse_tasks(f"clip_benchmark:{data}/benchmark")
    options = FewShotOptions(
        shots=(1,), num_draws=1, num_steps=1, radii=(1.0,), bias_radii=(0.0,), weight_decays=(0.1,)
    )
    evaluate_few_shot(tiny_model, task, task, options=options, progress=True)
    assert " 10/10 [" in capsys.readouterr().err
