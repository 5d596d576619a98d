"""Base classes of contrastive losses (`Objective`) and of other terms of the objective (`Term`).

A contrastive loss has settings, learnt scalars, and a formula for one row of the logits
`s_ij = logit_scale * <image_i, text_j>`. It is the sum of this formula over all rows and columns.
The streaming form has three steps for a row. `accumulate` sums over tiles of negatives. `finish`
computes the loss and its slopes from these sums and the positive. `negative_slope` computes the
derivative of the row's loss by each negative logit. The dense form only needs `loss_of_rows`, which
JAX differentiates. All of this is elementwise: matrix products are in `dense.py` and
`streaming.py`, and the ring of devices in `ring.py`.

Pairs with equal ids (for example equal captions) are negatives of one another by default
(`equal_pairs`). With "mask" they are neither positives nor negatives, and an objective only needs
the number of remaining negatives. With "positive" each is a positive of the others, and the
streaming form also needs `accumulate_equal` and `equal_slope`.

A new loss is a file with a subclass of `Objective` and a line in `registry.py`. A new term is a
subclass of `Term` and a line in `diht_jax/training/terms/registry.py`; its name there is the name
of its section in the config.
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

# Scalars of an objective, from the config or learnt; each objective defines their order.
Scalars = tuple[jax.Array | float, ...]
# Relations of pairs with equal ids.
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
        positive: similarity of the pair.
        image_hardest, text_hardest: highest similarity of the image (the text) with a negative.
        image_ties, text_ties: number of negatives with this similarity.
        num_negatives: of the image, and also of the text; None if all others are negatives.
    """

    positive: Rows
    image_hardest: Rows
    image_ties: Rows
    text_hardest: Rows
    text_ties: Rows
    num_negatives: Rows | None = None


class Masks(NamedTuple):
    """Masks of the kinds of logits of a tile; entries in none of them are padding."""

    is_positive: TileMask  # the pair itself
    is_negative: TileMask
    # An equal pair other than the pair itself; None if equal pairs are negatives.
    is_equal: TileMask | None = None


class RowStatistics(NamedTuple):
    """Running statistics of rows (or columns)."""

    highest: Rows  # highest negative logit so far; its initial value is finite
    ties: Rows  # number of negatives with this logit
    sums: tuple[Rows, ...]  # of `Objective.accumulate`
    num_negatives: Rows | None = None  # so far; None if all other pairs are negatives
    equal: RowStatistics | None = None  # statistics of equal pairs, if these are positives


class RowSlopes(NamedTuple):
    """Values of rows (or columns) that the backward pass needs."""

    positive: Rows  # derivative of the row's loss by its positive logit
    negative: Rows  # factor of the derivative by a negative logit
    offsets: tuple[Rows, ...]  # used by `negative_slope` and `equal_slope`
    scalars: tuple[Rows, ...]  # derivatives by all scalars, without those of `second_pass`
    # Coefficients of the derivative by the logit of an equal pair, if these are positives.
    equal: tuple[Rows, ...] = ()


class Objective:
    """A contrastive loss. Instances are hashable and hold the static settings of a trace."""

    settings: ClassVar[dict[str, Any]] = {}  # its keys of `config.loss` with their defaults
    # Initial values of the learnt scalars, by name; each is a trained parameter with this name.
    parameters: ClassVar[dict[str, float]] = {}
    # Initial value of `logit_scale`; None is that of the model.
    initial_logit_scale: ClassVar[float | None] = None
    num_sums: int = 1  # number of running sums of a row
    # Indices of the scalars whose derivatives need a second pass over the negative logits.
    second_pass: tuple[int, ...] = ()
    # Whether the loss stores a running mean of each record (`fastclip.py`).
    keeps_means: ClassVar[bool] = False
    # One of `EQUAL_PAIRS`; a loss without this setting supports only the first.
    equal_pairs: str = EQUAL_PAIRS[0]
    num_equal_sums: int = 0  # number of running sums of a row over its equal pairs

    @classmethod
    def create(cls, **values: Any) -> tuple[Self, Scalars]:
        """Returns the objective and its scalars.

        Args:
            **values: one for each name in `settings` and `parameters`; may be traced.

        Raises:
            ValueError: a value is out of range; the message begins with its name and a colon.
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
        """Adds the negatives of one more tile to the running sums of rows.

        To merge the sums of different negatives, the ring calls this with an empty tile, which
        makes the sums relative to the same `highest`, and then adds them.

        Args:
            statistics: of the previous tiles.
            highest: highest negative logit including this tile.
            logits, is_negative: of the tile; other logits must be ignored.
            axis: of the tile, to sum over: 1 for rows, 0 for columns, -1 for an empty tile.
            scalars: from `create`.
        """
        raise NotImplementedError

    def finish(
        self, statistics: RowStatistics, positives: Rows, scalars: Scalars, num_pairs: int
    ) -> tuple[Rows, RowSlopes]:
        """Computes the losses and slopes of rows from the sums over all negatives.

        Args:
            statistics: of all negatives.
            positives: logits of the pairs.
            scalars: from `create`.
            num_pairs: N, of the global batch.
        """
        raise NotImplementedError

    def negative_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile, ...]]:
        """Computes derivatives by a tile of negative logits, and by the `second_pass` scalars.

        Args:
            logits: of the tile; the caller ignores the results for positives.
            slopes: from `finish`.
            axis: along which to expand the rows' values: 1 for rows, 0 for columns.
            scalars: from `create`.
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
        """Like `accumulate`, for the equal pairs of a tile, if these are positives."""
        raise NotImplementedError

    def equal_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile | int, ...]]:
        """Like `negative_slope`, for a tile of logits of equal pairs."""
        raise NotImplementedError

    def loss_of_rows(
        self,
        logits: Float[Array, "b N"],
        is_positive: Bool[Array, "b N"],
        scalars: Scalars,
        is_equal: Bool[Array, "b N"] | None = None,
    ) -> Float[Array, " b"]:
        """Computes the dense form of one direction, which JAX differentiates.

        Args:
            logits: of the local rows with the global batch.
            is_positive: mask of the pairs themselves, one in every row.
            scalars: from `create`.
            is_equal: mask of equal pairs; None if these are negatives.
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
    """Computes the metrics of `contrastive.sharded_loss` from statistics of the local rows."""

    def mean(values: jax.Array) -> jax.Array:
        return jax.lax.pmean(jnp.mean(values.astype(jnp.float32)), axis_name)

    statistics = jax.lax.stop_gradient(statistics)
    metrics = {}
    if statistics.num_negatives is not None:
        num_others = jax.lax.axis_size(axis_name) * len(statistics.positive) - 1
        metrics["equal_pairs"] = mean(statistics.num_negatives < num_others)
        # A row without negatives gets the lowest possible cosine similarity instead of -inf.
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
    """Returns [b]: 1 if the positive wins, 1/(1 + t) if it ties with t negatives, else 0."""
    return jnp.where(positive > hardest, 1, jnp.where(positive == hardest, 1 / (1 + ties), 0))


Parameters = dict[str, Any]


@dataclasses.dataclass(eq=False)
class Term:
    """A term of the objective, configured by its own section of the config.

    Attributes:
        settings: defaults of the keys of its section; one with a range is a
            `diht_jax.config.keys.Key`. A `weight` of 0 disables the term.
        num_labels: k, the number of teacher labels of each kind that it reads from a record. They
            are in the batch as `object_ids` int32 [b, k], `object_probs` float32 [b, k],
            `attribute_ids` and `attribute_probs`. If k is 0, they may be absent.
        teacher_width: D, the width of the CLIP teachers' embeddings that it reads, float16 [b, D]
            `teacher_image_emb` and `teacher_text_emb` in the batch. If D is 0, they may be absent.
        reads_image_tokens: whether `of_examples` needs all tokens of the image tower. If no term
            does, the last block computes only the class token.
        multipliers: entries of `config.optimizer.multipliers` for its own parameters.
    """

    settings: ClassVar[dict[str, Any]] = {"weight": Key(0.0, NOT_NEGATIVE)}
    num_labels: ClassVar[int] = 0
    teacher_width: ClassVar[int] = 0
    reads_image_tokens: ClassVar[bool] = False
    multipliers: ClassVar[tuple[tuple[str, float, float], ...]] = ()

    name: str  # of its section
    section: ml_collections.ConfigDict  # of the config, with values checked against their ranges
    arch: Architecture  # sizes of the model

    def check(self) -> None:
        """Raises ValueError if an active term's section is invalid with all values in range."""

    @property
    def is_active(self) -> bool:
        """Whether the term has a weight above 0."""
        return self.section.weight > 0

    def bind_data(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns the config with settings that the term reads from its data; default: unchanged.

        Args:
            config: the whole training config.

        Raises:
            ValueError: the data lack what the term needs.
        """
        return config

    def parameters(self, key: jax.Array, widths: dict[str, int], dtype: DTypeLike) -> Parameters:
        """Returns the initial values of the term's own parameters; names are unique among terms.

        Args:
            key: random key.
            widths: sizes of the features `pooled` and `projected`; see `of_examples`.
            dtype: of the stored parameters.
        """
        return {}

    def of_examples(
        self, params: Parameters, features: dict[str, jax.Array], examples: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Computes the losses of single examples, on one device and in one micro-batch.

        Args:
            params: all parameters; those of the towers' blocks may be sharded.
            features: float [b, ...]: `pooled` and `projected` features of the image tower (before
                and after the projection), L2-normalised `image_emb` and `text_emb`, and
                `image_tokens` [b, s, width] with the class token first, for a term that reads them.
            examples: the batch.

        Returns:
            float32 [b] by the name of a loss, which is also the name of its metric.
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
        """Computes the losses of the global batch, with their weights.

        Args:
            encoded: `image_emb` and `text_emb` [N, d], L2-normalised, and the results of
                `of_examples`, [N]; rows are sharded over the mesh.
            params: all parameters.
            examples: the global batch.
            mesh: axes `data` and `fsdp`, for a term that compares all pairs.

        Returns:
            Weight and scalar by the name of a loss, which is also the name of its metric.
        """
        raise NotImplementedError
