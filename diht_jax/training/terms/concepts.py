"""Concept distillation: heads on the image tower predict the teacher's objects and attributes."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from diht_jax.config.keys import COUNT, NOT_NEGATIVE, Key, OneOf
from diht_jax.losses.concepts import concept_losses_in_chunks, mean_over_labelled
from diht_jax.losses.objective import Parameters, Term

HEADS = "concept_heads"


# Maps a head, which is also a kind of vocabulary, to the prefix of its keys, fields and metrics.
_STEMS = {"objects": "object", "attributes": "attribute"}


class ConceptDistillation(Term):
    """Soft-target cross-entropy of two linear heads; a weight of 0 removes its head.

    The data must be labelled (`data_prep.label`); the vocabularies must fit the heads.

    Source: DiHT, arXiv 2301.02280, "Concept distillation".
    """

    settings: ClassVar[dict[str, Any]] = {
        "object_weight": Key(0.0, NOT_NEGATIVE),  # of the loss on objects; 0: no head for them
        "attribute_weight": Key(0.0, NOT_NEGATIVE),  # of the loss on attributes
        "num_objects": Key(10_000, COUNT),  # logits of the head, at least the vocabulary's size
        "num_attributes": Key(2_000, COUNT),  # logits of the other head
        "top_k": Key(10, COUNT),  # labels of each kind that are taken from a record
        # "pooled" or "projected": the image tower's, before or after projection.
        "feature": Key("pooled", OneOf(("pooled", "projected"))),
        "learning_rate_multiplier": Key(10.0, NOT_NEGATIVE),  # for the heads
        "weight_decay_multiplier": Key(0.01, NOT_NEGATIVE),  # for the heads
        "chunk_rows": Key(512, COUNT),  # examples of a device whose logits are held at once
        # Hashes of the data's vocabularies; training fills them in.
        "object_hash": Key(str),
        "attribute_hash": Key(str),  # filled in by training
    }

    @property
    def active_heads(self) -> dict[str, str]:
        """The heads with a weight in this run."""
        return {head: kind for head, kind in _STEMS.items() if self.section[f"{kind}_weight"] > 0}

    @property
    def is_active(self) -> bool:
        return bool(self.active_heads)

    @property
    def num_labels(self) -> int:
        return self.section.top_k

    @property
    def multipliers(self) -> tuple[tuple[str, float, float], ...]:
        section = self.section
        factors = (section.learning_rate_multiplier, section.weight_decay_multiplier)
        return ((f"^{HEADS}/", *factors),)

    def bind_data(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns the config with the hashes of the vocabularies that label the data.

        As part of the run's config they prevent resuming on data whose ids mean other
        concepts.
        """
        # Imported here, since the defaults of a config are read without any data.
        from diht_jax.records.train_data import describe_train
        from diht_jax.records.vocabulary import find_train_vocabulary

        vocabulary = find_train_vocabulary(config.data.train, config.data.labels)
        data = describe_train(config.data.train)
        if vocabulary is None:
            raise ValueError(
                f"config.data.train={data}: the records carry no concept labels, "
                "which config.concepts.object_weight and attribute_weight ask for; label them "
                "with `python -m data_prep.label` and name its folder by config.data.labels, or "
                "set both weights to 0 to train without concepts"
            )
        config = config.copy_and_resolve_references()
        for (head, kind), concepts in zip(_STEMS.items(), vocabulary, strict=True):
            room, hash_key = config.concepts[f"num_{head}"], f"{kind}_hash"
            if len(concepts) > room:
                raise ValueError(
                    f"config.concepts.num_{head}={room}: the data's vocabulary has "
                    f"{len(concepts)} {concepts.kind}; raise it to at least that"
                )
            expected = config.concepts[hash_key]
            if expected is not None and expected != concepts.hash:
                raise ValueError(
                    f"config.concepts.{hash_key}={expected}: the {concepts.kind} of "
                    f"{data} have the hash {concepts.hash}; take data labelled with "
                    "the same vocabulary"
                )
            config.concepts[hash_key] = concepts.hash
        return config

    def parameters(self, key: jax.Array, widths: dict[str, int], dtype: DTypeLike) -> Parameters:
        """Returns heads of zeros, whose initial predictions are uniform."""
        width = widths[self.section.feature]
        heads = {}
        for head in self.active_heads:
            size = self.section[f"num_{head}"]
            heads[head] = {
                "kernel": jnp.zeros((width, size), dtype),
                "bias": jnp.zeros(size, dtype),
            }
        return {HEADS: heads}

    def of_examples(
        self,
        params: Parameters,
        features: dict[str, Float[Array, "b ..."]],
        examples: dict[str, Shaped[Array, "b ..."]],
    ) -> dict[str, Float[Array, " b"]]:
        """Computes the losses of each example, 0 if unlabelled; see `Term.of_examples`."""
        return {
            f"{kind}_loss": concept_losses_in_chunks(
                features[self.section.feature],
                params[HEADS][head]["kernel"],
                params[HEADS][head]["bias"],
                examples[f"{kind}_ids"],
                examples[f"{kind}_probs"],
                chunk_rows=self.section.chunk_rows,
            )
            for head, kind in self.active_heads.items()
        }

    def of_batch(
        self,
        encoded: dict[str, Float[Array, "N ..."]],
        params: Parameters,
        examples: dict[str, Shaped[Array, "N ..."]],
        *,
        mesh: Mesh,
    ) -> dict[str, tuple[float, Float[Array, ""]]]:
        """Computes the means over labelled examples; see `Term.of_batch`."""
        losses = {}
        for kind in self.active_heads.values():
            is_labelled = jnp.sum(examples[f"{kind}_probs"], axis=1) > 0
            part = mean_over_labelled(encoded[f"{kind}_loss"], is_labelled)
            losses[f"{kind}_loss"] = (self.section[f"{kind}_weight"], part)
        return losses
