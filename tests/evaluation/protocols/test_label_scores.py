"""Average precision and ROC AUC, against their definitions and other libraries."""

import fractions
import itertools

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.protocols.class_names import resolve_labels
from diht_jax.evaluation.protocols.label_scores import (
    area_under_roc,
    rank_items,
    run,
)
from diht_jax.records.schema import Pair
from tests.make import HashedModel


def _scores(seed, n=40):
    """Returns scores with few distinct values, so that positives and negatives tie."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, n) / 8, rng.random(n) < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    scores, targets = _scores(seed)
    pairs = list(itertools.product(scores[targets], scores[~targets]))
    expected = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert area_under_roc(scores, targets, np.ones(len(scores))) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_resampled_is_what_scikit_learn_says_of_the_drawn_rows(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, num_classes = 120, 7
    scores = rng.integers(0, 25, (n, num_classes)).astype(np.float32) / 8
    targets = rng.random((n, num_classes)) < [0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 0.0]
    targets[0] = [True] * (num_classes - 1) + [False]
    rankings = [rank_items(*columns) for columns in zip(scores.T, targets.T, strict=True)]
    for _ in range(20):
        drawn = rng.integers(0, n, n)
        present = np.flatnonzero(targets[drawn].any(axis=0))
        expected = metrics.average_precision_score(
            targets[drawn][:, present], scores[drawn][:, present], average="macro"
        )
        counts = np.bincount(drawn, minlength=n)
        found = np.nanmean([ranking.average_precision(counts) for ranking in rankings])
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_eleven_points_by_their_definition(seed):
    scores, targets = _scores(seed)
    curve = []
    for threshold in set(scores):
        found = scores >= threshold
        recall = fractions.Fraction(int(targets[found].sum()), int(targets.sum()))
        curve.append((recall, targets[found].mean()))
    best = [
        max((precision for recall, precision in curve if 10 * recall >= tenth), default=0)
        for tenth in range(11)
    ]
    ranking = rank_items(scores, targets)
    assert ranking.average_precision(np.ones(len(scores), int), "11") == pytest.approx(
        np.mean(best)
    )
    weights = np.random.default_rng(seed).integers(0, 3, len(scores))
    repeated = rank_items(np.repeat(scores, weights), np.repeat(targets, weights))
    assert ranking.average_precision(weights, "11") == pytest.approx(
        repeated.average_precision(np.ones(weights.sum(), int), "11")
    )


def test_images_that_count_neither_way(photos):
    scores, targets = _scores(1)
    ignored = np.arange(len(scores)) % 3 == 0
    ones = np.ones(len(scores), int)
    for points in ("all", "11"):
        left_out = rank_items(scores, targets, ignored).average_precision(ones, points)
        kept = rank_items(scores[~ignored], targets[~ignored]).average_precision(ones, points)
        assert left_out == pytest.approx(kept)
    pairs = _pairs(photos, [[0], [1], [0, 1], [1], []], "labels")
    pairs[1].metadata["ignored_labels"] = ["dog"]
    pairs[2].metadata["ignored_labels"] = [0]  # a present object overrides a difficult one
    task = _task("multilabel", "dog", "bird", interpolation="11")
    measured = run(task, Encoder(HashedModel(), pairs, Batching(8)))
    scores = measured.encoded.image_emb @ HashedModel().encode_text(["a dog.", "a bird."]).T
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 1], [0, 0]], bool)
    rest = [0, 2, 3, 4]
    expected = [
        rank_items(scores[rest, 0], targets[rest, 0]),
        rank_items(scores[:, 1], targets[:, 1]),
    ]
    values = [expected[i].average_precision(np.ones(4 + i, int), "11") for i in (0, 1)]
    assert measured.metrics == {"mean_average_precision": pytest.approx(np.mean(values))}
    # The same labels, stated as the classes that count.
    for pair, counted in zip(pairs, [[0, 1], [1], [0, 1], [0, 1], [0, 1]], strict=True):
        pair.metadata.pop("ignored_labels", None)
        pair.metadata["counted_labels"] = counted
    again = run(task, Encoder(HashedModel(), pairs, Batching(8)))
    assert again.metrics == measured.metrics


def _task(kind, *names, **options):
    return Task("x", kind, "", class_names=names, templates=("a {}.",), options=options)


def _pairs(photos, labels, field):
    return [
        Pair(f"{i}", photo, "", {field: label})
        for i, (photo, label) in enumerate(zip(photos, labels, strict=True))
    ]


@pytest.mark.parametrize("labels", [1, "dog", [1.0], [True], [{"id": 1}]])
def test_labels_of_another_kind_name_their_record(labels):
    pair = Pair("odd", b"", "", {"labels": labels})
    with pytest.raises(ValueError, match="record 'odd': .*'labels'"):
        resolve_labels(pair, "labels", ["cat", "dog"], {"cat": 0, "dog": 1})


def test_an_image_whose_list_is_null_is_left_out(photos):
    pairs = _pairs(photos, [[0], None, [1], [0, 1], []], "labels")
    measured = run(_task("multilabel", "dog", "bird"), Encoder(HashedModel(), pairs, Batching(8)))
    assert measured.encoded.dropped == {"no_label": 1}


def test_yes_and_no(photos):
    pairs = _pairs(photos, [0, 1, 1, "hateful meme", 0], "label")
    task = _task("binary", "meme", "hateful meme")
    measured = run(task, Encoder(HashedModel(), pairs, Batching(8)))
    no, yes = HashedModel().encode_text(["a meme.", "a hateful meme."])
    scores = measured.encoded.image_emb @ (yes - no)
    expected = area_under_roc(scores, np.array([0, 1, 1, 1, 0], bool), np.ones(5))
    assert measured.metrics == {"auroc": pytest.approx(expected)}
    with pytest.raises(ValueError, match="every image has the same label"):
        run(task, Encoder(HashedModel(), pairs[1:3], Batching(8)))
