"""The terms of the objective by name, which is the name of their section in the config."""

from __future__ import annotations

from diht_jax.training.terms.affinity import AffinityDistillation
from diht_jax.training.terms.captioning import Captioning
from diht_jax.training.terms.concepts import ConceptDistillation
from diht_jax.training.terms.term import Term

TERMS: dict[str, type[Term]] = {
    "concepts": ConceptDistillation,
    "affinity": AffinityDistillation,
    "captioning": Captioning,
}
