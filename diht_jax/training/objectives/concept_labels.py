"""Whether the data's concept labels are what a run's concept heads need.

Called once by the training loop, before anything is built.
"""

from __future__ import annotations

import ml_collections

from diht_jax.data.records.vocabulary import find_vocabulary
from diht_jax.training.objective import CONCEPT_KINDS, active_kinds

_HASHES = {"objects": "object_hash", "attributes": "attribute_hash"}


def with_vocabulary(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with the hashes of the vocabularies that the data is labelled with.

    They travel in the run's config, so that a run cannot be resumed on data whose ids mean other
    concepts.

    Args:
        config: the whole training config; it comes back as it is where no concept loss counts.

    Raises:
        ValueError: the data is not labelled, a vocabulary has no room in its head, or is not the
            one that the config names.
    """
    if not active_kinds(config.concepts):
        return config
    vocabulary = find_vocabulary(config.data.train)
    if vocabulary is None:
        raise ValueError(
            f"config.data.train={config.data.train}: the records carry no concept labels, which "
            "config.concepts.object_weight and attribute_weight ask for; label them with "
            "`python -m data_prep.label`, or set both weights to 0 to train without concepts"
        )
    config = config.copy_and_resolve_references()
    for kind, concepts in zip(CONCEPT_KINDS, vocabulary, strict=True):
        room = config.concepts[kind.size]
        if len(concepts) > room:
            raise ValueError(
                f"config.concepts.{kind.size}={room}: the data's vocabulary has "
                f"{len(concepts)} {concepts.kind}; raise it to at least that"
            )
        key = _HASHES[concepts.kind]
        expected = config.concepts[key]
        if expected is not None and expected != concepts.hash:
            raise ValueError(
                f"config.concepts.{key}={expected}: the {concepts.kind} of "
                f"{config.data.train} have the hash {concepts.hash}; take data labelled with the "
                "same vocabulary"
            )
        config.concepts[key] = concepts.hash
    return config
