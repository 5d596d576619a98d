"""Worked example of an evaluation protocol: a training run and the command's function use it."""

import json

import jax
import numpy as np
import pytest

from diht_jax import load_model
from diht_jax.evaluate import evaluate_model
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.tasks import parse_config_tasks, parse_tasks
from diht_jax.input.transforms import decode_rgb
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from tests import make
from tests.contributing.blocks import load_example

CAPTIONS = ["a red dog", "two cats", "a hat", "the sea", "a house", "it rains", "night", "a tree"]
BROKEN, BOUND = 5, 0.01


def test_one_file_and_one_line_make_a_protocol(tmp_path, monkeypatch):
    example = load_example("mean_cosine", tmp_path)
    # The protocol adds only this entry to the package; the entry comes from one file.
    monkeypatch.setitem(PROTOCOLS, "mean_cosine", example.PROTOCOL)
    records = [make.record(i, caption=caption) for i, caption in enumerate(CAPTIONS)]
    members = {}
    for i, caption in enumerate(CAPTIONS):
        image = make.png(i)[: 50 if i == BROKEN else None]
        members |= make.pair_members(str(i), caption, image)
    tar = make.write_tar(tmp_path / "pairs.tar", members)
    config = make.tiny_config(
        total_steps=2,
        data__train=str(make.write_records(tmp_path / "records", records)),
        data__batch_size=8,
        evaluation__batch_size=8,
        checkpoint__best_metric="pairs/mean_cosine",
    )
    config.evaluation.tasks.pairs = dict(
        kind="mean_cosine", source=tar, caption_template="{caption}", above=BOUND
    )
    text = f"pairs=mean_cosine:{tar}?caption_template={{caption}}&above={BOUND}"
    tasks = parse_tasks(text)
    assert parse_config_tasks(config.evaluation.tasks) == tasks
    assert tasks[0].options == {"above": BOUND}

    workdir, output = tmp_path / "run", tmp_path / "results.json"
    train(config, workdir, devices=jax.devices()[:1])
    evaluate_model(str(workdir), tasks, output, batch_size=8, num_resamples=20)

    model = load_model(workdir, batch_size=8)
    usable = [index for index in range(len(CAPTIONS)) if index != BROKEN]
    image_emb = model.encode_image([decode_rgb(make.png(index)) for index in usable])
    text_emb = model.encode_text([CAPTIONS[index] for index in usable])
    cosines = np.sum(np.float64(image_emb) * text_emb, axis=1)

    (result,) = json.loads(output.read_text())["results"]
    expected = {"mean_cosine": cosines.mean(), "share_above": np.mean(cosines > BOUND)}
    assert result["metrics"] == pytest.approx(expected, abs=1e-5)
    assert result["units"] == {"mean_cosine": "score", "share_above": "share"}
    assert result["counts"]["dropped"] == {"image_unreadable": 1}
    low, high = result["intervals"]["mean_cosine"]
    assert cosines.min() <= low <= high <= cosines.max()
    logged = read_metrics(workdir)[-1]
    for name, value in expected.items():
        assert logged[f"evaluation/pairs/{name}"] == pytest.approx(value, abs=1e-5)
