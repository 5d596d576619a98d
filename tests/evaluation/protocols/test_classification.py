"""Class labels from each kind of source, and zero-shot classification against formulas."""

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.protocols import classification
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.protocols.class_names import (
    derive_classes,
    name_index,
    raw_label,
    resolve_label,
)
from diht_jax.evaluation.protocols.classification import (
    classification_metrics,
    f1_macro,
    rank_labels,
    run,
    zero_shot_classifier,
)
from diht_jax.records.schema import Pair
from tests.make import HashedModel, png


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class _TextTable:
    """Embeds each text as a fixed random vector of random length."""

    def __init__(self, dim=16):
        self.dim = dim
        self.batch_sizes = []

    def vector(self, text):
        rng = np.random.default_rng(list(text.encode()))
        return rng.normal(size=self.dim) * rng.uniform(0.1, 10)

    def __call__(self, texts):
        self.batch_sizes.append(len(texts))
        return np.stack([self.vector(text) for text in texts])


def test_classifier_is_the_normalised_mean_of_normalised_embeddings():
    names = [f"class {i} {{x}}" for i in range(7)]
    templates = ["a photo of a {}.", "the {}", "{} in the wild"]
    encode_text = _TextTable()
    classifier = zero_shot_classifier(encode_text, names, templates, batching=Batching(4))
    expected = [
        _unit(np.mean([_unit(encode_text.vector(t.replace("{}", n))) for t in templates], axis=0))
        for n in names
    ]
    assert classifier.dtype == np.float32
    np.testing.assert_allclose(classifier, expected, atol=1e-6)
    # 21 prompts in batches of 4: the last batch is padded, so one shape is compiled.
    assert encode_text.batch_sizes == [4] * 6


def _pairs(*metadata):
    return [Pair(f"{seed}", png(seed), "", fields) for seed, fields in enumerate(metadata)]


def _task(names, **options):
    return Task(
        "x", "classification", "", class_names=names, templates=("the {}",), options=options
    )


def test_classes_without_images_compete_or_not():
    pairs = _pairs(*({"label": label} for label in [7, 2, 7, 2, 5, 2]))
    names = tuple(f"class {i}" for i in range(9))
    every, some = (
        run(_task(names, candidates=candidates), Encoder(HashedModel(), pairs, Batching(4)))
        for candidates in ("all", "with_images")
    )
    classes = some.result.classes
    assert classes.names == ("class 2", "class 5", "class 7")
    assert classes.labels.tolist() == [2, 0, 2, 0, 1, 0]
    np.testing.assert_array_equal(some.result.classifier, every.result.classifier[[2, 5, 7]])
    similarities = some.encoded.image_emb @ every.result.classifier[[2, 5, 7]].T
    expected = np.mean(similarities.argmax(axis=1) == classes.labels)
    assert some.metrics["top1"] == pytest.approx(expected)
    assert every.metrics["top1"] <= some.metrics["top1"] and every.counts["classes"] == 9


def test_the_worst_group_and_resampled_images():
    # Region 3 has one image, so a resample may have none of it.
    regions = np.array([1, 1, 0, 1, 0, 3])
    pairs = _pairs(*({"label": i, "region": region} for i, region in enumerate(regions.tolist())))
    task = _task(tuple("abcdefg"), group="region", f1="macro")
    measured = run(task, Encoder(HashedModel(), pairs))
    ranks = measured.result.ranks
    assert [row["group"] for row in measured.details["per_group"]] == [0, 1, 3]
    for counts in (np.ones(6, int), np.array([1, 2, 0, 1, 3, 0])):
        there = np.repeat(np.arange(6), counts)
        found = measured.measure(counts)
        for name, k in (("worst_group", 1), ("worst_group_top5", 5)):
            shares = [np.mean(ranks[there][regions[there] == r] < k) for r in set(regions[there])]
            assert found[name] == pytest.approx(min(shares))
        repeated = classification_metrics(
            measured.encoded.image_emb[there], there, measured.result.classifier
        )
        assert {name: found[name] for name in repeated} == pytest.approx(repeated)


def test_f1_is_that_of_scikit_learn_over_the_classes_with_images():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    # Classes 7 and 8 of nine have no image but are predicted, as in iWildCam's test split.
    labels, predictions = rng.integers(0, 7, 300), rng.integers(0, 9, 300)
    predictions[::3] = labels[::3]
    for counts in (np.ones(300, int), rng.integers(0, 3, 300) * (labels != 2)):
        there = np.repeat(np.arange(300), counts)
        expected = metrics.f1_score(
            labels[there], predictions[there], average="macro", labels=np.unique(labels[there])
        )
        assert f1_macro(predictions, labels, counts) == pytest.approx(expected)


def test_metrics_equal_sorting_in_float64_across_blocks(monkeypatch):
    monkeypatch.setattr(classification, "_IMAGE_BLOCK", 64)
    rng = np.random.default_rng(0)
    num_classes = 23
    classifier = _unit(rng.normal(size=(num_classes, 12)))
    # Unbalanced; class 5 has no image.
    shares = np.arange(1, 23) / np.arange(1, 23).sum()
    labels = rng.choice(np.delete(np.arange(num_classes), 5), 301, p=shares)
    image_emb = _unit(classifier[labels] + 0.4 * rng.normal(size=(301, 12)))
    order = np.argsort(-(image_emb @ classifier.T), axis=1)
    hits = order[:, 0] == labels
    per_class = [hits[labels == c].mean() for c in range(num_classes) if (labels == c).any()]
    metrics = classification_metrics(image_emb, labels, classifier)
    assert metrics == pytest.approx(
        {
            "top1": hits.mean(),
            "top5": np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]),
            "mean_per_class": np.mean(per_class),
        }
    )
    assert 0.2 < metrics["top1"] < metrics["top5"] < 1
    assert abs(metrics["top1"] - metrics["mean_per_class"]) > 1e-3
    predictions, _ = rank_labels(image_emb, labels, classifier)
    np.testing.assert_array_equal(predictions, order[:, 0])


def test_the_first_of_equal_classes_wins_whichever_is_right():
    classifier = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    image_emb = np.array([[1.0, 0.0]] * 3)
    predictions, ranks = rank_labels(image_emb, np.array([0, 1, 2]), classifier)
    assert predictions.tolist() == [1, 1, 1]
    assert ranks.tolist() == [2, 0, 1]


TEMPLATES = ("a photo of a {}.",)


def _raws(*rows):
    """Builds pairs from rows of (metadata, caption)."""
    return [
        raw_label(Pair(key=f"k{i}", image=b"", caption=caption, metadata=metadata))
        for i, (metadata, caption) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "names", "labels"),
    [
        # Names as labels (the CIFAR tar): in alphabetical order.
        ([({"label": "frog"}, ""), ({"label": "deer"}, "")], ("deer", "frog"), [1, 0]),
        # Integers with class names (folders, TFDS): in label order; "_" is a space.
        (
            [({"label": 7, "class_name": "b_c"}, ""), ({"label": 2, "class_name": "z"}, "")],
            ("z", "b c"),
            [1, 0],
        ),
        # Integers with the class names as captions.
        (
            [({"label": 1}, "a photo of a cat."), ({"label": 0}, "a photo of a dog.")],
            ("dog", "cat"),
            [1, 0],
        ),
        # Captions only.
        (
            [({}, f"a photo of a {name}.") for name in ("cat", "dog", "cat", "dog")],
            ("cat", "dog"),
            [0, 1, 0, 1],
        ),
    ],
)
def test_classes_found_in_the_data(rows, names, labels):
    classes = derive_classes(_raws(*rows), TEMPLATES)
    assert (classes.names, classes.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([({}, "one"), ({}, "two"), ({}, "three")], "captions are no classes .3 different ones"),
        ([({"label": 1}, ""), ({"label": "cat"}, "")], "mixed.*'k1'.*'k0'|mixed.*'k0'.*'k1'"),
        (
            [({"label": 1}, "a cat"), ({"label": 1}, "a dog")],
            "'k1': label 1 goes with .*--class_names",
        ),
    ],
)
def test_what_would_be_a_guess_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        derive_classes(_raws(*rows), TEMPLATES)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (1, 1),
        ("Lawn_Mower", 1),
        ("CAT", 0),
        ("2", 2),
        ("crane", "several classes"),
        (5, "outside of the 5"),
        (-1, "outside of the 5"),
    ],
)
def test_labels_among_given_names(label, expected):
    names = ("cat", "lawn mower", "tench", "crane", "crane")
    (raw,) = _raws(({"label": label}, ""))
    if isinstance(expected, int):
        assert resolve_label(raw, names, name_index(names)) == expected
    else:
        with pytest.raises(ValueError, match=f"'k0'.*{expected}"):
            resolve_label(raw, names, name_index(names))


def test_an_integer_that_the_data_names_otherwise_is_refused():
    # Names of a class folder, numbered in alphabetical order.
    names = ("dog", "cardigan", "cardigan welsh corgi")
    *right, other = _raws(
        *(({"label": 2, "class_name": name}, "") for name in (names[2], "Cardigan", "n02", "Dog"))
    )
    assert [resolve_label(raw, names, name_index(names)) for raw in right] == [2, 2, 2]
    (angle,) = _raws(({"label": 2, "class_name": "2"}, ""))  # as a class without a name is stored
    assert resolve_label(angle, ("0", "2", "4"), name_index(("0", "2", "4"))) == 2
    with pytest.raises(ValueError, match="'k3': label 2 is 'Dog' in the data and 'cardigan welsh"):
        resolve_label(other, names, name_index(names))


@pytest.mark.parametrize("splits", ["train", 3, None, {"a": 1}, [[1]], ["train"]])
def test_splits_are_lists_of_numbers(splits):
    pairs = _pairs(*({"label": label, "splits": splits} for label in (0, 1, 1)))
    measured = run(_task(("a", "b")), Encoder(HashedModel(), pairs, Batching(4)))
    assert measured.result.splits == {} and measured.counts["images"] == 3


def test_another_field_holds_the_label():
    pair = Pair("k", b"", "", {"label": 3, "shape": "star", "class_name": "red"})
    assert raw_label(pair, "shape").label == "star"
    assert raw_label(pair, "shape").class_name is None
    with pytest.raises(ValueError, match="'k' has no metadata field 'colour'.*shape"):
        raw_label(pair, "colour")
