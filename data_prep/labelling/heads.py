"""The heads of a labelling job: those that are there, those of another folder, or new ones.

Heads and vocabulary stay while few of the shards are others than those they were made for
(`config.heads.max_changed_shards`), since new ones mean that every shard is labelled again. New
heads learn from as many shards as have the images that the config wants, chosen by their names:
these are embedded first, and each of the others is embedded and labelled in one pass.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from data_prep.labelling import head_files
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.embeddings import LocalCopies
from data_prep.labelling.examples import choose_shards, gather_examples, warn_of_few_mentions
from data_prep.labelling.tasks import LabelTask, describe_inputs, name_of
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.vocabulary import (
    Vocabulary,
    encode_concepts,
    read_vocabulary,
    vocabulary_path,
)
from diht_jax.storage import files

_HEADS_VERSION = 1
# Keys of `config.heads` that do not decide what the heads become.
_NOT_HASHED = ("max_changed_shards",)


@dataclasses.dataclass(frozen=True)
class HeadsPlan:
    """Where the heads of a folder come from.

    Attributes:
        vocabulary: v of each head.
        sample: the embedding tasks of the shards that new heads learn from; empty where no head is
            trained.
        found: the description of heads that stay; None where they are made.
    """

    vocabulary: Vocabulary
    sample: list[LabelTask]
    found: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class HeadsFolder:
    """The heads of an output folder: those that are there, those of another folder, or new ones.

    Attributes:
        config: of `labelling.config.default_config`.
        folder: of the output.
        embedded: the embedding task of every shard.
        embeddings_hash: of `embeddings.hash_embeddings`.
    """

    config: ml_collections.ConfigDict
    folder: str
    embedded: Sequence[LabelTask]
    embeddings_hash: str

    def plan(self) -> HeadsPlan:
        """Decides whether the heads stay, and else what they are made of.

        Raises:
            ValueError: a shard without counts of concepts, or no concept is frequent enough.
        """
        config = self.config
        loaded = read_vocabulary(config.heads.load) if config.heads.load else None
        found = self._find(loaded)
        if loaded or found:
            return HeadsPlan(loaded or read_vocabulary(self.folder), [], found)
        counted = concept_vocabulary.read_counts([task.source.path for task in self.embedded])
        settings = config.vocabulary
        vocabulary = concept_vocabulary.build_vocabulary(
            counted.concepts,
            min_count=settings.min_count,
            stop={"objects": settings.stop_objects, "attributes": settings.stop_attributes},
            max_size={"objects": settings.max_objects, "attributes": settings.max_attributes},
        )
        logging.info("%d objects, %d attributes", *map(len, vocabulary))
        chosen = choose_shards(counted.records, list(map(name_of, self.embedded)), config)
        return HeadsPlan(vocabulary, [self.embedded[number] for number in chosen])

    def use_trained(self, plan: HeadsPlan) -> HeadsPlan:
        """The plan with the heads of another job, where one has trained them since it was made."""
        found = self._find(plan.vocabulary if self.config.heads.load else None)
        return HeadsPlan(read_vocabulary(self.folder), plan.sample, found) if found else plan

    def obtain(
        self,
        plan: HeadsPlan,
        failed: Collection[str],
        teacher: TeacherInfo,
        copies: LocalCopies | None = None,
    ) -> dict[str, Any]:
        """Writes vocabulary, heads and description by a plan.

        Args:
            plan: of this folder; the embeddings of its sample are read.
            failed: sources of the sample that have no embeddings.
            teacher: whose embeddings they are.
            copies: where copies of them may be.

        Returns:
            The description, as `heads.json` has it.
        """
        config, folder = self.config, self.folder
        for part in plan.vocabulary:
            files.write_bytes(vocabulary_path(folder, part.kind), encode_concepts(part))
        if plan.found is not None:
            logging.info("heads: trained before")
            return plan.found
        heads, results = {}, {}
        if config.heads.load:
            heads, results = head_files.load_trained(config.heads.load, teacher)
        else:
            # Workers hold the teacher on the same device, and come back after the training.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            # It needs JAX, for which a job that trains nothing should not wait.
            from data_prep.labelling.train_heads import train_and_measure

            sample = [task for task in plan.sample if str(task.source) not in failed]
            train, held_out = gather_examples(config, plan.vocabulary, sample, copies)
            warn_of_few_mentions(train, held_out)
            for part in filter(len, plan.vocabulary):
                heads[part.kind], results[part.kind] = train_and_measure(
                    config, part, train, held_out
                )
        head_files.write_heads(folder, heads)
        missing = {name_of(task): None for task in self.embedded if str(task.source) in failed}
        description = {
            "weights_hash": head_files.hash_heads(folder),
            "recipe": self._hash_recipe(),
            "inputs": describe_inputs(self.embedded) | missing,
            "loaded_from": config.heads.load,
            "vocabulary": plan.vocabulary.describe(),
            "teacher": dict(teacher.identity),
            "heads": results,
        }
        files.write_object(files.join(folder, head_files.DESCRIPTION), description)
        return description

    def _find(self, loaded: Vocabulary | None) -> dict[str, Any] | None:
        """The description of heads that stay; None where they are to be made.

        Args:
            loaded: vocabulary of the heads that are taken over; these stay for any shards.
        """
        description = head_files.read_description(self.folder)
        if (
            description is None
            or description["weights_hash"] != head_files.hash_heads(self.folder)
            or description["recipe"] != self._hash_recipe()
        ):
            return None
        if loaded is not None:
            return description if description["vocabulary"] == loaded.describe() else None
        now, before = describe_inputs(self.embedded), description["inputs"]
        # A shard that had failed at that time (None) may come.
        changed = [
            name
            for name in before.keys() | now.keys()
            if before.get(name, "") not in (None, now.get(name, ""))
        ]
        limit = self.config.heads.max_changed_shards
        allowed = allowed_number(limit, len(before))
        if changed:
            logging.info(
                "heads: %d of %d shards are others than when they were trained, and "
                "config.heads.max_changed_shards=%g allows %d: they %s",
                len(changed),
                len(before),
                limit,
                allowed,
                "stay" if len(changed) <= allowed else "are trained again",
            )
        return description if len(changed) <= allowed else None

    def _hash_recipe(self) -> str:
        """A hash of all that decides vocabulary and heads but the shards."""
        config = self.config
        settings = {
            "format_version": _HEADS_VERSION,
            "heads": {k: v for k, v in config.heads.to_dict().items() if k not in _NOT_HASHED},
            "vocabulary": config.vocabulary.to_dict(),
            "seed": config.seed,
            "embeddings": self.embeddings_hash,
        }
        return shards.hash_config(settings)
