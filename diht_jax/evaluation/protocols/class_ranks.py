"""Which class is the most similar to an image, and at which rank the right one stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding
from diht_jax.evaluation.embedding.encoding import check_finite

# Images compared with all classes at once: a block is [images / devices, classes] float32.
_IMAGE_BLOCK = 4096


def rank_labels(
    image_emb: np.ndarray, labels: np.ndarray, classifier: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted class and the rank of the right class, for every image.

    Args:
        image_emb: float [n, d], L2-normalised.
        labels: int [n], rows of `classifier`.
        classifier: float [C, d], L2-normalised.

    Returns:
        int32 [n] predictions; int32 [n] ranks, 0 exactly where the prediction is the label.

    Raises:
        ValueError: shapes or labels that do not fit, embeddings not finite.
    """
    labels = np.asarray(labels, np.int32)
    if labels.shape != (len(image_emb),) or not len(labels):
        raise ValueError(
            f"labels: expected one per image, shape ({len(image_emb)},) and at least one, got "
            f"{labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(classifier):
        raise ValueError(
            f"labels: expected 0 to {len(classifier) - 1}, rows of the classifier; got "
            f"{labels.min()} to {labels.max()}"
        )
    check_finite(image_emb, "image embeddings")
    check_finite(classifier, "classifier")
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    split = sharding.batch_sharding(mesh)
    block = -(-min(len(labels), _IMAGE_BLOCK) // mesh.size) * mesh.size
    weights = jax.device_put(np.asarray(classifier, np.float32), sharding.replicated(mesh))
    predictions, ranks = [], []
    for start in range(0, len(labels), block):
        images = np.asarray(image_emb[start : start + block], np.float32)
        missing = block - len(images)
        found = _rank_block(
            jax.device_put(np.pad(images, ((0, missing), (0, 0))), split),
            jax.device_put(np.pad(labels[start : start + block], (0, missing)), split),
            weights,
        )
        block_predictions, block_ranks = (np.asarray(x)[: len(images)] for x in found)
        predictions.append(block_predictions)
        ranks.append(block_ranks)
    return np.concatenate(predictions), np.concatenate(ranks)


@jax.jit
def _rank_block(
    image_emb: jax.Array, labels: jax.Array, classifier: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Full float32: the default on TPUs would round to bfloat16.
    logits = jnp.matmul(image_emb, classifier.T, precision=jax.lax.Precision.HIGHEST)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(len(classifier))[None, :] < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return jnp.argmax(logits, axis=1).astype(jnp.int32), before.sum(axis=1, dtype=jnp.int32)
