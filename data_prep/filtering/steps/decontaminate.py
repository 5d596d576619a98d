"""Pictures that are in an evaluation set: by their pixels, or by a perceptual hash.

How pictures are hashed belongs in `data_prep.duplicates.image_hashes`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from data_prep.duplicates.image_hashes import open_index, try_hash
from data_prep.filtering.steps.base import Candidate, Drop, Step
from diht_jax.config import TextOrSections
from diht_jax.data.readers.base import SourceShard


class DecontaminateStep(Step):
    """Drops pairs whose picture is in one of the sets; the name of the set is the reason."""

    name = "decontaminate"
    order = 22  # pictures are decoded; those that cannot be are gone
    reads = ("image",)
    reasons = {}
    section = "decontaminate"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.decontaminate = ml_collections.ConfigDict()
        # name -> a source of docs/data.md, or an index of data_prep.duplicates.image_hashes, such
        # as sets.cifar10 = "/data/cifar10_test.tar"; or a text, "cifar10=/data/cifar10_test.tar"
        # with commas between several.
        c.sets = TextOrSections.reference()
        c.perceptual = True  # compare perceptual hashes too; False: equal pixels only
        c.max_bits = 6  # of 64 that may differ between perceptual hashes

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        bits = config.decontaminate.max_bits
        if not 0 <= bits <= 16:
            raise ValueError(f"config.decontaminate.max_bits={bits}; expected 0 to 16")
        _sets(config)

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return bool(_sets(config))

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        digests = {name: open_index(path).digest() for name, path in _sets(config).items()}
        return super().describe_rules(config) | {"decontaminate_sets": digests}

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._sets = {name: open_index(path) for name, path in _sets(config).items()}

    def judge(self, candidates: Sequence[Candidate]) -> Iterator[Candidate | Drop]:
        pictures = [try_hash(candidate.pair.image) for candidate in candidates]
        c = self.config.decontaminate
        max_bits = c.max_bits if c.perceptual else None
        found = {name: index.find(pictures, max_bits) for name, index in self._sets.items()}
        for number, candidate in enumerate(candidates):
            matches = ((name, found[name][number]) for name in found)
            match = next(((name, match) for name, match in matches if match is not None), None)
            if match is None:
                yield candidate
                continue
            name, (key, bits) = match
            how = "equal pixels" if bits is None else f"{bits} of 64 bits differ"
            yield Drop(candidate, name, evidence=f"{key} of {name}: {how}")


def _sets(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Name -> path of the evaluation sets.

    Raises:
        ValueError: they are written in another form.
    """
    sets = config.decontaminate.sets
    if isinstance(sets, str):
        entries = [text.partition("=") for text in filter(None, sets.split(","))]
        found = [(name.strip(), path.strip()) for name, _, path in entries]
    else:
        found = list((sets or {}).items())
    repeated = [
        name for name, count in collections.Counter(n for n, _ in found).items() if count > 1
    ]
    wrong = [name for name, path in found if not name or not isinstance(path, str) or not path]
    if repeated or wrong:
        raise ValueError(
            f"config.decontaminate.sets={sets!r}; expected a different name and a path for each, "
            "such as 'cifar10=/data/cifar10_test.tar,coco=/data/coco.npz'"
        )
    return dict(found)
