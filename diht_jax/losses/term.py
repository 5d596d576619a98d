"""A term of the objective: its settings, its parameters and its losses.

A new term is a subclass of `Term` in a file of its own and a line in `registry.py`. Its name there
is the name of its section in the config.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import ml_collections
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diht_jax.config.keys import NOT_NEGATIVE, Key, check_ranges
from diht_jax.models.zoo import Architecture

Parameters = dict[str, Any]


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
        name: of its section.
        section: its section of the config.
        arch: sizes of the model.
    """

    settings: ClassVar[dict[str, Any]] = {"weight": 0.0}
    num_labels: int = 0
    teacher_width: int = 0
    reads_image_tokens: bool = False
    multipliers: tuple[tuple[str, float, float], ...] = ()

    def __init__(self, name: str, section: ml_collections.ConfigDict, arch: Architecture):
        """Keeps and checks the section.

        Args:
            name: of the section.
            section: of the config.
            arch: sizes of the model.

        Raises:
            ValueError: a value out of range; names the key, such as `config.concepts.num_objects`.
        """
        self.name, self.section, self.arch = name, section, arch
        self.check()

    def check(self) -> None:
        """Raises ValueError for a value out of range in the section."""
        keys = dict(self.settings)
        if "weight" in keys:
            keys["weight"] = Key(0.0, NOT_NEGATIVE)
        check_ranges(self.section, keys, f"config.{self.name}.")

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
