"""Whole evaluations of a real model on real data: on eight devices, and as commands."""

import json
import re

import numpy as np
import pytest

from diht_jax import evaluate
from diht_jax.config import default_config
from diht_jax.evaluation.page import ResultsPage, draw_rows
from diht_jax.evaluation.tasks import Task, evaluate_task, parse_tasks
from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.registry import open_source
from tests import make
from tests.docs.commands import parse_command
from tests.make import png, write_tar


def _write(page, result):
    page.write({"model": "m", "results": [result]})
    return page.path.read_text()


def test_classification_equals_the_protocol_done_by_hand(tiny_model, shared_data, tmp_path):
    source = str(shared_data / "cifar10_test.tar")
    (task,) = parse_tasks([f"cifar10={source}"])
    page = ResultsPage(tmp_path / "page.html")
    result = evaluate_task(tiny_model, task, batch_size=64, limit=128, show=page.add)

    pairs = [pair for pair, _ in zip(open_source(source), range(128), strict=False)]
    labels = np.array([task.class_names.index(pair.metadata["label"]) for pair in pairs])
    image_emb = tiny_model.encode_image([decode_rgb(pair.image) for pair in pairs])
    text_emb = tiny_model.encode_text(
        [template.format(name) for name in task.class_names for template in task.templates]
    )
    means = text_emb.astype(np.float64).reshape(10, 18, -1).mean(axis=1)
    order = np.argsort(-(image_emb @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T))
    hits = order[:, 0] == labels
    assert result["metrics"]["top1"] == pytest.approx(hits.mean())
    assert result["reported"] == ["top1", "top5", "mean_per_class"]
    assert result["metrics"]["top5"] == pytest.approx((order[:, :5] == labels[:, None]).sum() / 128)
    assert result["counts"] == {
        "images": 128,
        "classes": 10,
        "classes_without_images": 0,
        "texts": 180,
        "limit": 128,
        "dropped": {},
    }
    confusion = np.array(result["confusion"])
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(labels, minlength=10))
    assert np.trace(confusion) == hits.sum()
    bird = next(entry for entry in result["per_class"] if entry["class"] == "bird")
    assert bird["accuracy"] == pytest.approx(hits[labels == 2].mean())
    assert json.loads(json.dumps(result)) == result
    text, chosen = _write(page, result), draw_rows(128, 24)
    marks = [mark == "right" for mark in re.findall(r'class="tile (right|wrong)"', text)]
    assert marks == hits[chosen].tolist()
    assert f"{100 * hits.mean():.2f}%" in text


def test_retrieval_equals_the_protocol_done_by_hand(tiny_model, shared_data, tmp_path):
    source = str(shared_data / "emoji_twitter.tar")
    (task,) = parse_tasks([f"retrieval:{source}"])
    page = ResultsPage(tmp_path / "new" / "page.html")
    result = evaluate_task(tiny_model, task, batch_size=64, limit=128, show=page.add)

    pairs = [pair for pair, _ in zip(open_source(source), range(128), strict=False)]
    image_emb = tiny_model.encode_image([decode_rgb(pair.image) for pair in pairs])
    text_emb = tiny_model.encode_text([pair.caption for pair in pairs])
    similarities, ranks_of = text_emb @ image_emb.T, {}
    for direction, matrix in (("t2i", similarities), ("i2t", similarities.T)):
        ranks = np.array([list(np.argsort(-row)).index(own) for own, row in enumerate(matrix)])
        ranks_of[direction] = ranks
        for k in (1, 5, 10):
            expected = np.mean(ranks < k)
            assert result["metrics"][f"{direction}_r{k}"] == pytest.approx(expected)
    text = _write(page, result)
    shown = [re.findall(rf"right {query}at rank\s+(\d+)", text) for query in ("image ", "")]
    chosen = (ranks_of["t2i"][draw_rows(128, 6)], ranks_of["i2t"][draw_rows(128, 6, seed=1)])
    assert [list(map(int, ranks)) for ranks in shown] == [(ranks + 1).tolist() for ranks in chosen]


def test_several_captions_and_broken_images(tmp_path):
    def sidecar(*captions):
        return json.dumps({"captions": list(captions)}).encode()

    path = tmp_path / "x.tar"
    write_tar(
        path,
        [
            ("a.png", png(0)),
            ("a.json", sidecar("one", "two", "three")),
            ("b.png", png(1)[:60]),
            ("b.json", sidecar("four", "five")),
            ("c.txt", b"no image"),
            ("d.png", png(2)),
            ("d.json", sidecar("two", "six")),
        ],
    )
    task = Task("x", "retrieval", str(path), caption_template="{caption}")
    result = evaluate_task(make.HashedModel(), task)
    assert result["counts"] == {
        "images": 2,
        "texts": 5,
        "different_texts": 4,
        "equal_captions": 2,
        "limit": None,
        "dropped": {"image_unreadable": 1, "no_image": 1},
    }
    assert result["metrics"]["t2i_r5"] == 1.0


class _TrainedModel(make.HashedModel):
    """A model of a run with a text template around its captions; records what it embeds."""

    def __init__(self, **data):
        self.config, self.texts = default_config(), []
        self.config.data.update(data)

    def encode_text(self, texts):
        self.texts += texts
        return super().encode_text(texts)


_PHOTO = "a photo of {caption}."
_MIXTURE = {
    name: {"path": "x", "weight": 1, "text_template": "my {caption}"} for name in ("one", "two")
}


@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        ("retrieval:{}", {}, "{caption}"),
        ("retrieval:{}", {"text_template": "a drawing of {caption}"}, "a drawing of {caption}"),
        ("retrieval:{}", {"train": _MIXTURE}, "my {caption}"),
        ("retrieval:{}?caption_template=x {{caption}}", {"text_template": _PHOTO}, "x {caption}"),
        ("coco_retrieval={}", {}, _PHOTO),
    ],
)
def test_own_pairs_take_the_prompt_of_training_and_benchmarks_their_own(
    task, data, expected, tmp_path
):
    captions = ["a red car", "two dogs"]
    source = make.write_pair_tar(tmp_path / "pairs.tar", captions)
    model, page = _TrainedModel(**data), ResultsPage(tmp_path / "page.html")
    result = evaluate_task(model, *parse_tasks(task.format(source)), show=page.add)
    assert model.texts == [expected.replace("{caption}", caption) for caption in captions]
    assert result["protocol"]["caption_template"] == expected
    assert expected in _write(page, result)


def test_a_source_that_changes_costs_the_examples_and_not_the_numbers(tmp_path, caplog):
    path = tmp_path / "pairs.tar"

    class Slow(make.HashedModel):
        def encode_text(self, texts):
            make.write_pair_tar(path, ["a car"])
            return super().encode_text(texts)

    (task,) = parse_tasks(f"retrieval:{make.write_pair_tar(path, ['a car', 'a dog', 'a cat'])}")
    page = ResultsPage(tmp_path / "page.html")
    result = evaluate_task(Slow(), task, show=page.add)
    assert result["counts"]["images"] == 3 and result["page"] is None
    assert "no examples of task 'pairs'" in caplog.text and _write(page, result)


def test_an_error_names_task_source_and_record(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.png", png(0)), ("a.txt", b"t"), ("a.json", b'{"label": 12}')])
    (task,) = parse_tasks([f"cifar10={path}"])
    with pytest.raises(
        ValueError, match=r"task 'cifar10' .*x\.tar.*record 'a': label 12 is outside"
    ):
        evaluate_task(make.HashedModel(), task)


def test_two_tasks_of_a_work_directory(workdir, shared_data, tmp_path):
    output = tmp_path / "new" / "results.json"
    tasks = f"cifar10={shared_data}/cifar10_test.tar,emoji=retrieval:{shared_data}/emoji_google.tar"
    arguments = [f"--model={workdir}", f"--tasks={tasks}", f"--output={output}", "--limit=40"]
    arguments += ["--batch_size=32", "--caption_template={caption}"]
    parse_command("diht_jax.evaluate", arguments, lambda _: evaluate.main([]))
    results = json.loads(output.read_text())
    assert (results["model"], results["step"], results["devices"]) == (str(workdir), 7, 8)
    cifar, emoji = results["results"]
    assert cifar["counts"]["images"] == emoji["counts"]["images"] == 40
    assert emoji["protocol"]["caption_template"] == "{caption}"
    assert len(cifar["protocol"]["templates"]) == 18
    page = (output.parent / "results.html").read_text()
    for result in (cifar, emoji):
        assert f'<section id="{result["task"]}">' in page
