"""The worked example of a source format is read by the filter, embed, evaluate and search."""

import base64
import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from diht_jax import load_model
from diht_jax.config import load_recipe
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source, list_inputs
from diht_jax.evaluation.embedding.search import search_pictures
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.models import Architecture
from diht_jax.readers import registry
from diht_jax.records.schema import decode_record
from diht_jax.records.tfrecord import TFRecordSource
from diht_jax.weights import clip_layout
from diht_jax.weights.tensor_files import write_safetensors
from tests.contributing.blocks import load_example

CAPTIONS = ["a red dog", "two cats", "", "a green hat", "the sea"]
ARCH = Architecture(
    image_size=16,
    patch_size=8,
    vision_layers=1,
    vision_width=64,
    vision_heads=1,
    text_layers=1,
    text_width=64,
    text_heads=1,
    embed_dim=24,
    context_length=8,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    rng = np.random.default_rng(0)
    shapes = clip_layout.expected_shapes(ARCH)
    write_safetensors(
        path, {k: rng.standard_normal(s).astype(np.float32) * 0.1 for k, s in shapes.items()}, {}
    )
    return load_model(path, batch_size=8)


@pytest.fixture
def sources(tmp_path, monkeypatch) -> tuple[str, str]:
    """The same pairs in the new format and in a tar; the third has no caption."""
    example = load_example("pairs_txt", tmp_path)
    # One file, and one line in the table.
    monkeypatch.setitem(registry.FORMATS, "pairs_txt", example.FORMAT)
    (tmp_path / "new").mkdir()
    (tmp_path / "known").mkdir()
    text, tar = tmp_path / "new" / "a.pairs.txt", tmp_path / "known" / "a.tar"
    lines = []
    with tarfile.open(tar, "w") as archive:
        for i, caption in enumerate(CAPTIONS):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            lines.append(f"{base64.b64encode(buffer.getvalue()).decode()}\t{caption}\n")
            for name, data in ((f"{i}.png", buffer.getvalue()), (f"{i}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    text.write_text("".join(lines))
    return str(text), str(tar)


def _filter(source: str, output: pathlib.Path) -> list[tuple[str, bytes, str]]:
    recipe = pathlib.Path(__file__).resolve().parents[2] / "configs" / "prep" / "convert.py"
    config = load_recipe(recipe)
    config.update({"input": source, "output": str(output), "num_workers": 0})
    assert run_filter(config) == {}
    pairs = [decode_record(data) for data in TFRecordSource(output)]
    return [(pair.key, pair.image, pair.caption) for pair in pairs]


def test_filter_reads_it(sources, tmp_path):
    text, tar = sources
    found = _filter(text, tmp_path / "a")
    assert [(key, caption) for key, _, caption in found] == [
        (str(i), caption) for i, caption in enumerate(CAPTIONS) if caption
    ]
    assert found == _filter(tar, tmp_path / "b")
    # Named by its folder as well, and what is no pair is counted.
    assert found == _filter(str(pathlib.Path(text).parent), tmp_path / "c")
    for output in ("a", "b"):
        assert read_report(tmp_path / output)["counts"]["dropped"]["source"] == {"no_caption": 1}
    # Run again, it is complete: nothing is read twice.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tfrecord")}
    _filter(text, tmp_path / "a")
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


def test_embed_reads_it(model, sources, tmp_path):
    written = []
    for number, source in enumerate(sources):
        folder = tmp_path / str(number)
        done = embed_source(model, source, folder, EmbedOptions(batch_size=8))
        assert (done["pairs"], done["dropped"]) == (4, {"no_caption": 1})
        (file,) = folder.glob("*.npz")
        written.append(np.load(file))
    assert list(written[0]["key"]) == ["0", "1", "3", "4"]
    for name in ("key", "image_emb", "text_emb"):
        np.testing.assert_array_equal(written[0][name], written[1][name])


def test_evaluate_reads_it(model, sources):
    results = []
    for source in sources:
        (task,) = parse_tasks(f"retrieval:{source}")
        open_units(source, {})
        results.append(evaluate_task(model, task, batch_size=8))
    assert results[0]["counts"]["images"] == 4
    assert results[0]["counts"] == results[1]["counts"]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert open_units(sources[0], {}).count_entries() == len(CAPTIONS)


def test_search_reads_it(model, sources):
    found = [search_pictures(model, list_inputs(source), ["a dog"], count=4) for source in sources]
    assert {match.key for match in found[0].matches["a dog"]} == {"0", "1", "3", "4"}
    assert found[0].matches == found[1].matches


def test_errors_name_it(sources, tmp_path):
    (tmp_path / "a.other").write_text("x")
    with pytest.raises(ValueError, match=r"a\.other: not a source .* \.pairs\.txt"):
        registry.list_shards(str(tmp_path / "a.other"))
    text = pathlib.Path(sources[0])
    (text.parent / "b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several kinds of source \(pairs_txt, webdataset\)"):
        registry.list_shards(str(text.parent))
