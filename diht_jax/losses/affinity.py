"""The affinity loss: a student finds pairs as similar as frozen teachers find them.

With similarities `s_ij = logit_scale * <image_i, text_j>` of the student, those of teacher k,
`t_ij = <image_i, text_j>_k / temperature_k`, and K teachers, a row of images has

    L_i = 1/K sum_k KL(softmax_j t_ij || softmax_j s_ij)

over all texts j of the global batch, and a row of texts the same over all images; the loss is the
mean of both directions. Its gradient by a similarity is the difference of two probabilities,
`q_ij - 1/K sum_k p_ij`. Pairs that a teacher has not embedded are neither rows nor columns.

For one row, a tile of similarities adds to three sums: that of `e^t`, of `e^t (t - s)`, and of
`e^s`. So the texts go round the ring of `ring.py` as those of the contrastive losses do, the
teachers' embeddings beside the student's as one array, with the same memory: O(b d + tile^2), where
d is the width of all of them.

Source: MobileCLIP, arXiv 2311.17049, "Multi-modal distillation loss"; the sums are ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from diht_jax.losses.choice import choose_impl
from diht_jax.losses.contrastive import check_embeddings
from diht_jax.losses.dense import AxisName, inner_products
from diht_jax.losses.objective import check_scalar
from diht_jax.losses.ring import Ring
from diht_jax.losses.tiles import at, product, put, varying_axes, varying_over, zeros


class TeacherEmbeddings(NamedTuple):
    """What one teacher has made of the pairs.

    Attributes:
        image_emb, text_emb: [b, D], of any length and any real dtype; rows of zeros where it has
            not embedded the pair.
        temperature: its similarities are divided by it.
    """

    image_emb: jax.Array
    text_emb: jax.Array
    temperature: jax.Array | float


class _Sums(NamedTuple):
    """Running sums of rows (or columns), relative to the highest similarity; each [b].

    Attributes:
        highest: of the student, and of every teacher; finite from the start.
        totals: of `e^(similarity - highest)`, of the same models.
        differences: of `e^(t - highest) (t - s)`, of every teacher.
    """

    highest: tuple[jax.Array, ...]
    totals: tuple[jax.Array, ...]
    differences: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Where the columns of all models lie in a row: student, teachers, and whether it counts."""

    student: int
    teachers: tuple[int, ...]

    def similarities(
        self, images: jax.Array, texts: jax.Array, scale: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Of the student and of every teacher, each [m, n]; and bool [m, n], which count."""
        found, start = [], 0
        for width in (self.student, *self.teachers):
            columns = slice(start, start + width)
            found.append(inner_products(images[:, columns], texts[:, columns]))
            start += width
        found[0] = scale * found[0]
        return tuple(found), (images[:, start] > 0)[:, None] & (texts[:, start] > 0)[None, :]


def affinity_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array | float,
    teachers: Sequence[TeacherEmbeddings],
    *,
    axis_name: AxisName = None,
    impl: str = "streaming",
    tile: int | None = None,
) -> jax.Array:
    """The formula of this file, the mean over the pairs of the global batch that all have embedded.

    Args:
        image_emb: float [b, d], L2-normalised; row i and row i of `text_emb` are a pair. Inside
            `shard_map`, this device's rows.
        text_emb: float [b, d], L2-normalised, same shape and dtype.
        logit_scale: scalar, after exp; the same on every device.
        teachers: at least one; nothing is propagated back to them.
        axis_name, impl: see `contrastive.contrastive_loss`, "streaming" or "gathered".
        tile: side of a tile of similarities, at most; None is as of the contrastive losses.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings; 0 where no
        pair counts.

    Raises:
        ValueError: wrong shapes, dtypes or impl, or no teacher.
    """
    check_embeddings(image_emb, text_emb)
    check_scalar("logit_scale", logit_scale)
    _check_teachers(teachers, len(image_emb))
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    teachers = jax.lax.stop_gradient(tuple(teachers))
    image_rows, text_rows, counts = _teacher_rows(teachers, dtype)
    scale = jnp.asarray(logit_scale, dtype)
    arguments = (image_emb.astype(dtype), text_emb.astype(dtype), scale, image_rows, text_rows)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    widths = _Widths(image_emb.shape[1], tuple(t.image_emb.shape[1] for t in teachers))
    if impl == "streaming":
        block = jax.ShapeDtypeStruct((len(image_emb), widths.student + image_rows.shape[1]), dtype)
        ring = Ring.create(widths, axes, block, tile)
        # As in `streaming.streaming_loss`.
        varying = frozenset().union(*(varying_axes(leaf) for leaf in arguments))
        total = _ring_loss(ring, *map(varying_over(varying), arguments))
    elif impl == "gathered":
        total = _gathered_loss(widths, axes, *arguments)
    else:
        raise ValueError(f"impl: expected streaming or gathered, got {impl!r}")
    num_counting = jnp.sum(counts)
    if axes:
        total, num_counting = jax.lax.psum((total, num_counting), axes)
    return total / (2 * jnp.maximum(num_counting, 1))


def sharded_affinity_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array | float,
    teachers: Sequence[TeacherEmbeddings],
    *,
    mesh: Mesh,
    axis_names: tuple[str, ...] = ("data", "fsdp"),
    impl: str = "streaming",
) -> jax.Array:
    """`affinity_loss` of a global batch on a mesh, replicated.

    Args:
        image_emb, text_emb: float [N, d], global.
        logit_scale: scalar, after exp.
        teachers: with [N, D], global.
        mesh, axis_names: see `sharded.sharded_loss`.
        impl: "streaming", "gathered", or "auto": see `choice.choose_impl`.
    """
    width = image_emb.shape[1] + sum(teacher.image_emb.shape[1] for teacher in teachers)
    impl = choose_impl(mesh, axis_names, image_emb.shape[0], width, impl).impl
    impl = {"dense": "gathered"}.get(impl, impl)
    rows, whole = PartitionSpec(axis_names), PartitionSpec()
    return jax.shard_map(
        functools.partial(affinity_loss, axis_name=axis_names, impl=impl),
        mesh=mesh,
        in_specs=(rows, rows, whole, [TeacherEmbeddings(rows, rows, whole)] * len(teachers)),
        out_specs=whole,
    )(image_emb, text_emb, jnp.asarray(logit_scale), list(jax.tree.map(jnp.asarray, teachers)))


def _check_teachers(teachers: Sequence[TeacherEmbeddings], num_rows: int) -> None:
    if not teachers:
        raise ValueError("teachers: expected at least one")
    for number, teacher in enumerate(teachers):
        shapes = jnp.shape(teacher.image_emb), jnp.shape(teacher.text_emb)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != num_rows:
            raise ValueError(
                f"teachers[{number}]: expected image_emb and text_emb [{num_rows}, D], got "
                f"{shapes[0]} and {shapes[1]}"
            )


def _teacher_rows(
    teachers: Sequence[TeacherEmbeddings], dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Columns behind the student's, of images and of texts; and bool [b], which pairs count."""
    counts = functools.reduce(
        jnp.logical_and, [jnp.any(emb != 0, axis=1) for t in teachers for emb in t[:2]]
    )
    images = [_normalized(t.image_emb, dtype) / jnp.asarray(t.temperature, dtype) for t in teachers]
    texts = [_normalized(t.text_emb, dtype) for t in teachers]
    flag = counts[:, None].astype(dtype)
    return *(jnp.concatenate([*rows, flag], axis=1) for rows in (images, texts)), counts


def _normalized(rows: jax.Array, dtype: Any) -> jax.Array:
    rows = rows.astype(dtype)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)


def _gathered_loss(
    widths: _Widths,
    axes: tuple[str, ...],
    image_emb: jax.Array,
    text_emb: jax.Array,
    scale: jax.Array,
    image_rows: jax.Array,
    text_rows: jax.Array,
) -> jax.Array:
    """The losses of the local rows in both directions, summed; the readable form, [b, N]."""
    own = [
        jnp.concatenate(parts, axis=1) for parts in ((image_emb, image_rows), (text_emb, text_rows))
    ]
    everyone = [jax.lax.all_gather(rows, axes, tiled=True) if axes else rows for rows in own]
    total = jnp.zeros((), scale.dtype)
    for rows, columns in ((own[0], everyone[1]), (own[1], everyone[0])):
        logits, is_counted = widths.similarities(rows, columns, scale)
        lowest = jnp.finfo(scale.dtype).min
        student, *others = (jnp.where(is_counted, each, lowest) for each in logits)
        log_probs = jax.nn.log_softmax(student, axis=1)
        for other in others:
            target = jax.nn.log_softmax(other, axis=1)
            terms = jnp.where(is_counted, jnp.exp(target) * (target - log_probs), 0)
            total += jnp.sum(terms) / len(others)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_loss(
    ring: Ring,
    image_emb: jax.Array,
    text_emb: jax.Array,
    scale: jax.Array,
    image_rows: jax.Array,
    text_rows: jax.Array,
) -> jax.Array:
    """As `_gathered_loss`."""
    return _forward(ring, image_emb, text_emb, scale, image_rows, text_rows)[0]


def _forward(ring, image_emb, text_emb, scale, image_rows, text_rows):
    widths = ring.objective
    images, texts = _blocks(ring, image_emb, text_emb, image_rows, text_rows)
    no_images, no_texts = (
        _no_sums(len(widths.teachers), zeros(tiles.shape[:2], scale)) for tiles in (images, texts)
    )

    def add_block(_rounds, texts, _, image_sums):
        def add_tile(i, j, carry):
            text_sums, image_sums = carry
            logits, is_counted = widths.similarities(at(images, i), at(texts, j), scale)
            text_tile = _accumulate(at(text_sums, j), logits, is_counted, 0)
            image_tile = _accumulate(at(image_sums, i), logits, is_counted, 1)
            return put(text_sums, text_tile, j), put(image_sums, image_tile, i)

        return ring.for_each_tile(add_tile, (no_texts, image_sums))

    text_sums, image_sums = ring.tour(
        add_block, texts, sums=no_texts, stays=no_images, merge=_merge
    )
    text_sums = jax.tree.map(ring.texts.join, text_sums)
    image_sums = jax.tree.map(ring.images.join, image_sums)
    if ring.group > 1:
        parts = ring.exchange_rows(image_sums)
        image_sums = functools.reduce(_merge, [at(parts, i) for i in range(ring.group)])
    counts = image_rows[:, -1]
    image_loss, image_normalizers = _finish(image_sums, counts)
    text_loss, text_normalizers = _finish(text_sums, counts)
    kept = image_emb, text_emb, scale, image_rows, text_rows, image_normalizers, text_normalizers
    return image_loss + text_loss, kept


def _backward(ring, kept, loss_grad):
    image_emb, text_emb, scale, image_rows, text_rows, *normalizers = kept
    widths = ring.objective
    images, texts = _blocks(ring, image_emb, text_emb, image_rows, text_rows)
    # The derivatives scale with the cotangent of the device that a row belongs to.
    factor = zeros(image_emb.shape[:1], scale) + loss_grad
    of_images, of_texts = ((*rows, factor) for rows in normalizers)
    of_images = jax.tree.map(ring.images.split, ring.gather_rows(of_images))
    of_texts = jax.tree.map(ring.texts.split, of_texts)
    no_images, no_texts = (
        zeros((*tiles.shape[:2], widths.student), scale) for tiles in (images, texts)
    )

    def add_block(_rounds, texts, of_texts, image_grads):
        def add_tile(i, j, carry):
            text_grads, image_grads = carry
            image_tile, text_tile = at(images, i), at(texts, j)
            logits, is_counted = widths.similarities(image_tile, text_tile, scale)
            slopes = _slopes(logits, at(of_images, i), 1) + _slopes(logits, at(of_texts, j), 0)
            grad = jnp.where(is_counted, slopes, 0)
            image_grad = product(grad, text_tile[:, : widths.student], 1)
            text_grad = product(grad, image_tile[:, : widths.student], 0)
            return (
                put(text_grads, at(text_grads, j) + text_grad, j),
                put(image_grads, at(image_grads, i) + image_grad, i),
            )

        return ring.for_each_tile(add_tile, (no_texts, image_grads))

    text_grads, image_grads = ring.tour(
        add_block, texts, rows=of_texts, sums=no_texts, stays=no_images
    )
    image_grads = ring.sum_of_members(ring.images.join(image_grads))
    text_grads = ring.texts.join(text_grads)
    # sum_ij G_ij <image_i, text_j>, which the gradient of the images holds already.
    scale_grad = jnp.sum(image_emb * image_grads)
    return scale * image_grads, scale * text_grads, scale_grad, None, None


_ring_loss.defvjp(_forward, _backward)


def _blocks(ring, image_emb, text_emb, image_rows, text_rows) -> tuple[jax.Array, jax.Array]:
    """Tiles of the images of the group, and of the texts of this device, of all models."""
    images = jnp.concatenate([image_emb, image_rows], axis=1)
    texts = jnp.concatenate([text_emb, text_rows], axis=1)
    return ring.images.split(ring.gather(images)), ring.texts.split(texts)


def _no_sums(num_teachers: int, none: jax.Array) -> _Sums:
    # The lowest finite number, not -inf: differences of two of them must not be NaN.
    lowest = none + jnp.finfo(none.dtype).min
    models = num_teachers + 1
    return _Sums((lowest,) * models, (none,) * models, (none,) * num_teachers)


def _accumulate(
    sums: _Sums, logits: tuple[jax.Array, ...], is_counted: jax.Array, axis: int
) -> _Sums:
    """Adds a tile; `axis` is that of the tile which is summed over."""
    lowest = jnp.finfo(logits[0].dtype).min
    highest, totals, differences = [], [], []
    for model, own in enumerate(logits):
        most = jnp.max(jnp.where(is_counted, own, lowest), axis)
        most = jnp.maximum(sums.highest[model], most)
        powers = jnp.where(is_counted, own - jnp.expand_dims(most, axis), lowest)
        weights, factor = jnp.exp(powers), jnp.exp(sums.highest[model] - most)
        highest.append(most)
        totals.append(factor * sums.totals[model] + jnp.sum(weights, axis))
        if model > 0:
            part = jnp.sum(weights * (own - logits[0]), axis)
            differences.append(factor * sums.differences[model - 1] + part)
    return _Sums(tuple(highest), tuple(totals), tuple(differences))


def _merge(one: _Sums, other: _Sums) -> _Sums:
    """The sums of two disjoint sets of columns, of both together."""
    highest = jax.tree.map(jnp.maximum, one.highest, other.highest)
    totals, differences = [], []
    for model, most in enumerate(highest):
        parts = [(each, jnp.exp(each.highest[model] - most)) for each in (one, other)]
        totals.append(sum(factor * each.totals[model] for each, factor in parts))
        if model > 0:
            differences.append(sum(f * each.differences[model - 1] for each, f in parts))
    return _Sums(highest, tuple(totals), tuple(differences))


def _finish(sums: _Sums, counts: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The losses of rows, summed; and the log of each model's normaliser, each [b]."""
    totals = [jnp.where(total > 0, total, 1) for total in sums.totals]
    normalizers = tuple(
        jnp.where(counts > 0, highest + jnp.log(total), 0)
        for highest, total in zip(sums.highest, totals, strict=True)
    )
    of_student, *of_teachers = normalizers
    losses = [
        difference / total - of_teacher + of_student
        for difference, total, of_teacher in zip(
            sums.differences, totals[1:], of_teachers, strict=True
        )
    ]
    return jnp.sum(counts * sum(losses)) / len(losses), normalizers


def _slopes(logits: tuple[jax.Array, ...], of_rows: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """[t, t]: derivatives of the rows' losses by the student's similarities."""
    *normalizers, factor = (jnp.expand_dims(row, axis) for row in of_rows)
    student, *teachers = (
        jnp.exp(own - normalizer) for own, normalizer in zip(logits, normalizers, strict=True)
    )
    return factor * (student - sum(teachers) / len(teachers))
