"""Heads of a labelling job: existing ones, loaded ones, or newly trained ones.

Heads and vocabulary are kept while few shards have changed since the training
(`config.heads.max_changed_shards`), because new heads require labelling every shard again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from data_prep.labelling import head_files
from data_prep.labelling.embeddings import LocalCopies
from data_prep.labelling.examples import (
    build_vocabulary,
    choose_shards,
    count_named,
    gather_examples,
    read_counts,
)
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from diht_jax.storage import files, locks

_HEADS_VERSION = 1


class Heads:
    """The existing heads of an output folder, or the inputs needed to make new ones.

    Attributes:
        vocabulary: the concepts of each head.
        sample: embedding tasks of the shards that new heads are trained on; empty if no head is
            trained.
        description: contents of `heads.json`; None until the heads exist.
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        embedded: Sequence[LabelTask],
        embeddings_hash: str,
    ):
        """Decides whether existing heads can be kept.

        Raises:
            ValueError: a shard has no counts of concepts, or no concept is frequent enough.
        """
        self._config, self._folder = config, config.output
        self._embedded, self._embeddings_hash = embedded, embeddings_hash
        self.sample: list[LabelTask] = []
        if config.heads.load:
            self.vocabulary = read_vocabulary(config.heads.load)
        self.description = self._find()
        if self.description or config.heads.load:
            return
        concepts, records = read_counts([task.source.path for task in embedded])
        self.vocabulary = build_vocabulary(concepts, config.vocabulary)
        logging.info("%d objects, %d attributes", *map(len, self.vocabulary))
        chosen = choose_shards(records, [task.name for task in embedded], config)
        self.sample = [embedded[number] for number in chosen]

    def _find(self) -> dict[str, Any] | None:
        """Returns the description of the existing heads; None if new ones are needed."""
        found = head_files.read_description(self._folder)
        if found is None or found["recipe"] != self._hash_recipe():
            return None
        if self._config.heads.load:  # loaded heads are valid for any shards
            if found["vocabulary"] != self.vocabulary.describe():
                return None
        elif not self._are_few_changed(found["inputs"]):
            return None
        vocabulary = read_vocabulary(self._folder)
        if found["vocabulary"] != vocabulary.describe():  # a killed run replaced only one file
            return None
        self.vocabulary = vocabulary
        return found

    def obtain(
        self, failed: Collection[str], teacher: TeacherInfo, copies: LocalCopies
    ) -> dict[str, Any]:
        """Makes missing heads, and writes them with their vocabulary.

        Only one job makes them; other jobs wait in the meantime, and use the result.

        Returns:
            The description of the heads.
        """
        if self.description is None:
            with locks.leader_lock(self._folder):
                self.description = self._find()
                if self.description is None:
                    self.description = self._make(failed, teacher, copies)
                    return self.description
        logging.info("heads: trained before")
        return self.description

    def _make(
        self, failed: Collection[str], teacher: TeacherInfo, copies: LocalCopies
    ) -> dict[str, Any]:
        config = self._config
        heads, results, images = {}, {}, None
        if config.heads.load:
            heads, results = head_files.load_trained(config.heads.load, teacher)
        else:
            # Workers hold the teacher on the same device, and resume after the training.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            # Imported here because only training needs JAX, which is slow to import.
            from data_prep.labelling.train_heads import train_and_measure

            sample = [task for task in self.sample if str(task.source) not in failed]
            train, held_out = gather_examples(config, self.vocabulary, sample, copies)
            images = count_named(train, held_out)
            for part in (part for part in self.vocabulary if len(part)):
                heads[part.kind], results[part.kind] = train_and_measure(
                    config, part, train, held_out
                )
        # Written last, so a failed run leaves folder and labels unchanged.
        write_vocabulary(self._folder, self.vocabulary)
        head_files.write_heads(self._folder, heads)
        missing = {task.name: None for task in self._embedded if str(task.source) in failed}
        description = {
            "weights_hash": head_files.hash_heads(self._folder),
            "recipe": self._hash_recipe(),
            "inputs": _hash_inputs(self._embedded) | missing,
            "loaded_from": config.heads.load,
            "vocabulary": self.vocabulary.describe(),
            "teacher": dict(teacher.identity),
            "heads": results,
            "images": images,
        }
        path = files.join(self._folder, head_files.DESCRIPTION)
        files.write_object(path, description, with_checksum=True)
        return description

    def _are_few_changed(self, before: dict[str, str | None]) -> bool:
        """Returns whether few shards differ from `before`, the `_hash_inputs` of the training."""
        now = _hash_inputs(self._embedded)
        # A shard that had failed at that time (None) does not count as changed.
        changed = sum(
            before.get(name, "") not in (None, now.get(name, "")) for name in before | now
        )
        limit = self._config.heads.max_changed_shards
        allowed = allowed_number(limit, len(before), one_of_a_few=False)
        if changed:
            logging.info(
                "heads: %d of %d shards are others than when they were trained, and "
                "config.heads.max_changed_shards=%g allows %d: they %s",
                *(changed, len(before), limit, allowed),
                "stay" if changed <= allowed else "are trained again",
            )
        return changed <= allowed

    def _hash_recipe(self) -> str:
        """Hashes all settings that determine vocabulary and heads, except for the shards."""
        config = self._config
        heads = config.heads.to_dict()
        heads.pop("max_changed_shards")  # does not affect the result
        settings = {
            "format_version": _HEADS_VERSION,
            "heads": heads,
            "vocabulary": config.vocabulary.to_dict(),
            "seed": config.seed,
            "embeddings": self._embeddings_hash,
        }
        return shards.hash_config(settings)


def _hash_inputs(tasks: Sequence[LabelTask]) -> dict[str, str]:
    """Maps the name of each output to a hash that identifies the records of its input."""
    return {task.name: shards.hash_config({"shard": task.shard}) for task in tasks}
