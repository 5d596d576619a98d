"""Zero-shot classification: the classifier and its metrics against float64 formulas and tables."""

import io

import numpy as np
import PIL.Image
import pytest

from diht_jax.evaluation.embedding.encoding import Batching
from diht_jax.evaluation.protocols import class_metrics
from diht_jax.evaluation.protocols.classification import (
    classification_metrics,
    classify,
    rank_labels,
    zero_shot_classifier,
)
from diht_jax.records.schema import Pair


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class _TextTable:
    """Embeds each text as a fixed random vector, of a random length too."""

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
    # 21 prompts in batches of 4: the last one is filled up, so one shape is compiled.
    assert encode_text.batch_sizes == [4] * 6


def test_classes_without_images_compete_or_not():
    class Model(_TextTable):
        """Pictures are their own embeddings: 2 by 2 pixels in grey."""

        def preprocess(self, image):
            return np.asarray(image.convert("L").resize((4, 4)))

        def encode_image(self, images):
            return _unit(images.reshape(len(images), -1).astype(np.float32) + 1)

        def encode_text(self, texts):
            return self(texts)

    def picture(seed):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (4, 4), np.uint8)
        PIL.Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    labels = [7, 2, 7, 2, 5, 2]
    pairs = [Pair(f"{i}", picture(i), "", {"label": label}) for i, label in enumerate(labels)]
    names = [f"class {i}" for i in range(9)]
    every, some = (
        classify(Model(), pairs, names, ["the {}"], candidates=candidates, batching=Batching(4))
        for candidates in ("all", "with_images")
    )
    assert some.classes.names == ("class 2", "class 5", "class 7")
    assert some.classes.labels.tolist() == [2, 0, 2, 0, 1, 0]
    np.testing.assert_array_equal(some.classifier, every.classifier[[2, 5, 7]])
    similarities = some.encoded.image_emb @ every.classifier[[2, 5, 7]].T
    expected = np.mean(similarities.argmax(axis=1) == some.classes.labels)
    assert some.metrics["top1"] == pytest.approx(expected)
    assert every.metrics["top1"] <= some.metrics["top1"] and len(every.classes.names) == 9


def test_metrics_equal_sorting_in_float64_across_blocks(monkeypatch):
    monkeypatch.setattr(class_metrics, "_IMAGE_BLOCK", 64)
    rng = np.random.default_rng(0)
    num_classes = 23
    classifier = _unit(rng.normal(size=(num_classes, 12)))
    # Unbalanced, and class 5 has no image.
    labels = rng.choice(np.delete(np.arange(num_classes), 5), 301, p=_unit_sum(np.arange(1, 23)))
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


def _unit_sum(x):
    return x / x.sum()


def test_the_first_of_equal_classes_wins_whichever_is_right():
    classifier = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    image_emb = np.array([[1.0, 0.0]] * 3)
    predictions, ranks = rank_labels(image_emb, np.array([0, 1, 2]), classifier)
    assert predictions.tolist() == [1, 1, 1]
    assert ranks.tolist() == [2, 0, 1]
