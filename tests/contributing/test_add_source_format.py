"""Worked example of a source format: the filter, embed, evaluate and search read it."""

import base64
import pathlib

import numpy as np
import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from diht_jax import load_model
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.evaluation.embedding.inputs import list_inputs
from diht_jax.evaluation.embedding.search import search_pictures
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.readers import registry
from tests import make
from tests.contributing.blocks import load_example
from tests.data_prep.filtering.jobs import job_config, read_records

CAPTIONS = ["a red dog", "two cats", "", "a green hat", "the sea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return load_model(make.write_run(folder, make.tiny_config()), batch_size=8)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The same pairs in the new format and in a tar; the third pair has no caption."""
    example = load_example("pairs_txt", tmp_path)
    # Registers the example: one file, and one line in the table.
    monkeypatch.setitem(registry.FORMATS, "pairs_txt", example.FORMAT)
    text, members = "", {}
    for number, caption in enumerate(CAPTIONS):
        image = make.png(number, (24, 20 + number))
        text += f"{base64.b64encode(image).decode()}\t{caption}\n"
        members |= make.pair_members(str(number), caption, image)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.pairs.txt").write_text(text)
    return str(tmp_path / "new" / "a.pairs.txt"), make.write_tar(tmp_path / "a.tar", members)


def _filter(source, output):
    assert run_filter(job_config(source, output)) == {}
    assert read_report(output)["counts"]["dropped"]["source"] == {"no_caption": 1}
    return [(pair.key, pair.image, pair.caption) for pair in read_records(output)]


def test_filter_reads_it(sources, tmp_path):
    text, tar = sources
    found = _filter(text, tmp_path / "a")
    expected = [(str(i), caption) for i, caption in enumerate(CAPTIONS) if caption]
    assert [(key, caption) for key, _, caption in found] == expected
    assert found == _filter(tar, tmp_path / "b")
    # The folder's name works as well.
    assert found == _filter(str(pathlib.Path(text).parent), tmp_path / "c")


def test_embed_evaluate_and_search_read_it(model, sources, tmp_path):
    written, results, found = [], [], []
    for number, source in enumerate(sources):
        folder = tmp_path / str(number)
        done = embed_source(model, source, folder, EmbedOptions(batch_size=8))
        assert (done["pairs"], done["dropped"]) == (4, {"no_caption": 1})
        (file,) = folder.glob("*.npz")
        written.append(np.load(file))
        (task,) = parse_tasks(f"retrieval:{source}")
        results.append(evaluate_task(model, task, batch_size=8))
        found.append(search_pictures(model, list_inputs(source), ["a dog"], count=4)[0])
    assert list(written[0]["key"]) == ["0", "1", "3", "4"]
    for name in ("key", "image_emb", "text_emb"):
        np.testing.assert_array_equal(written[0][name], written[1][name])
    assert results[0]["counts"]["images"] == 4
    assert results[0]["metrics"] == results[1]["metrics"]
    assert open_units(sources[0], {}).count_entries() == len(CAPTIONS)
    assert {match.key for match in found[0]["a dog"]} == {"0", "1", "3", "4"}
    assert found[0] == found[1]
