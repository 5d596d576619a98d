"""The gathered form of the losses: every device gathers all embeddings and holds [b, N] logits.

This is the readable reference for tests of `streaming.py`, the plain form for one device, and the
faster form if many devices have few examples each. `choose_impl` chooses between the two forms. JAX
derives the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from diht_jax.hardware.chips import LATENCY_SECS, START_SECS, STEP_SECS, Chip, find_chip
from diht_jax.losses.objective import AxisName, Objective, PairStatistics, Scalars
from diht_jax.losses.ring import group_size


def dense_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: ArrayLike,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    pair_ids: Integer[Array, "b k"] | None = None,
    row_weights: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], PairStatistics]:
    """Sums the losses of the local rows in both directions; see `streaming.streaming_loss`."""
    i2t, t2i, is_positive = similarity_blocks(image_emb, text_emb, axis_name)
    scale = jnp.asarray(logit_scale, i2t.dtype)
    is_negative, num_negatives, more = ~is_positive, None, ()
    if pair_ids is not None:
        all_ids = jax.lax.all_gather(pair_ids, axis_name, tiled=True) if axis_name else pair_ids
        is_equal = jnp.all(pair_ids[:, None] == all_ids[None, :], axis=-1)
        is_negative = ~(is_positive | is_equal)
        num_negatives = jnp.sum(is_negative, axis=1).astype(i2t.dtype)
        more = (is_equal & ~is_positive,)
    image_part, text_part = (
        objective.loss_of_rows(scale * block, is_positive, scalars, *more) for block in (i2t, t2i)
    )
    if row_weights is not None:
        image_part, text_part = row_weights * image_part, row_weights * text_part
    total = jnp.sum(image_part) + jnp.sum(text_part)
    statistics = pair_statistics((i2t, t2i), is_positive, is_negative)
    return total, statistics._replace(num_negatives=num_negatives)


def similarity_blocks(
    image_emb: Float[Array, "b d"], text_emb: Float[Array, "b d"], axis_name: AxisName = None
) -> tuple[Float[Array, "b N"], Float[Array, "b N"], Bool[Array, "b N"]]:
    """Computes the similarities of the local rows with the global batch.

    Args:
        image_emb, text_emb: local rows.
        axis_name: see `contrastive.contrastive_loss`.

    Returns:
        Image-to-text and text-to-image similarities, at least float32, and a mask of each row's
        positive.
    """
    all_images, all_texts = image_emb, text_emb
    first_row = 0
    if axis_name:
        all_images = jax.lax.all_gather(image_emb, axis_name, tiled=True)
        all_texts = jax.lax.all_gather(text_emb, axis_name, tiled=True)
        first_row = jax.lax.axis_index(axis_name) * image_emb.shape[0]
    own_column = first_row + jnp.arange(image_emb.shape[0])
    is_positive = own_column[:, None] == jnp.arange(all_texts.shape[0])[None, :]
    return inner_products(image_emb, all_texts), inner_products(text_emb, all_images), is_positive


def inner_products(rows: Float[Array, "m d"], columns: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """Computes `rows @ columns.T`, accumulated in at least float32.

    With a scale of 100, rounding products to bfloat16 would change logits by whole units, so the
    precision is the highest. It costs nothing for bfloat16 inputs, whose products are exact.
    """
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(rows.dtype, jnp.float32),
    )


def product(
    grad: Float[Array, "rows columns"], emb: Float[Array, "n d"], axis: int
) -> Float[Array, "m d"]:
    """Computes `grad @ emb` for axis 1 or `grad.T @ emb` for axis 0, in the dtype of `grad`."""
    return jax.lax.dot_general(
        grad,
        emb.astype(grad.dtype),
        (((axis,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


def pair_statistics(
    blocks: Sequence[Float[Array, "b N"]],
    is_positive: Bool[Array, "b N"],
    is_negative: Bool[Array, "b N"],
) -> PairStatistics:
    """Computes statistics of the two `blocks` of `similarity_blocks`, without gradients."""
    blocks = jax.lax.stop_gradient(blocks)
    found = []
    for block in blocks:
        hardest = jnp.max(block, axis=1, where=is_negative, initial=-jnp.inf)
        ties = jnp.sum(is_negative & (block == hardest[:, None]), axis=1).astype(block.dtype)
        found += [hardest, ties]
    return PairStatistics(jnp.sum(blocks[0], axis=1, where=is_positive), *found)


# Transfers in a round of the ring: two forward and three backward (`streaming.py`). XLA's GPU
# compiler combines those of a pass into one, as compiled for h100:64x8.
_TPU_TRANSFERS, _GPU_TRANSFERS = 5, 2
# Collectives of a group in both passes: images, their statistics, their slopes, their gradients.
_GROUP_COLLECTIVES = 4
# Collectives of the gathered form: images, texts, and the combined gradients of both.
_GATHERED_COLLECTIVES = 3
# Matrix products of the gathered form relative to the streaming form: six against four.
_GATHERED_PRODUCTS = 1.5
# Float32 arrays [b, N] and [N, d] at the gathered form's peak memory, fitted to the TPU compiler's
# reports for N of 8,192 to 262,144 (docs/benchmarks/training.md).
_BLOCKS, _GATHERED = 3.0, 3.5
# Largest fraction of the device memory that the gathered form may use, and the memory that is
# assumed of an unknown device.
_MEMORY_SHARE = 0.05
_UNKNOWN_BYTES = 2**33
# Slowdown of float32 products: six bfloat16 passes on a TPU, no tensor cores on a GPU.
_TPU_SLOWDOWN, _GPU_SLOWDOWN = 6, 15
# GPUs of a host. It is a constant because described devices do not know their host.
_GPUS_OF_A_HOST = 8


class Choice(NamedTuple):
    """The chosen form of the loss, and the reason to log."""

    impl: str  # "streaming" or "gathered"
    reason: str  # a clause


def choose_impl(
    mesh: Mesh, axis_names: Sequence[str], num_pairs: int, width: int, impl: str = "auto"
) -> Choice:
    """Chooses the form of the loss on a mesh, for `config.loss.impl="auto"`.

    One device uses the gathered form if its [b, N] logits are small; half as many products again
    are little next to the towers. On several devices it also has to take less time. The time is
    modelled by matrix products and latencies: the streaming form sends many small messages in
    sequence, overlapped with its products; the gathered form sends a few large ones. The choice
    depends only on the devices of the mesh, so ahead-of-time compilation for another machine makes
    the same choice as that machine.

    Args:
        mesh: of the step.
        axis_names: axes that the batch is split over.
        num_pairs: N, of the global batch.
        width: d, of an embedding.
        impl: returned unchanged unless it is "auto".

    Source: ours.
    """
    if impl != "auto":
        return Choice(impl, "as config.loss.impl has it")
    device = mesh.devices.flat[0]
    chip = find_chip(device.device_kind)
    sizes = tuple(size for name, size in mesh.shape.items() if name in axis_names)
    if math.prod(sizes) == 1:
        fits, memory = _memory(chip, num_pairs, num_pairs, width)
        impl = "gathered" if fits else "streaming"
        return Choice(impl, f"there is one device; gathered, {memory}")
    if chip is None:
        return Choice("streaming", f"nothing is known of the links of a '{device.device_kind}'")
    return _choose(chip, sizes, num_pairs, width)


def _choose(chip: Chip, axis_sizes: tuple[int, ...], num_pairs: int, width: int) -> Choice:
    num_devices = math.prod(axis_sizes)
    num_rows = num_pairs // num_devices
    slowdown = _TPU_SLOWDOWN if chip.num_links else _GPU_SLOWDOWN
    products_secs = 4 * 2 * num_rows * num_pairs * width * slowdown / chip.peak_flops
    group = group_size(axis_sizes, 4 * num_rows * width, chip)
    ring_secs, ring = _ring_latency(chip, num_devices, group)
    gathered_secs = _GATHERED_COLLECTIVES * _collective_secs(chip, num_devices)
    times = (
        f"{ring}, its products {1e3 * products_secs:.1f} ms; gathered, the latency is "
        f"{1e3 * gathered_secs:.1f} ms and the products {_GATHERED_PRODUCTS} times as many"
    )
    if max(ring_secs, products_secs) <= gathered_secs + _GATHERED_PRODUCTS * products_secs:
        return Choice("streaming", times)
    fits, memory = _memory(chip, num_rows, num_pairs, width)
    return Choice("gathered" if fits else "streaming", f"{times}; {memory}")


def _memory(chip: Chip | None, num_rows: int, num_pairs: int, width: int) -> tuple[bool, str]:
    """Returns whether the memory of the gathered form is allowed, and a clause to explain it."""
    most_bytes = _MEMORY_SHARE * (chip.hbm_bytes if chip else _UNKNOWN_BYTES)
    needed_bytes = 4 * num_pairs * (_BLOCKS * num_rows + _GATHERED * width)
    clause = f"it needs {needed_bytes / 1e9:.2f} GB, of {most_bytes / 1e9:.2f} GB allowed"
    return needed_bytes <= most_bytes, clause


def _ring_latency(chip: Chip, num_devices: int, group: int) -> tuple[float, str]:
    """Returns the total latency of the ring's messages in seconds, and a clause to explain it."""
    rounds = num_devices // group
    link = chip.link(between_hosts=num_devices > _GPUS_OF_A_HOST)
    transfers = (_TPU_TRANSFERS if chip.num_links else _GPU_TRANSFERS) * rounds
    if rounds == 1:
        transfers = 0
    secs = transfers * LATENCY_SECS[link]
    members = "devices"
    if group > 1:
        secs += _GROUP_COLLECTIVES * _collective_secs(chip, group)
        members = f"groups of {group}"
    return secs, (
        f"{transfers:,} transfers round a ring of {rounds} {members} take at least "
        f"{1e3 * secs:.1f} ms ({link})"
    )


def _collective_secs(chip: Chip, size: int) -> float:
    """Returns the seconds of a gather or scatter: half of each torus axis, or NCCL's ring."""
    link = chip.link(between_hosts=False)
    if chip.num_links:
        dimensions = chip.num_links // 2
        return STEP_SECS[link] * dimensions * size ** (1 / dimensions) / 2
    steps_between_hosts = math.ceil(size / _GPUS_OF_A_HOST) - 1
    steps_inside = size - 1 - steps_between_hosts
    network_secs = steps_between_hosts * STEP_SECS["network"]
    return START_SECS[link] + steps_inside * STEP_SECS[link] + network_secs
