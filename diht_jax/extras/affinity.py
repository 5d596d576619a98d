"""Affinity distillation: the similarities of the batch match those of stored CLIP embeddings.

With similarities `s_ij = logit_scale * <image_i, text_j>` of the student, those of teacher k,
`t_ij = <image_i, text_j>_k / temperature_k`, and K teachers, a row of images has

    L_i = 1/K sum_k KL(softmax_j t_ij || softmax_j s_ij)

over all texts j of the global batch. A row of texts has the same loss over all images, and the loss
is the mean of both directions. Pairs that a teacher has not embedded are excluded as rows and
columns.

Every device gathers all embeddings, [N, d] of the student and of each teacher, and processes its
rows in chunks, which the backward pass recomputes. So it holds [N, d] arrays, but no [b, N] array.

Source: MobileCLIP, arXiv 2311.17049, "Multi-modal distillation loss".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Num
from ml_collections.config_dict import placeholder

from diht_jax.config.keys import COUNT, NOT_NEGATIVE, POSITIVE, Key
from diht_jax.losses.concepts import map_in_chunks
from diht_jax.losses.contrastive import check_embeddings
from diht_jax.losses.dense import inner_products
from diht_jax.losses.objective import AxisName, Parameters, Term, check_scalar
from diht_jax.sharding import BATCH_AXES

# Largest number of similarities of one model that a device holds at once.
_MOST_SIMILARITIES = 1 << 24


class TeacherEmbeddings(NamedTuple):
    """One teacher's embeddings of the pairs; zeros for pairs that it has not embedded."""

    image_emb: Num[Array, "b D"]  # of any norm
    text_emb: Num[Array, "b D"]  # of any norm
    temperature: Float[Array, ""] | float  # divisor of its similarities


class _Rows(NamedTuple):
    """Embeddings of images or texts by student and teachers, and a mask of the included rows."""

    student: Float[Array, "b d"]
    teachers: tuple[Float[Array, "b D"], ...]
    counts: Bool[Array, " b"]


def affinity_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: Float[Array, ""] | float,
    teachers: Sequence[TeacherEmbeddings],
    *,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Computes the affinity loss, the mean over pairs that all teachers have embedded.

    Args:
        image_emb: L2-normalised; row i is the partner of row i of `text_emb`. Inside `shard_map`,
            the rows of this device.
        text_emb: L2-normalised, of the same dtype.
        logit_scale: after exp; the same on every device.
        teachers: at least one, without gradients.
        axis_name: mesh axes that the global batch is split over, or None.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings; 0 if no pair
        is included.

    Raises:
        ValueError: wrong shapes or dtypes of the student.
    """
    check_embeddings(image_emb, text_emb)
    check_scalar("logit_scale", logit_scale)
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    teachers = jax.lax.stop_gradient(tuple(teachers))
    counts = functools.reduce(
        jnp.logical_and, [jnp.any(emb != 0, axis=1) for t in teachers for emb in t[:2]]
    )
    temperatures = [jnp.asarray(t.temperature, dtype) for t in teachers]
    images = _Rows(
        jnp.asarray(logit_scale, dtype) * image_emb.astype(dtype),
        tuple(
            _normalized(t.image_emb, dtype) / temperature
            for t, temperature in zip(teachers, temperatures, strict=True)
        ),
        counts,
    )
    texts = _Rows(
        text_emb.astype(dtype), tuple(_normalized(t.text_emb, dtype) for t in teachers), counts
    )
    total = _sum_over_rows(images, texts, axis_name) + _sum_over_rows(texts, images, axis_name)
    num_counting = jnp.sum(counts)
    if axis_name:
        total, num_counting = jax.lax.psum((total, num_counting), axis_name)
    return total / (2 * jnp.maximum(num_counting, 1))


def sharded_affinity_loss(
    image_emb: Float[Array, "N d"],
    text_emb: Float[Array, "N d"],
    logit_scale: Float[Array, ""] | float,
    teachers: Sequence[TeacherEmbeddings],
    *,
    mesh: Mesh,
) -> Float[Array, ""]:
    """Computes `affinity_loss` of a global batch on a mesh of `sharding.create_mesh`."""
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    specs: Any = (rows, rows, whole)  # specs instead of arrays
    of_teacher = TeacherEmbeddings(*specs)
    return jax.shard_map(
        functools.partial(affinity_loss, axis_name=BATCH_AXES),
        mesh=mesh,
        in_specs=(rows, rows, whole, [of_teacher] * len(teachers)),
        out_specs=whole,
    )(image_emb, text_emb, jnp.asarray(logit_scale), list(jax.tree.map(jnp.asarray, teachers)))


def _normalized(rows: Num[Array, "b D"], dtype: Any) -> Float[Array, "b D"]:
    rows = rows.astype(dtype)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)


def _sum_over_rows(rows: _Rows, partners: _Rows, axis_name: AxisName) -> Float[Array, ""]:
    """Sums the losses of the local rows over the partners of all devices."""
    everyone = partners
    if axis_name:
        everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), partners)
    lowest = jnp.finfo(rows.student.dtype).min

    def losses_of(rows: _Rows) -> Float[Array, " chunk"]:
        def log_probs(rows: Float[Array, "chunk d"], columns: Float[Array, "N d"]) -> jax.Array:
            logits = jnp.where(everyone.counts, inner_products(rows, columns), lowest)
            return jax.nn.log_softmax(logits, axis=1)

        student = log_probs(rows.student, everyone.student)
        total = jnp.zeros_like(rows.student[:, 0])
        for own, columns in zip(rows.teachers, everyone.teachers, strict=True):
            target = log_probs(own, columns)
            terms = jnp.where(everyone.counts, jnp.exp(target) * (target - student), 0)
            total += jnp.sum(terms, axis=1)
        return jnp.where(rows.counts, total, 0) / len(rows.teachers)

    chunk_rows = max(1, _MOST_SIMILARITIES // len(everyone.counts))
    return jnp.sum(map_in_chunks(losses_of, rows, chunk_rows))


class AffinityDistillation(Term):
    """The affinity loss, with teachers' embeddings stored in the data.

    The data must be labelled (`data_prep.label` with `config.clip_teachers`).

    Source: MobileCLIP, arXiv 2311.17049.
    """

    settings: ClassVar[dict[str, Any]] = {
        "weight": Key(0.0, NOT_NEGATIVE),  # weight of this loss; 0 disables it
        # Divisor of each teacher's similarities, or one for all; (): 1 / its logit scale.
        "temperatures": Key((), POSITIVE),
        # Embedding size of each teacher in the data; filled in by training.
        "widths": Key((), COUNT),
        "teachers_hash": placeholder(str),  # filled in by training
    }

    def check(self) -> None:
        name, section = self.name, self.section
        if section.widths and len(section.temperatures) not in (0, 1, len(section.widths)):
            raise ValueError(
                f"config.{name}.temperatures={tuple(section.temperatures)}: expected one for all, "
                f"or one for each of the {len(section.widths)} teachers"
            )

    @property
    def teacher_width(self) -> int:
        """See `Term`.

        Raises:
            ValueError: widths or temperatures are set neither by the data nor by the config.
        """
        for key, meaning in (
            ("widths", "embeddings, (768,)"),
            ("temperatures", "softmax, (0.01,)"),
        ):
            if not self.section[key]:
                raise ValueError(
                    f"config.{self.name}.{key} is not set: expected those of the teachers' "
                    f"{meaning} for example; training takes them from config.data.labels"
                )
        return sum(self.section.widths)

    def bind_data(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns the config with widths, temperatures and hash of the teachers in the data.

        Raises:
            ValueError: the data have no embeddings, or not those that the config names, or the
                student's captions or crops differ from the teachers'.
        """
        # Imported here, because the defaults of a config are read without any data.
        from diht_jax.records.labels.clip_embeddings import find_clip_embeddings

        name, section = self.name, self.section
        found = find_clip_embeddings(config.data.train, config.data.labels)
        if found is None:
            raise ValueError(
                f"config.{name}.weight={section.weight}: no source has embeddings of CLIP "
                "teachers; make them with `python -m data_prep.label "
                "--config.clip_teachers.models=...`, and name its folder by config.data.labels"
            )
        if section.teachers_hash not in (None, found.hash):
            raise ValueError(
                f"config.{name}.teachers_hash={section.teachers_hash}: the embeddings in the data "
                f"are of other teachers or crops, {found.hash}; take data of the same ones"
            )
        seen = {"captions": "first", "caption_sentences": 0, "caption_words": 0}
        if found.crops.count:
            seen["crop_scale"] = tuple(found.crops.scale)
        for key, value in seen.items():
            given = config.data.get(key, value)
            given = tuple(given) if key == "crop_scale" else given
            if given != value:
                raise ValueError(
                    f"config.data.{key}={given!r}: the teachers have embedded the first caption of "
                    "every record, as a whole, and their crops; the student must see the same, so "
                    f"set it to {value!r}"
                )
        config = config.copy_and_resolve_references()
        config[name].widths = tuple(teacher.width for teacher in found.teachers)
        config[name].teachers_hash = found.hash
        if not section.temperatures:
            config[name].temperatures = tuple(1 / t.logit_scale for t in found.teachers)
        return config

    def of_batch(
        self,
        encoded: dict[str, jax.Array],
        params: Parameters,
        examples: dict[str, jax.Array],
        *,
        mesh: Mesh,
    ) -> dict[str, tuple[float, jax.Array]]:
        """Computes the loss over the pairs that all teachers have embedded; see `Term.of_batch`."""
        temperatures = tuple(self.section.temperatures)
        if len(temperatures) == 1:
            temperatures *= len(self.section.widths)
        teachers, start = [], 0
        for width, temperature in zip(self.section.widths, temperatures, strict=True):
            columns = slice(start, start + width)
            images, texts = (
                examples[field][:, columns] for field in ("teacher_image_emb", "teacher_text_emb")
            )
            teachers.append(TeacherEmbeddings(images, texts, temperature))
            start += width
        loss = sharded_affinity_loss(
            encoded["image_emb"],
            encoded["text_emb"],
            jnp.exp(params["log_logit_scale"]),
            teachers,
            mesh=mesh,
        )
        return {"affinity_loss": (self.section.weight, loss)}
