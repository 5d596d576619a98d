"""Annotation files as their publishers write them, through the command: Localized Narratives
(google.github.io/localized-narratives, "File formats") and Hateful Memes (dev_seen.jsonl)."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diht_jax import load_model
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import read_entries
from diht_jax.input.decode import decode_rgb
from tests.compiling import xla_flags

_SIZE = 48
# In the order of the file; the second image has two narratives.
_NARRATIVES = [
    (137576, 93, "In this image there are group of cows standing and eating the grass."),
    (285, 8, "In this picture we can see a bear on the grass."),
    (139, 101, "In the image we can see a woman standing, wearing clothes."),
    (285, 22, "This image consists of a bear. At the bottom, there is green grass."),
    (785, 3, "Here we can see a person skiing on the snow, and trees in the background."),
]
_MEMES = [
    (8291, 1, "text of the first"),
    (46971, 1, "text\nin two lines"),
    (3745, 0, "another one"),
    (83745, 0, "“quoted” — and dashed"),
    (80243, 1, "the last"),
]


def _jpeg(photo):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(buffer, format="JPEG")
    return buffer.getvalue()


def _narrative(image_id, annotator_id, caption, dataset_id):
    """One line: the words and the mouse are timed, and the image is known by its bare number."""
    words = [
        {"utterance": word, "start_time": 0.4 * i, "end_time": 0.4 * i + 0.4}
        for i, word in enumerate(caption.split())
    ]
    return {
        "dataset_id": dataset_id,
        "image_id": str(image_id),
        "annotator_id": annotator_id,
        "caption": caption,
        "timed_caption": words,
        "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}, {"x": 1.01, "y": 0.5, "t": 0.041}]],
        "voice_recording": f"coco_val/coco_val_{image_id}_{annotator_id}.ogg",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    """The three sets with the same few pictures."""
    root = tmp_path_factory.mktemp("published")
    ids = list(dict.fromkeys(image_id for image_id, _, _ in _NARRATIVES))
    for name, directory, file_name, dataset_id in (
        ("coco_val", "val2017", "{:0>12}.jpg", "mscoco_val2017"),
        ("flickr30k_test", "flickr30k-images", "{}.jpg", "Flick30k_test"),
    ):
        (root / directory).mkdir()
        for image_id, photo in zip(ids, photos, strict=False):
            (root / directory / file_name.format(image_id)).write_bytes(_jpeg(photo))
        lines = [json.dumps(_narrative(*row, dataset_id)) for row in _NARRATIVES]
        (root / f"{name}_localized_narratives.jsonl").write_text("\n".join(lines) + "\n")
    (root / "img").mkdir()
    lines = []
    for (number, label, text), photo in zip(_MEMES, photos, strict=True):
        (root / "img" / f"{number:05d}.png").write_bytes(photo)
        row = {"id": number, "img": f"img/{number:05d}.png", "label": label, "text": text}
        # As published: slashes are escaped.
        lines.append(json.dumps(row, separators=(",", ":")).replace("/", r"\/"))
    (root / "dev_seen.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def results(folder, workdir):
    """Task -> what the command measured with the positions resized to 48 pixels."""
    tasks = (
        f"localized_narratives_coco={folder}/coco_val_localized_narratives.jsonl"
        f"?image_root={folder}/val2017",
        f"hateful_memes={folder}/dev_seen.jsonl",
    )
    command = [sys.executable, "-m", "diht_jax.evaluate", "--model", str(workdir), "--nopages"]
    command += ["--image_size", str(_SIZE), "--tasks", ",".join(tasks), "--bootstrap", "0"]
    done = subprocess.run(
        [*command, "--output", str(folder / "results.json"), "--batch_size", "8"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": xla_flags()},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "results.json").read_text())
    assert written["image_size"] == _SIZE
    return {result["task"]: result for result in written["results"]}


@pytest.fixture(scope="module")
def model(workdir):
    return load_model(workdir, image_size=_SIZE, batch_size=8)


def _image_emb(model, paths):
    return model.encode_image([decode_rgb(path.read_bytes()) for path in paths]).astype(float)


def test_localized_narratives_of_coco(results, model, folder):
    ids = list(dict.fromkeys(image_id for image_id, _, _ in _NARRATIVES))
    image_emb = _image_emb(model, [folder / "val2017" / f"{i:0>12}.jpg" for i in ids])
    text_emb = model.encode_text([f"a photo of {caption}." for _, _, caption in _NARRATIVES])
    similarities = text_emb.astype(float) @ image_emb.T
    own = np.array([ids.index(image_id) for image_id, _, _ in _NARRATIVES])
    t2i = np.mean(similarities.argmax(axis=1) == own)
    i2t = np.mean(own[similarities.argmax(axis=0)] == np.arange(len(ids)))
    result = results["localized_narratives_coco"]
    assert result["counts"]["images"] == 4 and result["counts"]["texts"] == 5
    assert result["counts"]["dropped"] == {}
    assert result["metrics"]["t2i_r1"] == pytest.approx(t2i)
    assert result["metrics"]["i2t_r1"] == pytest.approx(i2t)


def test_localized_narratives_of_flickr30k(folder):
    (task,) = parse_tasks(
        f"localized_narratives_flickr={folder}/flickr30k_test_localized_narratives.jsonl"
        f"?image_root={folder}/flickr30k-images"
    )
    found = {pair.key: pair.metadata.get("captions", [pair.caption]) for pair in read_entries(task)}
    expected: dict[str, list[str]] = {}
    for image_id, _, caption in _NARRATIVES:
        expected.setdefault(f"{image_id}.jpg", []).append(caption)
    assert found == expected


def test_hateful_memes(results, model, folder):
    metrics = pytest.importorskip("sklearn.metrics")
    image_emb = _image_emb(model, [folder / "img" / f"{number:05d}.png" for number, _, _ in _MEMES])
    harmless, hateful = model.encode_text(["a meme.", "a hatespeech meme."]).astype(float)
    labels = [label for _, label, _ in _MEMES]
    expected = metrics.roc_auc_score(labels, image_emb @ (hateful - harmless))
    result = results["hateful_memes"]
    assert result["counts"]["images"] == 5 and result["counts"]["positives"] == 3
    assert result["metrics"] == {"auroc": pytest.approx(expected)}
    assert result["reported"] == ["auroc"]
