"""Makes the laboratory's data once: webs and their filtered variants, emoji, and photos.

A variant is a folder below the work directory. Its name determines how it is made (`variants.py`),
and a file in it marks it as complete.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
import time
from collections.abc import Callable

from absl import logging

from benchmarks.lab import clipart, concepts, second_web
from benchmarks.lab.experiments import EXPERIMENTS, STUDENTS, WEB_PAIRS
from benchmarks.lab.processes import locked
from benchmarks.lab.variants import MAKERS, NUM_SCENES
from data_prep.captions import RULES_VERSION
from data_prep.synthetic import web
from diht_jax.storage.files import write_bytes

GIVEN = "given"
# Variants that are made with a student -> the student's experiment. The group of the pattern is the
# student's seed; without a group, the seed is 0.
_MADE_WITH = {
    r"clip_score_(\d+)": "raw",
    r"second_\d+_clip_score_(\d+)": "raw",
    r"drawn_clip_score_(\d+)": "raw",
    r"clipart_clip_score_\d+": "emoji_clip_teacher",
    r"raw_rewritten_(\d+)": "cat_captioning",
    r"cifar10_wrong_\d+_clips": "cifar10_clip_teacher",
    r"cifar10_wrong_50_own_clips": "cifar10_wrong_50_clip_teacher",
    r"emoji_shuffled_\d+_\d+_clips": "emoji_clip_teacher",
}

# First version of the caption rules with the current data. A test checks that later rules keep the
# same pairs of the webs and read the same words in the photos' captions. If they do not, set this
# to their version; the existing results then belong to earlier data.
SAME_SINCE_RULES = 4

# Variants with labels that changed when the training of heads began to evaluate its first steps.
# With wrong captions or random weights it keeps heads of these steps; all other heads are later.
_OF_EARLY_HEADS = r"cifar10_wrong_(0_random|(25|50|75)_(teacher|random|shuffled))|emoji_labelled"

_COMPLETE = "complete.json"


@dataclasses.dataclass(frozen=True)
class Data:
    """Makes and finds the variants.

    Attributes:
        workdir: work directory; the variants are in its folder `data`.
        shared: folder with the public tars of emoji and CIFAR-10.
        given: path or URL of the variant "given", which is made elsewhere.
        model_of: maps an experiment's name and a seed to the work directory of the student.
    """

    workdir: pathlib.Path
    shared: pathlib.Path
    model_of: Callable[[str, int], pathlib.Path]
    given: str | None = None

    def make(self, name: str) -> pathlib.Path | str:
        """Returns the folder of a variant; makes it if it is missing or its rules have changed.

        Raises:
            ValueError: the name is unknown, or it is "given" and `given` is not set.
        """
        if name == GIVEN:
            if not self.given:
                raise ValueError("--train is required: records that data_prep.label has labelled")
            return self.given
        folder = self.workdir / "data" / name
        complete = folder / _COMPLETE
        text = json.dumps(identity(name))
        if complete.exists() and complete.read_text() == text:
            return folder
        maker, groups = _find_maker(name)
        with locked(folder.with_name(f"{name}.lock")):
            if not (complete.exists() and complete.read_text() == text):
                self._begin(folder, text)
                begin = time.monotonic()
                maker(self, folder, *groups)
                write_bytes(complete, text.encode())
                logging.info("data '%s': %.0f s", name, time.monotonic() - begin)
        return folder

    def model_for(self, name: str) -> pathlib.Path:
        """Returns the work directory of the student that a variant is made with."""
        made_with = _made_with(name)
        assert made_with is not None, name
        return self.model_of(*made_with)

    def _begin(self, folder: pathlib.Path, text: str) -> None:
        """Keeps a folder begun by the same rules, where commands resume; empties any other."""
        begun = folder.with_name(f"{folder.name}.begun.json")
        if folder.exists() and not (begun.exists() and begun.read_text() == text):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _COMPLETE).unlink(missing_ok=True)
        write_bytes(begun, text.encode())


def identity(name: str) -> dict:
    """Returns what determines a variant as JSON data; if the identity changes, so do the data."""
    if name == GIVEN:
        return {"name": name}
    _find_maker(name)
    heads = {"heads": "early"} if re.fullmatch(_OF_EARLY_HEADS, name) else {}
    made_with = _made_with(name)
    model = {}
    if made_with is not None:
        experiment = EXPERIMENTS[made_with[0]]
        config = {**STUDENTS[experiment.student].config, **experiment.config}
        trained_on = identity(experiment.data.format(seed=made_with[1]))
        model = {"model": {"config": config, "data": trained_on}}
    if name == "emoji_labelled":  # its vocabulary depends on two thousand different captions
        return {"name": name, "caption_rules": RULES_VERSION, **heads}
    if name.startswith("second_"):
        digest = _digest_of_second_web()
        return {"name": name, "web": digest, "caption_rules": RULES_VERSION, **model}
    if name.startswith("clipart"):
        return {"name": name, "held_out": clipart.digest(), "caption_rules": RULES_VERSION, **model}
    if name.startswith(("amount_", "drawn_")):
        digest = _digest_of_web()
        return {"name": name, "web": digest, "caption_rules": RULES_VERSION, **model}
    if name == "openmoji" or name.startswith("concepts_"):
        return {"name": name, "held_out": concepts.NUM_HELD_OUT}
    if name.startswith(("emoji", "cifar10", "photos")):
        return {"name": name, "caption_rules": SAME_SINCE_RULES, **heads, **model}
    return {
        "name": name,
        "pairs": WEB_PAIRS,
        "scenes": NUM_SCENES,
        "web": _digest_of_web(),
        "caption_rules": SAME_SINCE_RULES,
        **model,
    }


def _made_with(name: str) -> tuple[str, int] | None:
    """Returns the experiment and the seed of the student that a variant is made with, if any."""
    for pattern, experiment in _MADE_WITH.items():
        found = re.fullmatch(pattern, name)
        if found:
            return experiment, int(found.group(1)) if found.groups() else 0
    return None


@functools.cache
def _digest_of_web() -> str:
    """Hashes settings, scenes and sentences of a few pairs, not pixels: they depend on Pillow."""
    settings = web.Settings()
    pairs = [
        web.make_pair(settings, split, index)
        for split in ("train", "val_retrieval", "val_shape")
        for index in range(8)
    ]
    texts = [{"key": pair.key, "caption": pair.caption} for pair in pairs]
    facts = [{**pair.metadata, "sha256": pair.caption} for pair in pairs]
    text = json.dumps([settings.noise, *map(dict.__or__, texts, facts)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _digest_of_second_web() -> str:
    return hashlib.sha256(second_web.first_captions().encode()).hexdigest()[:16]


def _find_maker(name: str) -> tuple[Callable, tuple[str, ...]]:
    for pattern, maker in MAKERS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return maker, match.groups()
    raise ValueError(f"data '{name}': no variant has such a name; known: {', '.join(MAKERS)}")
