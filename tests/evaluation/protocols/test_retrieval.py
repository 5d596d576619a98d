"""Retrieval ranks and recalls against a float64 sort, and ties."""

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols import retrieval
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.protocols.retrieval import retrieval_metrics, retrieval_ranks, run
from diht_jax.records.schema import Pair
from tests.make import HashedModel


def _unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _random_problem(num_images, rng, captions_per_image=(1, 2, 5)):
    image_emb = _unit(rng.normal(size=(num_images, 24)))
    counts = rng.choice(captions_per_image, num_images)
    image_of_text = rng.permutation(np.repeat(np.arange(num_images), counts))
    # Texts are close enough to their images that recalls are neither 0 nor 1.
    text_emb = _unit(image_emb[image_of_text] + 0.45 * rng.normal(size=(counts.sum(), 24)))
    return image_emb, text_emb, image_of_text


def _metrics_by_sorting(image_emb, text_emb, image_of_text):
    """Computes the metrics from full rankings, query by query, in float64."""
    similarities = text_emb.astype(np.float64) @ image_emb.astype(np.float64).T
    t2i = [
        list(np.argsort(-row)).index(own)
        for row, own in zip(similarities, image_of_text, strict=True)
    ]
    i2t = []
    for image, column in enumerate(similarities.T):
        order = np.argsort(-column)
        i2t.append(min(rank for rank, text in enumerate(order) if image_of_text[text] == image))
    expected = {}
    for direction, ranks in (("t2i", t2i), ("i2t", i2t)):
        for k in (1, 5, 10):
            expected[f"{direction}_r{k}"] = sum(rank < k for rank in ranks) / len(ranks)
        expected[f"{direction}_median_rank"] = float(np.median(ranks)) + 1
    return expected


@pytest.mark.parametrize("num_images", [3, 97, 700])
def test_metrics_equal_sorting_in_float64_across_blocks(num_images, monkeypatch):
    # 700 images and about 1,900 texts take several blocks in both directions, with remainders.
    monkeypatch.setattr(retrieval, "_BLOCK", 2**17)
    problem = _random_problem(num_images, np.random.default_rng(num_images))
    assert retrieval_metrics(*problem) == pytest.approx(_metrics_by_sorting(*problem), abs=1e-12)


def test_a_model_that_gives_everything_one_embedding_scores_zero():
    image_emb = np.tile(_unit(np.ones((1, 8))), (40, 1))
    metrics = retrieval_metrics(image_emb, image_emb, np.arange(40))
    assert {metrics[f"{d}_r{k}"] for d in ("t2i", "i2t") for k in (1, 5, 10)} == {0.0}
    assert metrics["t2i_median_rank"] == 40


def test_equal_captions_of_two_images_tie_wherever_they_lie():
    rng = np.random.default_rng(0)
    image_emb = _unit(rng.normal(size=(500, 512)))
    text_emb = image_emb.copy()  # a perfect model
    pairs = [(3, 411), (77, 78), (130, 499)]
    for first, second in pairs:
        text_emb[first] = text_emb[second]
    _, i2t = retrieval_ranks(image_emb, text_emb, np.arange(500))
    tied = [second for _, second in pairs]
    assert i2t[tied].tolist() == [1, 1, 1]
    untouched = np.setdiff1d(np.arange(500), np.ravel(pairs))
    assert not i2t[untouched].any()


def test_equal_captions_are_right_for_all_their_images_on_request():
    rng = np.random.default_rng(5)
    image_emb, text_emb, image_of_text = _random_problem(60, rng)
    numbers = rng.integers(0, 70, len(text_emb)).astype(np.int32)
    text_emb = _unit(rng.normal(size=(70, 24)))[numbers]  # equal texts have equal embeddings
    similarities = text_emb.astype(np.float64) @ image_emb.astype(np.float64).T
    texts_of = [set(numbers[image_of_text == image]) for image in range(60)]
    right = np.array([[number in own for own in texts_of] for number in numbers])

    def ranks(similarities, right):
        best = np.where(right, similarities, -np.inf).max(axis=1, keepdims=True)
        return (~right & (similarities > best)).sum(axis=1).tolist()

    t2i, i2t = retrieval_ranks(image_emb, text_emb, image_of_text, numbers)
    assert t2i.tolist() == ranks(similarities, right)
    assert i2t.tolist() == ranks(similarities.T, right.T)
    alone, _ = retrieval_ranks(image_emb, text_emb, image_of_text)
    assert alone.sum() > t2i.sum()


def test_an_image_is_resampled_with_its_captions(photos):
    captions = [[f"picture {i}", f"number {i}"][: 1 + i % 2] for i in range(5)]
    pairs = [
        Pair(f"{i}", photo, "", {"captions": own})
        for i, (photo, own) in enumerate(zip(photos, captions, strict=True))
    ]
    measured = run(
        Task("x", "retrieval", "", caption_template="{caption}"), Encoder(HashedModel(), pairs)
    )
    result = measured.result
    assert result.captions == sum(captions, []) and measured.counts["texts"] == 7
    image_of_text = np.repeat(np.arange(5), [len(own) for own in captions])
    expected = retrieval_metrics(measured.encoded.image_emb, result.text_emb, image_of_text)
    assert measured.metrics == expected
    asked = measured.measure(np.array([0, 0, 0, 2, 0]))
    assert asked["i2t_r1"] == float(result.i2t_ranks[3] < 1)
    assert asked["t2i_r1"] == np.mean(result.t2i_ranks[image_of_text == 3] < 1)
