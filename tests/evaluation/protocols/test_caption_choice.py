"""Caption choice against hand-made tables and reimplementations of the official scores."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.protocols.caption_choice import questions_of, run
from diht_jax.evaluation.sources.annotations import SUGARCREPE_SUBSETS
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.records.schema import Pair
from tests.make import HashedModel, png, write_tar

embed = HashedModel.embed


def _embed_picture(path, box=None):
    picture = Image.open(path).convert("RGB")
    model = HashedModel()
    return embed(model.preprocess(picture.crop(box) if box else picture).tobytes())


def _png_named(path, seed):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(seed))


@pytest.fixture
def sugarcrepe(tmp_path):
    """Returns a folder with all seven files, on four images of which one is missing."""
    rng = np.random.default_rng(0)
    names = [f"{number:012}.jpg" for number in range(4)]
    for seed, name in enumerate(names[:3]):
        _png_named(tmp_path / "val2017" / name, seed)
    for size, subset in enumerate(SUGARCREPE_SUBSETS, start=3):
        rows = {
            # The numbers have gaps, as in the published files.
            str(2 * number): {
                "filename": names[rng.integers(4)],
                "caption": f"{subset} right {number}",
                "negative_caption": f"{subset} wrong {number}",
            }
            for number in range(2 * size)
        }
        (tmp_path / f"{subset}.json").write_text(json.dumps(rows))
    return tmp_path


def _sugarcrepe_truth(folder):
    """Returns the official code's accuracy of each subset, and the number of questions."""
    accuracies, total, missing = {}, 0, 0
    for subset in SUGARCREPE_SUBSETS:
        hits = []
        for row in json.loads((folder / f"{subset}.json").read_text()).values():
            path = folder / "val2017" / row["filename"]
            if not path.exists():
                missing += 1
                continue
            image = _embed_picture(path).astype(np.float64)
            positive = float(embed(row["caption"].encode()) @ image)
            hits.append(
                1 if positive > float(embed(row["negative_caption"].encode()) @ image) else 0
            )
        accuracies[subset] = sum(hits) / len(hits)
        total += len(hits)
    return accuracies, total


def test_sugarcrepe_is_scored_as_by_its_code(sugarcrepe):
    accuracies, total = _sugarcrepe_truth(sugarcrepe)
    texts = [f"sugarcrepe=sugarcrepe:{sugarcrepe}"]
    texts += [
        f"sugarcrepe_{name}=sugarcrepe:{sugarcrepe}/{name}.json" for name in SUGARCREPE_SUBSETS
    ]
    whole, *single = [
        evaluate_task(HashedModel(), task, batch_size=8, num_resamples=50)
        for task in parse_tasks(texts)
    ]
    for result, name in zip(single, SUGARCREPE_SUBSETS, strict=True):
        assert result["metrics"] == {"accuracy": pytest.approx(accuracies[name])}
        assert result["reported"] == ["accuracy"] and "per_group" not in result
    assert whole["metrics"]["macro_accuracy"] == pytest.approx(sum(accuracies.values()) / 7)
    found = {row["group"]: row["accuracy"] for row in whole["per_group"]}
    assert found == {name: pytest.approx(value) for name, value in accuracies.items()}
    sizes = {row["group"]: row["questions"] for row in whole["per_group"]}
    micro = sum(accuracies[name] * sizes[name] for name in sizes) / total
    assert whole["metrics"]["accuracy"] == pytest.approx(micro)
    # Every image is read and embedded once, and the missing one is counted.
    assert whole["counts"] == {
        "images": 3,
        "pictures": 3,
        "questions": total,
        "texts": 2 * total,
        "limit": None,
        "dropped": {"no_image": 1},
    }
    assert whole["units"] == {"accuracy": "share", "macro_accuracy": "share"}
    assert whole["protocol"]["caption_template"] == "{caption}"
    low, high = whole["intervals"]["macro_accuracy"]
    assert low <= whole["metrics"]["macro_accuracy"] <= high


def _aro_rows(folder, names, rng, count):
    """Returns test cases on two images, with boxes that are shared or exceed the image."""
    boxes = [(2, 3, 10, 8), (0, 0, 30, 24), (20, 10, 15, 20), (5, 5, 1, 1)]
    rows = []
    for number in range(count):
        box = boxes[rng.integers(len(boxes))]
        rows.append(
            {
                "image_id": str(number % 2),
                "image_path": f"{number % 2}.jpg",
                **{f"bbox_{side}": value for side, value in zip("xywh", box, strict=True)},
                "true_caption": f"the {number} is {names[number]} it",
                "false_caption": f"the it is {names[number]} {number}",
            }
        )
    for number in range(2):
        _png_named(folder / "images" / f"{number}.jpg", number)
    return rows


def _aro_hits(folder, rows):
    """Scores as ARO's code does: of [false, true] captions, index 1 must have the largest score."""
    hits = []
    for row in rows:
        left, top, width, height = (row[f"bbox_{side}"] for side in "xywh")
        box = (left, top, left + width, top + height)
        image = _embed_picture(folder / "images" / row["image_path"], box).astype(np.float64)
        captions = [row["false_caption"], row["true_caption"]]
        hits.append(int(np.argmax([embed(text.encode()) @ image for text in captions])) == 1)
    return np.array(hits)


def test_visual_genome_relations_and_attributes_are_scored_as_by_aros_code(tmp_path):
    rng = np.random.default_rng(1)
    relations = ["above", "riding", "next to", "of"]  # the last two are excluded
    names = [relations[rng.integers(4)] for _ in range(40)]
    rows = _aro_rows(tmp_path, names, rng, 40)
    for row, name in zip(rows, names, strict=True):
        row["relation_name"] = name
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(rows))
    hits = _aro_hits(tmp_path, rows)
    macro = np.mean([hits[[n == name for n in names]].mean() for name in ("above", "riding")])
    (task,) = parse_tasks(f"aro_vg_relation=aro:{tmp_path}/visual_genome_relation.json")
    result = evaluate_task(HashedModel(), task, batch_size=8)
    assert result["metrics"] == pytest.approx({"accuracy": hits.mean(), "macro_accuracy": macro})
    assert result["counts"]["pictures"] == 2 and result["counts"]["images"] <= 8

    # One pair of attributes has 25 test cases and counts; another has 24 and does not.
    names = ["old"] * 25 + ["wet"] * 24
    rows = _aro_rows(tmp_path, names, rng, 49)
    for row, name in zip(rows, names, strict=True):
        row["attributes"] = [name, "red"]
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(rows))
    hits = _aro_hits(tmp_path, rows)
    (task,) = parse_tasks(f"aro_vg_attribution=aro:{tmp_path}/visual_genome_attribution.json")
    result = evaluate_task(HashedModel(), task, batch_size=8)
    expected = {"accuracy": hits.mean(), "macro_accuracy": hits[:25].mean()}
    assert result["metrics"] == pytest.approx(expected)
    assert [row["group"] for row in result["per_group"]] == ["old_red"]


class _Table(HashedModel):
    """Text similarities from a hand-made table; "a b" and "a  b" have equal tokens."""

    def __init__(self, similarities):
        self._similarities = similarities

    def tokenize(self, texts):
        return np.array([list(f"{' '.join(text.split()):<80}".encode()) for text in texts])

    def encode_image(self, images):
        return np.tile(np.float32([1, 0]), (len(images), 1))

    def encode_text(self, texts):
        cosines = np.float32([self._similarities.get(text, 0.0) for text in texts])
        # Equal texts may get slightly different values in different rows of a batch.
        cosines += np.float32(1e-6) * np.arange(len(texts), dtype=np.float32)
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)


def test_orders_count_equal_captions_as_right_and_others_as_wrong(tmp_path):
    _png_named(tmp_path / "val2014" / "a.jpg", 0)
    cases = [
        ["one a", "one b", "one c"],  # correct
        ["two a", "two b", "two c"],  # wrong: b is more similar
        ["three a", "three  a", "three a"],  # equal captions: correct
        ["four a", "four b"],  # correct
    ]
    rows = [{"image": "val2014/a.jpg", "caption_options": options} for options in cases]
    (tmp_path / "coco_order.json").write_text(json.dumps(rows))
    model = _Table({"one a": 0.9, "one b": 0.8, "two a": 0.5, "two b": 0.6, "four a": 0.3})
    (task,) = parse_tasks(f"aro_coco_order=aro:{tmp_path}/coco_order.json")
    result = evaluate_task(model, task, batch_size=8)
    assert result["metrics"] == {"accuracy": 3 / 4}
    assert result["counts"]["texts"] == 11
    (task,) = parse_tasks(f"caption_choice:aro:{tmp_path}/coco_order.json")
    assert evaluate_task(model, task, batch_size=8)["metrics"] == {"accuracy": 2 / 4}


def test_captions_of_any_source_are_choices_whose_first_is_right(tmp_path):
    tars, hits = ({}, {}), []  # with the same keys
    for number in range(9):
        captions = [f"right {number}", f"wrong {number}"]
        sidecar = json.dumps({"captions": captions}).encode()
        key = str(number // 2)
        tars[number % 2].update({f"{key}.png": png(number), f"{key}.json": sidecar})
        image = _embed_picture(io.BytesIO(png(number)))
        right, wrong = (embed(text.encode()) @ image for text in captions)
        hits.append(right > wrong)
    for number, members in enumerate(tars):
        write_tar(tmp_path / f"{number}.tar", members)
    (task,) = parse_tasks(f"caption_choice:{tmp_path}/*.tar")
    result = evaluate_task(HashedModel(), task, batch_size=8)
    assert result["metrics"] == {"accuracy": pytest.approx(np.mean(hits))} and 0 < np.mean(hits) < 1
    assert result["counts"]["pictures"] == 9


def test_other_questions_in_the_metadata_name_their_record():
    with pytest.raises(ValueError, match="record 'odd': .*'questions'"):
        questions_of(Pair("odd", b"", "", {"questions": ["what is it?"]}))


def test_pictures_are_resampled_with_all_their_questions(sugarcrepe):
    (task,) = parse_tasks(f"sugarcrepe=sugarcrepe:{sugarcrepe}")
    measured = run(task, Encoder(HashedModel(), open_units(task.source, {}), Batching(8)))
    result = measured.result
    only = result.picture_of_question == 1
    found = measured.measure(np.array([0, 2, 0]))
    assert found["accuracy"] == pytest.approx(result.is_right[only].mean())
    means = [
        result.is_right[only & own].mean() for own in result.groups.values() if own[only].any()
    ]
    assert found["macro_accuracy"] == pytest.approx(np.mean(means))
