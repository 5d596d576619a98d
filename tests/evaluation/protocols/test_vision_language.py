"""Winoground, entailment and questions: readers and protocols against hand-made tables."""

import json
import pathlib

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.protocols.answers import normalise_answer, vqa_credit
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.readers.base import Skipped
from tests import make

_NUM_PICTURES = 5


@pytest.fixture
def folder(tmp_path):
    """Returns a folder in ALBEF's layout: annotation files, and images named by their red value."""
    (tmp_path / "images").mkdir()
    for number in range(_NUM_PICTURES):
        make.plain((number, 0, 0), (2, 2)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def read_annotations(path, **options):
    return open_units(f"annotations:{path}", options).entries()


def _measure(model, text):
    (task,) = parse_tasks([text])
    units = open_units(task.source, task.source_options)
    return PROTOCOLS[task.kind].run(task, Encoder(model, units, Batching(8)))


class _Oracle:
    """Embeds picture i as the i-th unit vector, and texts as their similarities to the pictures."""

    logit_scale = 1.0

    def __init__(self, text_emb):
        self._text_emb = text_emb

    def preprocess(self, image):
        return np.asarray(image)

    def encode_image(self, images):
        return np.eye(_NUM_PICTURES)[images[:, 0, 0, 0]]

    def encode_text(self, texts):
        blank = np.zeros(_NUM_PICTURES)
        return np.array([self._text_emb.get(text, blank) for text in texts])


def _write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def _winoground(folder):
    rows = [  # two joined files, which share ids
        {"id": 7, "caption_0": "a", "caption_1": "b", "image_0": "0", "image_1": "1"},
        {"id": 7, "caption_0": "c", "caption_1": "d", "image_0": "2", "image_1": "3"},
        {"id": 9, "caption_0": "e", "caption_1": "f", "image_0": "4", "image_1": "none"},
    ]
    return _write(folder / "examples.jsonl", rows)


def test_winoground_scores(folder):
    # Example 0: image 0 prefers its own a (.9 > .5), image 1 its own b (.8 > .6): text is correct.
    #            a prefers image 0 (.9 > .6), b image 1 (.8 > .5): image is correct.
    # Example 1: image 2 has c .5 > d .4, image 3 has d .9 > c .7: text is correct;
    #            c prefers the wrong image 3 (.7 > .5): image is wrong.
    model = _Oracle(
        {
            "a": [0.9, 0.6, 0, 0, 0],
            "b": [0.5, 0.8, 0, 0, 0],
            "c": [0, 0, 0.5, 0.7, 0],
            "d": [0, 0, 0.4, 0.9, 0],
            "e": [0, 0, 0, 0, 1],
        },
    )
    result = _measure(model, f"winoground={_winoground(folder)}?caption_template={{caption}}")
    assert result.measure(np.ones(2, int)) == {"text": 1.0, "image": 0.5, "group": 0.5}
    assert result.counts["incomplete_examples"] == 1
    assert result.encoded.dropped == {"no_image": 1}
    assert result.measure(np.array([0, 2])) == {"text": 1.0, "image": 0.0, "group": 0.0}


def test_rows_of_one_image_are_one_pair(folder):
    rows = [
        {"image": "0", "caption": ["one", "two"]},
        {"image": "3", "caption": "three"},
        {"image": "0", "caption": "four"},
        {"image": "../x", "caption": "out"},
        {"image": "9", "caption": "gone"},
    ]
    path = _write(folder / "a.json", rows)
    root = str(folder / "images")
    pairs = list(read_annotations(path, image_root=root, image_name="{}.png"))
    assert [pair.metadata["rows"] for pair in pairs[:2]] == [[rows[0], rows[2]], [rows[1]]]
    assert pairs[0].metadata["captions"] == ["one", "two", "four"]
    assert pairs[1].caption == "three"
    assert [(type(entry), entry.key, entry.reason) for entry in pairs[2:]] == [
        (Skipped, "../x.png", "refused_path"),
        (Skipped, "9.png", "no_image"),
    ]


def test_entailment(folder):
    rows = [
        {"image": 0, "sentence": "a dog", "label": "entailment"},
        {"image": 1, "sentence": "a dog", "label": "contradiction"},
        {"image": 2, "sentence": "a cat", "label": "neutral"},
        {"image": 2, "sentence": "a dog", "label": "neutral"},
    ]
    path = _write(folder / "ve.json", rows)
    model = _Oracle(
        {
            "a dog": [0.9, 0.2, 0.9, 0, 0],
            "maybe a dog": [0.1, 0.1, 0.3, 0, 0],
            "it is not true that a dog": [0.3, 0.6, 0.1, 0, 0],
            "maybe a cat": [0, 0, 0.4, 0, 0],
        },
    )
    text = f"entailment:{path}?image_root={folder}/images&image_name={{}}.png"
    result = _measure(model, text)
    assert result.result == ["entailment", "contradiction", "neutral", "entailment"]
    assert result.measure(np.ones(3, int)) == {"accuracy": 0.75}
    assert result.counts["texts"] == 6
    # A resample with the third image (two questions) three times and the first once.
    assert result.measure(np.array([1, 0, 3]))["accuracy"] == pytest.approx(4 / 7)


def test_questions(folder):
    rows = [
        {"image": 0, "question": "what?", "answer": ["dog"] * 4 + ["cat"] * 6},
        {"image": 1, "question": "what?", "answer": ["Two!"] * 2 + ["bird"] * 8},
        {"image": 1, "question": "unanswered?"},
        {"image": 4, "question": "unanswered?"},
    ]
    path = _write(folder / "vqa.json", rows)
    names = _write(folder / "answers.json", ["dog", "2"])
    model = _Oracle({"what? dog": [0.8, 0.1, 0, 0, 0], "what? 2": [0.5, 0.9, 0, 0, 0]})
    options = f"class_names={names}&answer_template={{question}} {{answer}}"
    text = f"vqa:{path}?image_root={folder}/images&image_name={{}}.png&{options}"
    result = _measure(model, text)
    assert result.result == ["dog", "2"]
    # Without one of the two, one match is left (1/3); without one of the eight, two (2/3).
    credits = [result.measure(counts)["accuracy"] for counts in np.eye(2, dtype=int)]
    np.testing.assert_allclose(credits, [1.0, (2 / 3 + 8 * 2 / 3) / 10])
    assert result.encoded.dropped == {"no_answer": 1}


@pytest.mark.parametrize("answer", [3, [3, 3], [{"answer": "dog"}]])
def test_answers_that_are_no_texts_name_their_picture(answer, folder):
    path = _write(folder / "vqa.json", [{"image": "1.png", "question": "what?", "answer": answer}])
    names = _write(folder / "answers.json", ["dog", "2"])
    with pytest.raises(ValueError, match=r"record '1\.png': .*'answer'"):
        _measure(make.HashedModel(), f"vqa:{path}?image_root={folder}/images&class_names={names}")


@pytest.mark.parametrize("image_name", ["{name}.png", "{}{}.png", "{.png"])
def test_a_wrong_image_name_is_named(image_name, folder):
    path = _write(folder / "a.json", [{"image": "1", "caption": "one"}])
    with pytest.raises(ValueError, match="image_name={"):
        list(read_annotations(path, image_name=image_name))


def test_answers_and_credits_are_those_of_the_official_code():
    official = json.loads(pathlib.Path(__file__).with_name("vqa_official.json").read_text())
    assert len(official["normalised"]) > 200 and len(official["credits"]) == 200
    found = {text: normalise_answer(text) for text in official["normalised"]}
    assert found == official["normalised"]
    for answer, said, credit in official["credits"]:
        assert vqa_credit(answer, said) == pytest.approx(credit), (answer, said)
    # Unanimous answers are not normalised there; a single answer is compared after normalising.
    assert vqa_credit("2", ["two"] * 10) == 0
    assert vqa_credit("Two", "two.") == vqa_credit("two", ["2"]) == 1


def test_image_and_caption_of_annotations_are_found_by_their_names(folder):
    rows = [{"file_name": "images/0.png", "Text": text} for text in ("one", "two")]
    (pair,) = read_annotations(_write(folder / "a.json", rows))
    assert (pair.key, pair.caption, pair.metadata["captions"]) == (
        "images/0.png",
        "one",
        ["one", "two"],
    )
