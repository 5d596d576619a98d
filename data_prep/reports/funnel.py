"""The funnel: how many pairs came in, why pairs were dropped and where, how many were kept.

It is filled pair by pair, kept as JSON beside each shard, merged and printed. A few examples of
every outcome are kept too, so that a person can look at them. Stages and reasons are those of the
filter steps, so that a new step shows itself; names that no step of today knows come last.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.steps.registry import ordered_steps
from data_prep.text_spotting.config import describe_counts
from diht_jax.readers.base import SOURCE_REASONS

KEPT = "kept"
SOURCE = "source"  # the stage of entries that are no pairs

_MAX_SAMPLE_CHARS = 500


def stage_reasons() -> dict[str, Mapping[str, str]]:
    """Stage -> reason -> the words for people, all in the order in which a pair meets them."""
    source = {reason: _spell_plainly(reason) for reason in SOURCE_REASONS}
    return {SOURCE: source} | {step.name: step.reasons for step in ordered_steps()}


def spell_reason(stage: str, reason: str) -> str:
    """A reason for people: "no words" for the caption stage's "empty"."""
    return stage_reasons().get(stage, {}).get(reason) or _spell_plainly(reason)


def spell_outcome(outcome: str) -> str:
    """An outcome of the samples for people: "Kept", or "Dropped, caption: no words"."""
    if outcome == KEPT:
        return "Kept"
    stage, _, reason = outcome.partition("/")
    return f"Dropped, {stage}: {spell_reason(stage, reason)}"


def _spell_plainly(reason: str) -> str:
    """Names become words; a reason that is a phrase, with names of fields in it, stays."""
    return reason if " " in reason else reason.replace("_", " ")


@dataclasses.dataclass
class Funnel:
    """Counts of one shard, or of many merged.

    Attributes:
        samples_per_outcome: how many examples to keep of each outcome.
        seed: decides which.
        read: pairs that came in.
        kept: pairs that were written.
        dropped: stage -> reason -> pairs. A pair is counted once, at the first stage that drops
            it: the source, then the steps in their order.
        image_formats: format -> kept pairs.
        text_spotting: what was done to find text, of `text_spotting.config.count_verdicts`.
    """

    samples_per_outcome: int = 0
    seed: int = 0
    read: int = 0
    kept: int = 0
    dropped: dict[str, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: {stage: collections.Counter() for stage in stage_reasons()}
    )
    image_formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    text_spotting: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _samples: dict[str, list[tuple[str, str, str]]] = dataclasses.field(default_factory=dict)

    def keep(self, key: str, text: str, image_format: str | None) -> None:
        """Counts a pair that was written; without a format where there is no image."""
        self.read += 1
        self.kept += 1
        if image_format is not None:
            self.image_formats[image_format] += 1
        self._add_samples(KEPT, [self._make_sample(key, text)])

    def drop(self, stage: str, reason: str, key: str, text: str) -> None:
        """Counts a pair that was not written.

        Args:
            stage: name of the step, or "source".
            reason: as the stage names it.
            key: of the pair.
            text: its caption, or what is known of it.
        """
        self.read += 1
        self.dropped.setdefault(stage, collections.Counter())[reason] += 1
        self._add_samples(f"{stage}/{reason}", [self._make_sample(key, text)])

    def merge(self, other: Funnel) -> None:
        """Adds the counts of another shard."""
        self.read += other.read
        self.kept += other.kept
        for stage, found in other.dropped.items():
            self.dropped.setdefault(stage, collections.Counter()).update(found)
        self.image_formats.update(other.image_formats)
        self.text_spotting.update(other.text_spotting)
        for outcome, samples in other._samples.items():
            self._add_samples(outcome, samples)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict, the same for the same pairs in whatever order."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": {
                stage: dict(sorted(found.items())) for stage, found in self.dropped.items()
            },
            "image_formats": dict(sorted(self.image_formats.items())),
            "text_spotting": dict(sorted(self.text_spotting.items())),
            "samples": {
                outcome: [list(sample) for sample in self._smallest(samples)]
                for outcome, samples in sorted(self._samples.items())
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], samples_per_outcome: int, seed: int) -> Funnel:
        """What `to_json` gave."""
        funnel = cls(
            samples_per_outcome,
            seed,
            data["read"],
            data["kept"],
            image_formats=collections.Counter(data["image_formats"]),
            text_spotting=collections.Counter(data["text_spotting"]),
            _samples={
                outcome: [tuple(s) for s in samples] for outcome, samples in data["samples"].items()
            },
        )
        funnel.dropped |= {k: collections.Counter(found) for k, found in data["dropped"].items()}
        return funnel

    def rows(self) -> list[tuple[str, str, int]]:
        """Stage, reason, pairs: what was read, the reasons as a pair meets them, what was kept."""
        rows = [("read", "", self.read)]
        stages = stage_reasons()
        for stage in [*stages, *sorted(self.dropped.keys() - stages.keys())]:
            known, found = stages.get(stage, {}), self.dropped.get(stage, {})
            order = [*(name for name in known if name in found), *sorted(found.keys() - set(known))]
            rows += [(stage, reason, found[reason]) for reason in order]
        return [*rows, (KEPT, "", self.kept)]

    def format_table(self) -> str:
        """The funnel as a table of counts and shares of what came in, and how text was found."""
        rows = [(stage, spell_reason(stage, reason), pairs) for stage, reason, pairs in self.rows()]
        reason_width = max(len(reason) for _, reason, _ in rows)
        count_width = max(len("pairs"), len(f"{self.read:,}"))
        width = max(8, *(len(stage) for stage, _, _ in rows))
        lines = [f"{'stage':{width}} {'reason':{reason_width}} {'pairs':>{count_width}}   share"]
        for stage, reason, count in rows:
            share = 100 * count / self.read if self.read else 0.0
            lines.append(
                f"{stage:{width}} {reason:{reason_width}} {count:>{count_width},}  {share:5.1f}%"
            )
        if self.text_spotting:
            lines.append(describe_counts(self.text_spotting))
        return "\n".join(lines)

    def rank(self, key: str, text: str) -> str:
        """A random rank that belongs to the pair.

        The lowest ranks of all shards together are a fair sample, whatever the order and the number
        of shards.
        """
        data = f"{self.seed}\n{key}\n{text}".encode("utf-8", "replace")
        return hashlib.blake2b(data, digest_size=8).hexdigest()

    def _make_sample(self, key: str, text: str) -> tuple[str, str, str]:
        return self.rank(key, text), key, text[:_MAX_SAMPLE_CHARS]

    def _add_samples(self, outcome: str, samples: Iterable[tuple[str, str, str]]) -> None:
        kept = self._samples.setdefault(outcome, [])
        kept.extend(samples)
        if len(kept) > 4 * self.samples_per_outcome:
            self._samples[outcome] = self._smallest(kept)

    def _smallest(self, samples: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
        return sorted(samples)[: self.samples_per_outcome]
