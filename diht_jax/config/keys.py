"""The keys of a training recipe: default, range, and what a resumed run may change.

Each key is written once, here. The settings of losses and of terms of the objective are in their
own files (`diht_jax/losses/`, `diht_jax/training/terms/`), as a `Key` where they have a range, and
the sizes of models in `diht_jax/models/zoo.py`; `diht_jax.training.recipe` puts all of them
together.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from diht_jax.config.checks import PathsOrSections, TextOrSections, TextOrSectionsReference, walk

# What a resumed run may change of a key. FIXED: nothing. END: it decides about the end of a run
# alone, which `optimizer.schedule="wsd"` leaves open. FREE: anything.
FIXED, END, FREE = "fixed", "end", "free"


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float  # the least
    high: float = sys.float_info.max  # the greatest; any finite number by default
    excludes_low: bool = False  # `low` itself is outside
    excludes_high: bool = False  # `high` itself is outside
    also: float | None = None  # an extra allowed value

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.excludes_low else value >= self.low
        below = value < self.high if self.excludes_high else value <= self.high
        return value == self.also or (above and below)

    def __str__(self) -> str:
        text = f"more than {self.low}" if self.excludes_low else f"at least {self.low}"
        if self.high < sys.float_info.max:
            text += (" and less than " if self.excludes_high else ", at most ") + str(self.high)
        return text if self.also is None else f"{self.also}, or {text}"


class OneOf(tuple[str, ...]):
    """Some words."""

    def __str__(self) -> str:
        return "one of " + ", ".join(self)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config."""

    default: Any  # its value, or the type of a key that is not set by default
    # Of a number or a word. A tuple has it for each number: two from low to high, or any where the
    # default has none.
    range: Range | OneOf | None = None
    resume: str = FIXED  # FIXED, END or FREE
    # The hosts of a job may have different values, such as paths of their own.
    per_host: bool = False


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, excludes_low=True)
POSITIVE_OR_INF = Range(0, math.inf, excludes_low=True)
SHARE = Range(0, 1, excludes_high=True)
SHARE_NOT_0 = Range(0, 1, excludes_low=True)
DEVICES = Range(1, also=-1)
FLOATS = OneOf(("float32", "bfloat16", "float16"))

# Units of a duration, and the keys of each duration; a recipe sets one of them.
DURATION_UNITS = ("steps", "examples", "epochs")
DURATIONS = {
    prefix: [f"{prefix}_{unit}" for unit in DURATION_UNITS]
    for prefix in ("total", "no_patch_dropout")
}

KEYS: dict[str, Key] = {
    "seed": Key(0, Range(0, 2**32, excludes_high=True)),  # of parameters, order, crops
    # Length of the run: exactly one of the three.
    "total_steps": Key(int, COUNT, END),
    "total_examples": Key(int, COUNT, END),  # instead of steps
    "total_epochs": Key(float, POSITIVE, END),  # instead of steps
    # The last part of the run, trained without patch dropout: at most one of the three.
    "no_patch_dropout_steps": Key(int, COUNT, END),
    "no_patch_dropout_examples": Key(int, COUNT, END),  # instead of steps
    "no_patch_dropout_epochs": Key(float, POSITIVE, END),  # instead of steps
    # Examples (global) embedded and back-propagated at once, with the exact gradient of the whole
    # batch (GradCache); None takes the whole batch at once.
    "micro_batch": Key(int, COUNT, FREE),
    # A name of diht_jax.models.zoo.
    "model.name": Key("diht_vitb32_224px"),
    # Of the computation; softmax, LayerNorm statistics and losses stay float32.
    "model.dtype": Key("bfloat16", FLOATS),
    "model.param_dtype": Key("float32", FLOATS),  # and of the optimiser's state
    # Share of patches left out in training (FLIP, arXiv 2212.00794).
    "model.patch_dropout": Key(0.0, SHARE),
    # One compiled block for all layers; parameters stay per layer.
    "model.scan_layers": Key(False, resume=FREE),
    # Values that a block computes again in the backward pass: see docs/guides/train/memory.md.
    "model.remat": Key("none", OneOf(("none", "dots", "minimal", "full")), FREE),
    # "auto": "pallas" on TPUs, "cudnn" on NVIDIA GPUs, else "xla".
    "model.attention": Key("auto", OneOf(("auto", "xla", "cudnn", "pallas")), FREE),
    # Work directory, weight file or name of a model whose parameters and architecture a new run
    # starts with: docs/guides/train/finetuning.md.
    "model.init_from": Key(str, per_host=True),
    # Preprocessing of pictures: where not set that of the model of `init_from`, or else CLIP's.
    "model.pictures.mean": Key(tuple),  # per channel, for values in [0, 1]
    "model.pictures.std": Key(tuple),  # likewise
    # In evaluation: "crop" (short side scaled, centre cropped) or "squash" (both sides scaled).
    "model.pictures.resize": Key(str),
    "model.pictures.interpolation": Key(str),  # "bicubic" or "bilinear"
    # Folder with the files of a tokenizer, such as tokenizer.json: where not set that of the model
    # of `init_from`, or else CLIP's. The run keeps a copy.
    "model.tokenizer": Key(str, per_host=True),
    # Of texts before such a tokenizer, as open_clip.
    "model.text_cleaning": Key(str, OneOf(("none", "whitespace", "lower", "canonicalize"))),
    # Stages of the recipe, which are trained one after the other; None: it has none.
    # docs/guides/train/stages.md
    "stage.count": Key(int, COUNT, FREE),
    # Of the stage to train, from 1, as the recipe's argument `stage` sets it; None: all of them.
    "stage.number": Key(int, COUNT),
    # Work directory of the stage before, whose parameters and place in the data a new run takes;
    # None: the one next to this stage's, as diht_jax.train names them.
    "stage.previous": Key(str, resume=FREE, per_host=True),
    # Low-rank adapters; nothing else of the model is trained then: docs/guides/train/finetuning.md.
    "lora.rank": Key(0, NOT_NEGATIVE),  # 0: no adapters
    "lora.alpha": Key(16.0, POSITIVE),  # the adapters' product counts alpha / rank times
    "lora.towers": Key(("vision", "text")),  # that get adapters
    "lora.matrices": Key(("in_proj", "out_proj", "fc_in", "fc_out")),  # of each block
    # A name of diht_jax.losses.registry: "softmax" (InfoNCE, HN-NCE), "sigmoid" (SigLIP)
    # or "fastclip" (small batches).
    "loss.kind": Key("softmax"),
    # "streaming" (memory [b, d]), "gathered" ([b, N], fewer transfers), or "auto", by the mesh and
    # the batch: losses/dense.py.
    "loss.impl": Key("auto", OneOf(("auto", "streaming", "gathered")), FREE),
    # Weight of the contrastive loss next to the terms below; 0 trains these alone.
    "loss.weight": Key(1.0, NOT_NEGATIVE),
    # Share of pairs that may be wrong, at most half of them: losses count by how likely a pair is
    # right. 0: all alike.
    "loss.noise_share": Key(0.0, Range(0, 0.5)),
    # Records of which "fastclip" keeps a mean; None: as many as the data have.
    "loss.num_records": Key(int, Range(1, 2**31, excludes_high=True), FREE),
    # Sizes of leading parts of the embeddings, such as (64, 128, 256), that have a loss of their
    # own, each with a weight; () weighs them like the whole embeddings, by 1.
    "matryoshka.sizes": Key(()),
    "matryoshka.weights": Key((), NOT_NEGATIVE),  # one for each size
    # "muon": orthogonal updates for the matrices of blocks.
    "optimizer.kind": Key("adamw", OneOf(("adamw", "muon"))),
    "optimizer.learning_rate": Key(1e-3, NOT_NEGATIVE),  # peak
    # After the warm-up: "cosine", or "wsd": the peak until the last `decay_steps`.
    "optimizer.schedule": Key("cosine", OneOf(("cosine", "wsd"))),
    "optimizer.warmup_steps": Key(2000, NOT_NEGATIVE),  # the rate rises from 0 to its peak
    "optimizer.decay_steps": Key(int, COUNT, END),  # of "wsd", at the end of the run
    "optimizer.final_learning_rate": Key(0.0, NOT_NEGATIVE, END),  # after the last step
    "optimizer.b1": Key(0.9, SHARE),  # decay of AdamW's mean of gradients
    "optimizer.b2": Key(0.98, SHARE),  # and of the mean of their squares
    "optimizer.eps": Key(1e-6, POSITIVE),  # added to AdamW's divisor
    "optimizer.weight_decay": Key(0.1, NOT_NEGATIVE),  # on matrices only
    "optimizer.clip_global_norm": Key(1.0, POSITIVE_OR_INF),  # of the gradients; inf: no limit
    "optimizer.max_logit_scale": Key(100.0, POSITIVE_OR_INF),  # after exp
    # Patterns (regular expressions) of parameters that stay as they are: ("^vision/",) is LiT.
    "optimizer.frozen": Key(()),
    # (pattern, learning-rate factor, weight-decay factor); the first found in a name counts.
    "optimizer.multipliers": Key(()),
    # Learning rate of a block relative to the one above it, in both towers; None: all the same.
    "optimizer.layer_decay": Key(float, SHARE_NOT_0),
    "optimizer.muon.momentum": Key(0.95, SHARE),  # decay of Muon's mean of gradients
    # Root mean square of an update; that of AdamW's, so that rate and decay keep their values.
    "optimizer.muon.rms": Key(0.2, POSITIVE),
    # Decay of the parameters' moving average; None keeps none.
    "ema.decay": Key(float, SHARE),
    # Devices along the axis; -1 takes those that are left.
    "mesh.data": Key(-1, DEVICES, FREE),
    "mesh.fsdp": Key(1, DEVICES, FREE),  # that share the parameters and the optimiser's state
    # The machine that the recipe is meant for, as --topology of diht_jax.compile: "v5e:16x16".
    "topology": Key(str, resume=FREE),
    # Directory, glob or list of record shards; or several sources, name -> dict(path=...,
    # weight=...): records/train_data.py. Must be set.
    "data.train": Key(PathsOrSections, resume=FREE, per_host=True),
    # Folder of data_prep.label with the labels of these records; None: they are in the records.
    "data.labels": Key(str, resume=FREE, per_host=True),
    # Share of the records that are not trained on; 0: none. The task "validation" is retrieval on
    # them, which `checkpoint.best_metric` may name: "validation/t2i_r10".
    "data.validation_share": Key(0.0, SHARE),
    "data.batch_size": Key(65536, COUNT),  # global
    # Decoding processes; None: one for each core that this process may use; 0 decodes in threads.
    "data.num_workers": Key(int, NOT_NEGATIVE, FREE, per_host=True),
    # Order of the records: "global" (every epoch a permutation of all records), "blocks" (of
    # consecutive records, as object stores need it), or "auto": blocks where the data has a URL.
    "data.order": Key("auto", OneOf(("auto", "global", "blocks"))),
    "data.block_records": Key(256, COUNT),  # K, records that one request brings
    "data.num_streams": Key(1024, COUNT),  # V, of blocks; divides the batch, the hosts divide it
    "data.window_blocks": Key(16, COUNT),  # W per stream: a batch draws from V * W * K records
    # Batches of this host decoded ahead, by all workers together.
    "data.prefetch_batches": Key(2, COUNT, FREE, per_host=True),
    # Bound of the decoded examples that wait; None: the free memory. The log says what they take.
    "data.max_in_flight_gib": Key(float, POSITIVE, FREE, per_host=True),
    # Blocks of an object store are fetched ahead, and wait in shared memory, or in this folder.
    "data.cache_dir": Key(str, resume=FREE, per_host=True),
    # Bound of these blocks on each host; None: half of the free space there, and of shared memory
    # at most a quarter of the free memory. The log says what they take. Where this or a folder is
    # set, all blocks stay if they fit.
    "data.read_ahead_gib": Key(float, POSITIVE, FREE, per_host=True),
    # Blocks that a host requests at the same time.
    "data.read_threads": Key(32, COUNT, FREE, per_host=True),
    # Time for which a store may fail before the run ends.
    "data.read_timeout_secs": Key(600.0, POSITIVE, FREE, per_host=True),
    # Area of RandomResizedCrop, lowest and highest.
    "data.crop_scale": Key((0.9, 1.0), SHARE_NOT_0),
    # JPEG decoded at a reduced scale, and scaled by cykooz-resizer; False: Pillow, exactly.
    "data.fast_decode": Key(True),
    "data.text_template": Key("{caption}"),  # what the text tower reads
    # For a record with several captions: "first", or "sample" to draw one each time it comes.
    "data.captions": Key("first", OneOf(("first", "sample"))),
    # By kind, such as "alt=1,synthetic=3", or a section whose weights may be schedules, as those of
    # sources are; not set: each caption of a record is as likely as the others.
    "data.caption_weights": Key(TextOrSections),
    # More captions in columns of the metadata, by kind, such as "synthetic=re_caption".
    "data.caption_columns": Key(""),
    # Sentences of a caption that an example has, in a row and drawn each time the record comes; 0:
    # all of them.
    "data.caption_sentences": Key(0, NOT_NEGATIVE),
    # Words of that, likewise; words are what spaces divide.
    "data.caption_words": Key(0, NOT_NEGATIVE),
    # Key of the records' metadata that names a class, such as "class_name": records that agree in
    # it are equal pairs (loss.equal_pairs), those without it are equal by their texts.
    "data.class_key": Key(str),
    # A record that cannot be read: "error", or "skip" to replace it by another one, and count it.
    "data.on_bad_record": Key("error", OneOf(("error", "skip")), FREE),
    # Go on although the shards have changed since the checkpoint was saved.
    "data.allow_changed": Key(False, resume=FREE),
    # On GPUs, XLA takes kernels that sum in one order, and the work directory keeps which were
    # chosen, so that a resumed run is bit-identical there too; slower. CPUs and TPUs need it not.
    "deterministic": Key(False, resume=FREE),
    # Folder where compiled programs are kept for the next start; empty: every start compiles.
    "compilation_cache": Key("~/.cache/diht_jax/compiled", resume=FREE, per_host=True),
    # The least recently used programs are deleted; inf: none are.
    "compilation_cache_max_gib": Key(10.0, POSITIVE_OR_INF, FREE, per_host=True),
    "log_every_steps": Key(50, COUNT, FREE),  # a line of metrics.jsonl
    # Where metrics go in addition to metrics.jsonl: "tensorboard", "wandb", "trackio".
    "trackers": Key(("tensorboard",), resume=FREE),
    "tracking.project": Key(str, resume=FREE),  # of W&B and trackio; None: "diht_jax"
    "tracking.name": Key(str, resume=FREE),  # of the run there; None: that of the work directory
    # This many updates in a row with numbers that are not finite end the run.
    "max_skipped_steps": Key(10, COUNT, FREE),
    # The first update with such numbers ends the run, and the error names where they begin.
    "debug_nans": Key(False, resume=FREE),
    # Profiles these steps, both included.
    "profile.start_step": Key(int, COUNT, FREE),
    "profile.stop_step": Key(int, COUNT, FREE),  # the last one
    "checkpoint.every_steps": Key(1000, COUNT, FREE),  # also before evaluations and at the end
    "checkpoint.keep_last": Key(3, COUNT, FREE),  # older ones are deleted
    # Where a run in s3:// and the like works on disk; None: ~/.cache/diht_jax/staging. Hosts of one
    # job must share it. With a folder given, gs:// goes by way of it as well.
    "checkpoint.staging": Key(str, resume=FREE, per_host=True),
    # Evaluation result that the best checkpoint is kept by, such as "cifar10/top1"; None keeps the
    # last checkpoints only.
    "checkpoint.best_metric": Key(str, resume=FREE),
    "evaluation.every_steps": Key(int, NOT_NEGATIVE, FREE),  # None and 0: at the end only
    # name -> dict(kind=..., source=..., OPTION=...), such as tasks.pets = dict(kind="retrieval",
    # source="/data/pets.tar"); or a text with commas, as --tasks of diht_jax.evaluate.
    "evaluation.tasks": Key(TextOrSections, resume=FREE, per_host=True),
    "evaluation.batch_size": Key(512, COUNT, FREE),  # images, or texts, over all devices
    # Evaluates the moving average of the parameters.
    "evaluation.use_ema": Key(False, resume=FREE),
}


def build_config(keys: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config with the defaults of some keys.

    Args:
        keys: dotted name -> `Key`, or the default of a key without a range.
    """
    nested: dict[str, Any] = {}
    for name, key in keys.items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        default = key.default if isinstance(key, Key) else key
        if not isinstance(default, type):
            section[last] = copy.deepcopy(default)  # configs share nothing
        elif issubclass(default, TextOrSections):
            value = ml_collections.ConfigDict() if default.is_set else None
            section[last] = TextOrSectionsReference(value, field_type=default)
        else:
            section[last] = placeholder(default)
    return ml_collections.ConfigDict(nested)


def check_ranges(
    config: ml_collections.ConfigDict, keys: Mapping[str, Any], prefix: str = "config."
) -> None:
    """Checks the numbers and words of a config, or of a section.

    Args:
        config: with names and types that `validate_config` has checked.
        keys: dotted name -> `Key`; None is right for a key that is not set by default. Other
            entries have no range.

    Raises:
        ValueError: names the first key whose value is outside of its range, and the range.
    """
    values = walk(config)
    for name, key in keys.items():
        if not isinstance(key, Key) or key.range is None:
            continue
        value = values[name][0] if name in values else None
        if isinstance(key.default, tuple):
            numbers = tuple(value or ())
            is_right = all(isinstance(n, int | float) and n in key.range for n in numbers)
            expected = "numbers"
            if key.default:
                expected = "two numbers, the lower first"
                is_right = is_right and len(numbers) == 2 and numbers[0] <= numbers[1]
            if not is_right:
                raise ValueError(f"{prefix}{name}={numbers}: expected {expected}, each {key.range}")
        elif (value is None and not isinstance(key.default, type)) or (
            value is not None and value not in key.range
        ):
            finite = "a finite number, " if value == math.inf else ""
            raise ValueError(f"{prefix}{name}={value}: expected {finite}{key.range}")
