"""Conditions on the metadata of a pair: `punsafe < 0.5`, `pwatermark < 0.5`, sizes, a language.

The paper removed unsafe and watermarked pairs before CAT (DiHT, arXiv 2301.02280). The language of
the conditions belongs in `expressions`.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.steps.base import EVIDENCE, Candidate, Step
from data_prep.steps.expressions import Condition, parse_condition
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair

MISSING = ("drop", "keep")


class PredicateStep(Step):
    """Drops pairs for which one of the conditions does not hold, the first such counts.

    Reasons are the conditions themselves: "CONDITION is false", and "CONDITION is unknown" where
    the pair lacks a field.
    """

    name = "metadata"
    order = 5  # no caption is parsed yet
    reads = ("metadata",)
    reasons = {}
    section = "predicates"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.predicates = ml_collections.ConfigDict()
        # What must hold, such as ("punsafe < 0.5", "pwatermark < 0.5"); steps/expressions.py
        c.require = ()
        # What becomes of a pair whose metadata does not decide a condition, since a field is
        # missing or is no number: "drop" (and a field that no pair has drops all) or "keep".
        c.missing = "drop"

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c = config.predicates
        if c.missing not in MISSING:
            raise ValueError(
                f"config.predicates.missing='{c.missing}'; expected one of {', '.join(MISSING)}"
            )
        texts = [condition.text for condition in _parse(c.require)]
        repeated = [text for text, count in collections.Counter(texts).items() if count > 1]
        if repeated:
            raise ValueError(f"config.predicates.require has '{repeated[0]}' more than once")

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return bool(config.predicates.require)

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._source = source
        self._conditions = _parse(config.predicates.require)
        self._drops_unknown = config.predicates.missing == "drop"
        self._unknown: collections.Counter[str] = collections.Counter()
        self._seen = 0

    def measure(self, batch: Sequence[Candidate]) -> dict[str, Sequence[Any]]:
        self._seen += len(batch)
        found = [self._find_reason(_fields(candidate.pair)) for candidate in batch]
        return {self.name: [reason for reason, _ in found], EVIDENCE: [shown for _, shown in found]}

    def close(self) -> dict[str, Any]:
        """Warns of conditions that no pair of the shard decides: a field's name may be wrong."""
        for condition in self._conditions:
            if self._seen and self._unknown[condition.text] == self._seen:
                logging.warning(
                    "%s: '%s' is unknown for all %d pairs; is a field missing (%s)?",
                    self._source, condition.text, self._seen, ", ".join(condition.fields),
                )  # fmt: skip
        return {}

    def _find_reason(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Why a pair is dropped, and what of it decides."""
        for condition in self._conditions:
            holds = condition.holds(fields)
            if holds is None:
                self._unknown[condition.text] += 1
                if self._drops_unknown:
                    return f"{condition.text} is unknown", _show(condition, fields)
            elif not holds:
                return f"{condition.text} is false", _show(condition, fields)
        return None, None


def _parse(texts: Sequence[str]) -> list[Condition]:
    """The conditions of the config.

    Raises:
        ValueError: one is not of the language, with the key of the config.
    """
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"config.predicates.require={texts!r}; expected texts, such as "
            "('punsafe < 0.5', 'pwatermark < 0.5')"
        )
    try:
        return [parse_condition(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"config.predicates.require has {error}") from error


def _fields(pair: Pair) -> Mapping[str, Any]:
    """The metadata, with key and caption."""
    return {**pair.metadata, "key": pair.key, "caption": pair.caption}


def _show(condition: Condition, fields: Mapping[str, Any]) -> str:
    found = (f"{name} = {fields[name]!r:.80}" if fields.get(name) is not None else f"no {name}"
             for name in condition.fields)  # fmt: skip
    return ", ".join(found)
