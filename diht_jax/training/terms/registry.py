"""The terms of the objective, keyed by name, which is also their config section."""

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
