"""Trains linear concept classifiers (heads) on the embeddings of a teacher, and evaluates them.

Method: DiHT, arXiv 2301.02280, "Concept Distillation": one head for objects and one for
attributes. All functions work on arrays; `heads.py` reads and writes the files.

Recall is measured against the concepts that the image's caption names: the share of them among the
top k predictions, averaged over images or over concepts.

Our additions: embeddings are standardised during training (and folded into the head afterwards), so
one learning rate and one penalty fit any teacher. The parameters with the lowest held-out loss are
kept, and training stops if this loss has not fallen for a quarter of the steps. A small or wrongly
captioned set is memorised within some dozens of steps, so early steps are evaluated as well.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from data_prep.labelling.examples import (
    Examples,
    Split,
    concept_factors,
    count_concepts,
    repeat_factors,
)
from data_prep.labelling.heads import Head
from diht_jax.records.vocabulary import ConceptList
from diht_jax.terminal import ProgressBar

RANKS = (1, 5, 10)  # values of k for the recalls

_NUM_EVALUATIONS = 20
_PATIENCE = 5  # of these
_ROWS_AT_ONCE = 512
# Concepts with fewer held-out images are not ranked.
_MIN_POSITIVES = 5
_LISTED = 20  # number of best and of worst concepts in the description


def soft_target_loss(logits: jax.Array, ids: jax.Array, probs: jax.Array) -> jax.Array:
    """Softmax cross-entropy with sparse soft targets, one value per row.

    Computes `logsumexp(z) - sum_k p_k z_{id_k}` without dense targets. `diht_jax.losses.concepts`
    multiplies the first term by the sum of the rounded probabilities, which is 1 up to rounding.
    This version must not do so: retrained heads have to be bitwise equal to the heads of folders
    that were labelled before, or these folders would be labelled again.

    Args:
        logits: float32 [b, v].
        ids: int32 [b, k]; padding may have any valid id.
        probs: float32 [b, k], rows sum to 1; 0 for padding.

    Returns:
        float32 [b].
    """
    chosen = jnp.take_along_axis(logits, ids, axis=1)
    return jax.nn.logsumexp(logits, axis=1) - jnp.sum(probs * chosen, axis=1)


def train_and_measure(
    config: ml_collections.ConfigDict, part: ConceptList, train: Examples, held_out: Examples
) -> tuple[Head, dict[str, Any]]:
    """Trains the head of one kind of concepts, and evaluates it on the held-out images.

    Returns:
        The head, and a JSON-able result: numbers of images, curve, metrics, metrics of the
        frequency baseline, best and worst concepts.
    """
    train_split, held_out_split = train.of_kind(part.kind), held_out.of_kind(part.kind)
    logging.info(
        "head of %d %s: %d images, %d held out",
        len(part),
        part.kind,
        len(train_split.targets),
        len(held_out_split.targets),
    )
    head, curve = train_head(train_split, held_out_split, len(part), config.heads, config.seed)
    depth, targets = max(RANKS), held_out_split.targets
    ids, _ = head.predict(held_out_split.embeddings, depth)
    usual_ids = frequent_concepts(train_split.targets, len(targets), len(part), depth)
    measured, baseline = (summarize(found, targets, len(part)) for found in (ids, usual_ids))
    share, usual = measured["recall_at_1"], baseline["recall_at_1"]
    # Two standard errors.
    if share - usual <= 2 * math.sqrt(usual * (1 - usual) / len(targets)):
        logging.warning(
            "head of the %s: it names a concept of %.1f%% of the held-out images, by chance it "
            "would be %.1f%%. Its labels say nothing about the pictures: look whether the captions "
            "are about theirs, and whether the teacher is the right one",
            *(part.kind, 100 * share, 100 * usual),
        )
    return head, {
        "images": {"train": len(train_split.targets), "held_out": len(targets)},
        "curve": curve,
        "metrics": measured,
        "baseline": baseline,
        **_rank_concepts(ids, targets, part),
    }


def train_head(
    train: Split, held_out: Split, num_concepts: int, config: ml_collections.ConfigDict, seed: int
) -> tuple[Head, list[dict[str, float]]]:
    """Trains one head.

    Args:
        train, held_out: images with at least one concept each.
        num_concepts: size v of the vocabulary.
        config: section `heads`.
        seed: seed of the order of examples.

    Returns:
        The head, and its curve: `step`, `train_loss` (mean since the entry before),
        `held_out_loss` (both with rare concepts up-sampled) and `recall_at_10`.

    Raises:
        ValueError: there are no training images or no held-out images.
    """
    for name, part in (("training", train), ("held-out", held_out)):
        if not len(part.targets):
            raise ValueError(
                f"no {name} image has a concept of the vocabulary; there are "
                f"{len(train.targets)} for training and {len(held_out.targets)} held out: change "
                "config.heads.held_out, or lower config.vocabulary.min_count"
            )
    mean, scale = _standardisation(train.embeddings)
    counts = count_concepts(train.targets, num_concepts)
    factors = concept_factors(counts, len(train.targets), config.repeat_threshold)
    draws = np.cumsum(repeat_factors(train.targets, factors))
    ids, probs = _pad(train.targets)
    # For d standardised dimensions, the weights have the standard deviation std / sqrt(d).
    precision = train.embeddings.shape[1] / config.prior_logit_std**2
    init, step, measure = _compile(mean, scale, config, 0.5 * precision / len(train.targets))
    # Initial predictions: the logarithm of each concept's frequency.
    frequency = counts + 1.0
    params = {
        "kernel": jnp.zeros((train.embeddings.shape[1], num_concepts), jnp.float32),
        "bias": jnp.asarray(np.log(frequency / frequency.sum()), jnp.float32),
    }
    state = init(params)
    rng = np.random.default_rng(seed)
    evaluate = functools.partial(
        _evaluate,
        measure,
        held_out,
        _pad(held_out.targets),
        repeat_factors(held_out.targets, factors),
    )
    curve, losses, best, best_step = [], [], params, 0
    regular = np.linspace(0, config.steps, _NUM_EVALUATIONS + 1).round().astype(int).tolist()
    early = [2**power for power in range(regular[1].bit_length())]
    marks = {*regular, *(mark for mark in early if mark < regular[1])}
    for number in ProgressBar(range(config.steps + 1), "head", unit="step"):
        if number in marks:
            entry = {"step": number, **evaluate(params)}
            if losses:
                entry["train_loss"] = float(np.mean(jax.device_get(losses)))
            curve.append(entry)
            losses = []
            if entry["held_out_loss"] == min(each["held_out_loss"] for each in curve):
                best, best_step = params, number
            elif (number - best_step) * _NUM_EVALUATIONS >= _PATIENCE * config.steps:
                break
        if number < config.steps:
            chosen = np.searchsorted(draws, rng.random(config.batch_size) * draws[-1], "right")
            batch = train.embeddings[chosen], ids[chosen], probs[chosen]
            params, state, loss = step(params, state, *batch)
            losses.append(loss)
    return _fold(jax.device_get(best), mean, scale), curve


def _standardisation(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and inverse standard deviation per dimension; 0 for constant dimensions."""
    n, d = embeddings.shape
    total, squares = np.zeros(d), np.zeros(d)
    for start in range(0, n, _ROWS_AT_ONCE):
        part = embeddings[start : start + _ROWS_AT_ONCE].astype(np.float64)
        total += part.sum(axis=0)
        squares += (part**2).sum(axis=0)
    mean = total / n
    deviation = np.sqrt(np.maximum(squares / n - mean**2, 0))
    floor = 1e-6 * max(float(np.abs(mean).max()), float(deviation.max()), 1e-30)
    scale = np.where(deviation > floor, 1 / np.maximum(deviation, floor), 0)
    return mean.astype(np.float32), scale.astype(np.float32)


def _pad(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns padded ids, int32 [n, m], and a uniform distribution over them, float32 [n, m]."""
    is_own = targets >= 0
    probs = is_own / is_own.sum(axis=1, keepdims=True)
    return np.where(is_own, targets, 0), probs.astype(np.float32)


def _compile(
    mean: np.ndarray, scale: np.ndarray, config: ml_collections.ConfigDict, penalty: float
) -> tuple[Any, Any, Any]:
    """Returns the optimizer's init, the training step, and a batch's losses and top 10 concepts."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps)))

    def classify(params, embeddings):
        x = (embeddings.astype(jnp.float32) - mean) * scale
        return x @ params["kernel"] + params["bias"]

    def loss_fn(params, embeddings, ids, probs):
        loss = jnp.mean(soft_target_loss(classify(params, embeddings), ids, probs))
        return loss + penalty * jnp.sum(params["kernel"] ** 2), loss

    @jax.jit
    def step(params, state, embeddings, ids, probs):
        gradient, loss = jax.grad(loss_fn, has_aux=True)(params, embeddings, ids, probs)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def measure(params, embeddings, ids, probs):
        logits = classify(params, embeddings)
        best = jax.lax.top_k(logits, min(10, logits.shape[1]))[1]
        return soft_target_loss(logits, ids, probs), best

    return optimizer.init, step, measure


def _evaluate(
    measure: Any,
    held_out: Split,
    padded: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
    params: Any,
) -> dict[str, float]:
    """Computes held-out loss and recall@10 during training.

    The loss has the sampling weights of the training examples. An unweighted loss would be lowest
    after the first steps, when the head predicts only frequent concepts.
    """
    losses, best = [], []
    n = len(weights)
    for start in range(0, n, _ROWS_AT_ONCE):
        # Repeats the last row to fill a batch, so there is only one shape to compile.
        rows = np.minimum(np.arange(start, start + _ROWS_AT_ONCE), n - 1)
        loss, ids = measure(params, held_out.embeddings[rows], *(part[rows] for part in padded))
        losses.append(np.asarray(loss)[: n - start])
        best.append(np.asarray(ids)[: n - start])
    ranks = find_ranks(np.concatenate(best), held_out.targets)
    return {
        "held_out_loss": float(np.average(np.concatenate(losses), weights=weights)),
        "recall_at_10": recall(ranks, held_out.targets, 10),
    }


def _fold(params: dict[str, np.ndarray], mean: np.ndarray, scale: np.ndarray) -> Head:
    """Folds the standardisation into the head, which then takes raw embeddings."""
    kernel = params["kernel"].astype(np.float64) * scale[:, None].astype(np.float64)
    bias = params["bias"] - mean.astype(np.float64) @ kernel
    return Head(kernel.astype(np.float32), bias.astype(np.float32))


def _rank_concepts(ids: np.ndarray, targets: np.ndarray, part: ConceptList) -> dict[str, Any]:
    """Lists the best and worst concepts by recall@k, with the largest k that is not trivial."""
    k = max(k for k in RANKS if k == 1 or 4 * k <= len(part))
    shares = concept_recall(find_ranks(ids, targets), targets, k, len(part))
    positives = count_concepts(targets, len(part))
    enough = np.flatnonzero(positives >= _MIN_POSITIVES)
    order = enough[np.lexsort((-positives[enough], -shares[enough]))]
    listed = [
        {"concept": part.names[i], "recall": float(shares[i]), "images": int(positives[i])}
        for i in order
    ]
    half = min(_LISTED, len(listed) // 2)
    return {
        "ranked_by": f"recall_at_{k}",
        "best": listed[:half],
        "worst": listed[::-1][: min(_LISTED, len(listed) - half)],
    }


def find_ranks(ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the 0-based rank of targets [n, m] in predictions [n, k]; maximum int64 if absent."""
    found = targets[:, :, None] == ids[:, None]
    return np.where(found.any(axis=2), found.argmax(axis=2), np.iinfo(np.int64).max)


def recall(ranks: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Returns the share of an image's concepts among its top k predictions, mean over images."""
    return float(np.mean((ranks < k).sum(axis=1) / (targets >= 0).sum(axis=1)))


def concept_recall(ranks: np.ndarray, targets: np.ndarray, k: int, num_concepts: int) -> np.ndarray:
    """Returns the share of a concept's images that have it among their top k predictions.

    Returns:
        float64 [num_concepts]; NaN for a concept without images.
    """
    positives = count_concepts(targets, num_concepts)
    hits = np.bincount(targets[ranks < k], minlength=num_concepts)
    return np.where(positives > 0, hits / np.maximum(positives, 1), np.nan)


def frequent_concepts(train: np.ndarray, num_images: int, num_concepts: int, k: int) -> np.ndarray:
    """Predicts the k most frequent concepts of the training targets for every image."""
    most_frequent = np.argsort(-count_concepts(train, num_concepts), kind="stable")[:k]
    return np.tile(most_frequent, (num_images, 1))


def summarize(ids: np.ndarray, targets: np.ndarray, num_concepts: int) -> dict[str, Any]:
    """Computes recall@k and the mean recall@k per concept, for each k of `RANKS`."""
    ranks = find_ranks(ids, targets)
    per_concept = {k: concept_recall(ranks, targets, k, num_concepts) for k in RANKS}
    return {
        **{f"recall_at_{k}": recall(ranks, targets, k) for k in RANKS},
        **{f"concept_recall_at_{k}": float(np.nanmean(per_concept[k])) for k in RANKS},
    }
