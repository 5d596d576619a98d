"""Base classes of what a run learns from: contrastive losses, and other terms of the objective.

A contrastive loss has settings, learnt scalars, and a rule for one row.

A loss over pairs is a sum over rows i of the logits `s_ij = logit_scale * <image_i, text_j>` and,
by the same rule, over columns. For one row, the streaming form needs sums over tiles of negatives
(`accumulate`), from which and from the positive the loss and its slopes follow (`finish`), which in
turn give the derivative of the row's loss by each negative logit (`negative_slope`). The dense form
needs `loss_of_rows` only; JAX differentiates it. All of this is elementwise: the products are in
`dense.py` and `streaming.py`, and so is the ring of devices.

Pairs with equal ids (equal captions, say) are negatives of one another unless `equal_pairs` has
another value. "mask": they are no partners at all, for which an objective needs nothing but the
number of negatives that are left. "positive": each is a positive of the others; then the streaming
form also needs `accumulate_equal` and `equal_slope`.

A new loss is a subclass of `Objective` in a file of its own and a line in `registry.py`; a new term
one of `Term`, and a line in `diht_jax/training/terms/registry.py`. The name of a term there is the
name of its section in the config.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from diht_jax.config.keys import NOT_NEGATIVE, Key

if TYPE_CHECKING:
    from diht_jax.models.zoo import Architecture

# Scalars of an objective, in its own order: those of the config and the learnt ones.
Scalars = tuple[jax.Array | float, ...]
# What pairs with equal ids are to one another.
EQUAL_PAIRS = ("negative", "mask", "positive")

# Mesh axes that a batch is split over.
AxisName = str | tuple[str, ...] | None

# Values of the rows (or columns) of a tile, of a device, or of all tiles of a device.
Rows = Float[Array, "*tiles rows"]
# Logits of a tile; [..., rows, 0] for an empty one.
Tile = Float[Array, "*tiles m n"]
TileMask = Bool[Array, "*tiles m n"]


class PairStatistics(NamedTuple):
    """Cosine similarities of the local rows with the global batch.

    Attributes:
        positive: of the pair.
        image_hardest, text_hardest: highest one of the image (of the text) with a wrong partner.
        image_ties, text_ties: number of wrong partners that reach it.
        num_negatives: of the image, and so of the text; None where all others are negatives.
    """

    positive: Rows
    image_hardest: Rows
    image_ties: Rows
    text_hardest: Rows
    text_ties: Rows
    num_negatives: Rows | None = None


class Masks(NamedTuple):
    """Kinds of the logits of a tile. One that is of none of them is no logit at all."""

    is_positive: TileMask  # the pair itself
    is_negative: TileMask  # a wrong partner
    # An equal pair that is neither; None where equal pairs are negatives.
    is_equal: TileMask | None = None


class RowStatistics(NamedTuple):
    """Running statistics of rows (or columns)."""

    highest: Rows  # highest negative logit so far; finite from the start
    ties: Rows  # number of negatives that reach it
    sums: tuple[Rows, ...]  # of the objective
    num_negatives: Rows | None = None  # so far; None where all pairs but the own one are negatives
    equal: RowStatistics | None = None  # the same of equal pairs, where these are positives


class RowSlopes(NamedTuple):
    """Values of rows (or columns) that the backward pass needs."""

    positive: Rows  # derivative of the row's loss by its positive logit
    negative: Rows  # factor of the derivative by a negative logit
    offsets: tuple[Rows, ...]  # of the objective
    scalars: tuple[Rows, ...]  # derivatives by all scalars, without what the second pass adds
    # Factors of the derivative by the logit of an equal pair, where these are positives.
    equal: tuple[Rows, ...] = ()


class Objective:
    """A contrastive loss. Instances hold what is known when a step is traced, and are hashable."""

    settings: ClassVar[dict[str, Any]] = {}  # its keys of `config.loss` with their defaults
    # Scalars that are learnt, with the values that they start from; each is a parameter of the run
    # by this name.
    parameters: ClassVar[dict[str, float]] = {}
    # What `logit_scale` starts from; None leaves the model's own start.
    initial_logit_scale: ClassVar[float | None] = None
    num_sums: int = 1  # how many running sums a row has
    # Indices of the scalars whose derivative needs the negative logits once more.
    second_pass: tuple[int, ...] = ()
    # It keeps a mean of each record, and has a form of its own: `fastclip.py`.
    keeps_means: ClassVar[bool] = False
    # Of `EQUAL_PAIRS`; a loss that has no such setting knows the first one only.
    equal_pairs: str = EQUAL_PAIRS[0]
    num_equal_sums: int = 0  # how many running sums a row has of its equal pairs

    @classmethod
    def create(cls, **values: Any) -> tuple[Self, Scalars]:
        """The objective and its scalars.

        Args:
            **values: one for each name in `settings` and in `parameters`; may be traced.

        Raises:
            ValueError: a value out of range; the message begins with its name and a colon.
        """
        raise NotImplementedError

    def accumulate(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_negative: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        """The sums of rows with the negatives of one more tile.

        The ring adds up sums of different negatives, once an empty tile has made them relative to
        the same `highest`.

        Args:
            statistics: of the tiles before.
            highest: the highest negative with this tile.
            logits, is_negative: of the tile; nothing else counts.
            axis: of the tile, to sum over: 1 for rows, 0 for columns; -1 where it is empty.
            scalars: of `create`.
        """
        raise NotImplementedError

    def finish(
        self, statistics: RowStatistics, positives: Rows, scalars: Scalars, num_pairs: int
    ) -> tuple[Rows, RowSlopes]:
        """Losses and slopes, once all negatives are in.

        Args:
            statistics: of all negatives.
            positives: logits of the pairs.
            scalars: of `create`.
            num_pairs: N, of the global batch.
        """
        raise NotImplementedError

    def negative_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile, ...]]:
        """Derivatives of the loss by a tile of negative logits, and by the `second_pass` scalars.

        Args:
            logits: of the tile; what is returned for positives is not used.
            slopes: of `finish`.
            axis: the rows' values are to be expanded along it: 1 for rows, 0 for columns.
            scalars: of `create`.
        """
        raise NotImplementedError

    def accumulate_equal(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_equal: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        """Like `accumulate`, for the equal pairs of a tile, where these are positives."""
        raise NotImplementedError

    def equal_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile | int, ...]]:
        """Like `negative_slope`, by a tile of logits of equal pairs."""
        raise NotImplementedError

    def loss_of_rows(
        self,
        logits: Float[Array, "b N"],
        is_positive: Bool[Array, "b N"],
        scalars: Scalars,
        is_equal: Bool[Array, "b N"] | None = None,
    ) -> Float[Array, " b"]:
        """The dense form of one direction, differentiated by JAX.

        Args:
            logits: of the local rows with the global batch.
            is_positive: one in every row.
            scalars: of `create`.
            is_equal: the equal pairs; given unless these are negatives.
        """
        raise NotImplementedError


def check_equal_pairs(value: str) -> None:
    """Raises ValueError unless `value` is one of `EQUAL_PAIRS`."""
    if value not in EQUAL_PAIRS:
        known = ", ".join(f"'{name}'" for name in EQUAL_PAIRS)
        raise ValueError(f"equal_pairs: expected one of {known}, got {value!r}")


def check_scalar(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a scalar, traced or not."""
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}")


def pair_metrics(statistics: PairStatistics, axis_name: AxisName) -> dict[str, jax.Array]:
    """The metrics of `contrastive.sharded_loss`, of the statistics of the local rows."""

    def mean(values: jax.Array) -> jax.Array:
        return jax.lax.pmean(jnp.mean(values.astype(jnp.float32)), axis_name)

    statistics = jax.lax.stop_gradient(statistics)
    metrics = {}
    if statistics.num_negatives is not None:
        num_others = jax.lax.axis_size(axis_name) * len(statistics.positive) - 1
        metrics["equal_pairs"] = mean(statistics.num_negatives < num_others)
        # Without any negative it is as dissimilar as can be, and not infinitely.
        statistics = statistics._replace(
            image_hardest=jnp.maximum(statistics.image_hardest, -1),
            text_hardest=jnp.maximum(statistics.text_hardest, -1),
        )
    positive = statistics.positive
    hardest = (statistics.image_hardest + statistics.text_hardest) / 2
    return {
        "i2t_accuracy": mean(
            _top1_credit(positive, statistics.image_hardest, statistics.image_ties)
        ),
        "t2i_accuracy": mean(_top1_credit(positive, statistics.text_hardest, statistics.text_ties)),
        "positive_similarity": mean(positive),
        "hardest_negative_similarity": mean(hardest),
        **metrics,
    }


def _top1_credit(positive: jax.Array, hardest: jax.Array, ties: jax.Array) -> jax.Array:
    """[b]: 1 if the positive wins, 1/(1 + t) if it ties with t negatives, else 0."""
    return jnp.where(positive > hardest, 1, jnp.where(positive == hardest, 1 / (1 + ties), 0))


Parameters = dict[str, Any]


@dataclasses.dataclass(eq=False)
class Term:
    """A term of the objective, as its section of the config describes it.

    Attributes:
        settings: the keys of its section, each with its default or, for one with a range, a
            `diht_jax.config.keys.Key`; a `weight` of 0 leaves the term out.
        num_labels: k, how many of the teacher's labels of each kind it reads from a record. They
            are in the batch as `object_ids` int32 [b, k], `object_probs` float32 [b, k],
            `attribute_ids` and `attribute_probs`; with 0 they may be absent.
        teacher_width: D, of the CLIP teachers' embeddings that it reads. They are in the batch as
            `teacher_image_emb` and `teacher_text_emb`, float16 [b, D]; with 0 they may be absent.
        reads_image_tokens: whether `of_examples` gets all tokens of the image tower. Without, the
            last block computes the class token alone.
        multipliers: entries for `config.optimizer.multipliers`, for its own parameters.
    """

    settings: ClassVar[dict[str, Any]] = {"weight": Key(0.0, NOT_NEGATIVE)}
    num_labels: ClassVar[int] = 0
    teacher_width: ClassVar[int] = 0
    reads_image_tokens: ClassVar[bool] = False
    multipliers: ClassVar[tuple[tuple[str, float, float], ...]] = ()

    name: str  # of its section
    section: ml_collections.ConfigDict  # of the config; values are in their ranges
    arch: Architecture  # sizes of the model

    def check(self) -> None:
        """Raises ValueError where the section of an active term is wrong within its ranges."""

    @property
    def is_active(self) -> bool:
        """True if the term counts in this run."""
        return self.section.weight > 0

    def bind_data(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config, with what the run must know of its data; most terms need nothing.

        Args:
            config: the whole training config.

        Raises:
            ValueError: the data lack what the term needs.
        """
        return config

    def parameters(self, key: jax.Array, widths: dict[str, int], dtype: DTypeLike) -> Parameters:
        """The term's own parameters at the start, by names that no other term has.

        Args:
            key: for random ones.
            widths: size of the features `pooled` and `projected`; see `of_examples`.
            dtype: of the stored parameters.
        """
        return {}

    def of_examples(
        self, params: Parameters, features: dict[str, jax.Array], examples: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Losses that depend on one example alone, on one device and in one micro-batch.

        Args:
            params: all parameters; those of the towers' blocks may be split over devices.
            features: float [b, ...]: `pooled` of the image tower before the projection,
                `projected` after it, `image_emb` and `text_emb` L2-normalised; `image_tokens`
                [b, s, width], the class token first, for a term that reads them.
            examples: the batch.

        Returns:
            float32 [b] by the name of a loss, which is that of its metric.
        """
        return {}

    def of_batch(
        self,
        encoded: dict[str, jax.Array],
        params: Parameters,
        examples: dict[str, jax.Array],
        *,
        mesh: Mesh,
    ) -> dict[str, tuple[float, jax.Array]]:
        """Weights and losses of the global batch.

        Args:
            encoded: `image_emb` and `text_emb` [N, d], L2-normalised, and what `of_examples`
                returns, [N]; split over the mesh by rows.
            params: all parameters.
            examples: the global batch.
            mesh: axes `data` and `fsdp`, for a term that compares all pairs.

        Returns:
            Weight and scalar by the name of a loss, which is that of its metric.
        """
        raise NotImplementedError
