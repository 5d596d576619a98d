"""The worked example of an evaluation protocol, in a training run and by the command's function."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from diht_jax import load_model
from diht_jax.config import default_config
from diht_jax.evaluate import evaluate_model
from diht_jax.evaluation.comparison import format_comparison
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.results import format_results, read_results
from diht_jax.evaluation.tasks import parse_config_tasks, parse_tasks
from diht_jax.input.decode import decode_rgb
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from tests.contributing.blocks import load_example

CAPTIONS = ["a red dog", "two cats", "a hat", "the sea", "a house", "it rains", "night", "a tree"]
BOUND = 0.01


def _png(index):
    pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _config(train_data):
    config = default_config()
    config.total_steps = 2
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(
        image_size=16,
        patch_size=4,
        vision_layers=1,
        vision_width=32,
        text_layers=1,
        text_width=32,
        embed_dim=16,
        context_length=24,
    )
    config.data.train = str(train_data)
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.optimizer.warmup_steps = 1
    config.evaluation.batch_size = 8
    config.checkpoint.best_metric = "pairs/mean_cosine"
    return config


@pytest.fixture
def data(tmp_path):
    """The pairs as records to train on and, with one broken picture, as a tar to evaluate on."""
    records, tar = tmp_path / "a.tfrecord", tmp_path / "pairs.tar"
    with TFRecordWriter(records) as writer, tarfile.open(tar, "w") as archive:
        for index, caption in enumerate(CAPTIONS):
            writer.write(encode_record(Record(str(index), _png(index), caption)))
            broken = index == 5
            for name, content in (("png", _png(index)[: 50 if broken else None]), ("txt", caption)):
                content = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"{index}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return records, tar


def test_one_file_and_one_line_make_a_protocol(data, tmp_path, monkeypatch):
    example = load_example("mean_cosine", tmp_path)
    # All that the protocol adds to the package is this entry, made from the one file.
    monkeypatch.setitem(PROTOCOLS, "mean_cosine", example.PROTOCOL)
    records, tar = data
    config = _config(records)
    config.evaluation.tasks.pairs = dict(
        kind="mean_cosine", source=str(tar), caption_template="{caption}", above=BOUND
    )
    text = f"pairs=mean_cosine:{tar}?caption_template={{caption}}&above={BOUND}"
    tasks = parse_tasks(text)
    assert parse_config_tasks(config.evaluation.tasks) == tasks
    assert tasks[0].options == {"above": BOUND}

    workdir, output = tmp_path / "run", tmp_path / "results.json"
    train(config, workdir)
    results = evaluate_model(str(workdir), tasks, output, batch_size=8, num_resamples=20)

    model = load_model(workdir, batch_size=8)
    usable = [index for index in range(len(CAPTIONS)) if index != 5]
    image_emb = model.encode_image([decode_rgb(_png(index)) for index in usable])
    text_emb = model.encode_text([CAPTIONS[index] for index in usable])
    cosines = [float(image @ text) for image, text in zip(image_emb, text_emb, strict=True)]
    mean = sum(cosines) / len(cosines)
    above = sum(cosine > BOUND for cosine in cosines) / len(cosines)

    (result,) = json.loads(output.read_text())["results"]
    assert result["metrics"] == pytest.approx({"mean_cosine": mean, "share_above": above}, abs=1e-5)
    assert result["units"] == {"mean_cosine": "score", "share_above": "share"}
    assert result["counts"]["dropped"] == {"image_unreadable": 1}
    low, high = result["intervals"]["mean_cosine"]
    assert min(cosines) <= low <= high <= max(cosines)
    logged = read_metrics(workdir)[-1]
    assert logged["evaluation/pairs/mean_cosine"] == pytest.approx(mean, abs=1e-5)
    assert logged["evaluation/pairs/share_above"] == pytest.approx(above)

    # Each metric by its unit, in the table and beside another result.
    value, share = (result["metrics"][name] for name in ("mean_cosine", "share_above"))
    rows = [line.split() for line in format_results(results).splitlines()]
    assert rows[3][:4] == ["pairs", "mean", "cosine", f"{value:.4f}"]
    assert rows[4][:5] == ["pairs", "above", "the", "bound", f"{100 * share:.2f}%"]
    other = read_results(output)
    other["results"][0]["metrics"] = {"mean_cosine": value + 0.25, "share_above": share}
    del other["results"][0]["resamples"]  # of the metrics as they were
    rows = [line.split() for line in format_comparison(results, other).splitlines()]
    assert rows[4] == ["pairs", "mean", "cosine", f"{value:.4f}", f"{value + 0.25:.4f}", "+0.2500"]
    # A file knows its units where the protocol is not there any more.
    monkeypatch.delitem(PROTOCOLS, "mean_cosine")
    rows = [line.split() for line in format_results(other).splitlines()]
    assert rows[3][:3] == ["pairs", "mean_cosine", f"{value + 0.25:.4f}"]
    assert rows[4][:2] == ["share_above", f"{100 * share:.2f}%"]
