"""The terms of the objective by name, which is the name of their section in the config."""

from __future__ import annotations

from diht_jax.extras.affinity import AffinityDistillation
from diht_jax.extras.captioning import Captioning
from diht_jax.losses.objective import Term
from diht_jax.training.terms.concepts import ConceptDistillation

TERMS: dict[str, type[Term]] = {
    "concepts": ConceptDistillation,
    "affinity": AffinityDistillation,
    "captioning": Captioning,
}
