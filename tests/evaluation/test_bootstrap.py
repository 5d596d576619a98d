"""Bootstrap intervals, against the normal approximation and against resampling by hand."""

import numpy as np
import pytest

from diht_jax.evaluation.bootstrap import (
    describe_samples,
    paired_samples,
    percentile_interval,
    resample,
)
from diht_jax.evaluation.embedding.encoding import EncodedImages
from diht_jax.evaluation.protocols.class_names import Classes
from diht_jax.evaluation.protocols.classification import (
    ClassificationResult,
    classification_metrics,
)
from diht_jax.evaluation.protocols.retrieval import (
    RetrievalResult,
    retrieval_metrics,
    retrieval_ranks,
)


def test_interval_of_a_share_is_that_of_the_binomial():
    hits = np.arange(400) < 120
    found = resample(lambda counts: {"share": (counts * hits).sum() / 400}, 400)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    interval = percentile_interval(found["share"])
    assert interval == pytest.approx([0.3 - half, 0.3 + half], abs=0.006)


def test_a_paired_difference_has_the_interval_of_mcnemar():
    # 1,000 images: both right on 600, only A on 30, only B on 60.
    first, second = np.arange(1000) < 630, (np.arange(1000) < 600) | (np.arange(1000) >= 940)

    def measured(hits, seed=0, items="x"):
        samples = resample(
            lambda counts: {"top1": (counts * hits).sum() / counts.sum()}, 1000, seed=seed
        )
        return {"resamples": describe_samples(samples, items, 1000, seed)}

    a, b = measured(first), measured(second)
    pair = paired_samples(a, b, "top1")
    low, high = percentile_interval(pair[1].astype(float) - pair[0])
    # The variance of the paired difference is (30 + 60 - 30^2 / 1000) / 1000^2.
    half = 1.96 * np.sqrt(90 - 0.9) / 1000
    assert [low, high] == pytest.approx([0.03 - half, 0.03 + half], abs=0.0025)
    assert low > 0  # while the intervals of A and of B overlap by far
    for other in (measured(second, seed=1), measured(second, items="y"), {}):
        assert paired_samples(a, other, "top1") is None
    assert paired_samples(a, b, "top5") is None


def _encoded(image_emb):
    n = len(image_emb)
    return EncodedImages(image_emb, [None] * n, list(range(n)), {}, [], 0.0)


def _unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_classification_counts_are_repetitions():
    rng = np.random.default_rng(0)
    image_emb, classifier = _unit(rng, 40, 4), _unit(rng, 7, 4)
    labels = rng.integers(0, 7, 40).astype(np.int32)
    similarities = image_emb @ classifier.T
    ranks = (similarities > similarities[np.arange(40), labels][:, None]).sum(axis=1)
    classes = Classes(tuple("abcdefg"), labels, "")
    result = ClassificationResult(_encoded(image_emb), classes, ("{}",), classifier, None, ranks)
    counts = rng.integers(0, 3, 40)
    repeated = np.repeat(np.arange(40), counts)
    expected = classification_metrics(image_emb[repeated], labels[repeated], classifier)
    assert result.resampled_metrics(counts) == pytest.approx(expected)


def test_retrieval_counts_ask_an_image_with_its_captions():
    rng = np.random.default_rng(1)
    image_emb, text_emb = _unit(rng, 12, 4), _unit(rng, 30, 4)
    image_of_text = np.concatenate([np.arange(12), rng.integers(0, 12, 18)]).astype(np.int32)
    t2i, i2t = retrieval_ranks(image_emb, text_emb, image_of_text)
    result = RetrievalResult(_encoded(image_emb), [""] * 30, text_emb, image_of_text, t2i, i2t, 30)
    once = np.ones(12, int)
    assert result.resampled_metrics(once) == retrieval_metrics(image_emb, text_emb, image_of_text)
    only = np.zeros(12, int)
    only[3] = 2
    asked = result.resampled_metrics(only)
    assert asked["i2t_r1"] == float(i2t[3] < 1)
    assert asked["t2i_r5"] == pytest.approx(np.mean(t2i[image_of_text == 3] < 5))
