"""The keys of a training recipe: defaults, ranges, and what a resumed run may change.

Each key is defined once, here. Settings of losses and of terms of the objective are in their own
files (`diht_jax/losses/`, `diht_jax/training/terms/`), as a `Key` if they have a range. Sizes of
models are in `diht_jax/models/zoo.py`. `diht_jax.training.recipe` combines all of them.
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

# Whether a resumed run may change a key. FIXED: never. END: it only affects the end of a run, and
# `optimizer.schedule="wsd"` allows changing it. FREE: always.
FIXED, END, FREE = "fixed", "end", "free"


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float  # smallest value
    high: float = sys.float_info.max  # largest value; any finite number by default
    excludes_low: bool = False  # whether `low` itself is outside
    excludes_high: bool = False  # whether `high` itself is outside
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
    """Allowed words."""

    def __str__(self) -> str:
        return "one of " + ", ".join(self)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config."""

    default: Any  # value, or the type of a key that is not set by default
    # Allowed values of a number or word, or of each number in a tuple: two, the lower first, or any
    # if the default is empty.
    range: Range | OneOf | None = None
    resume: str = FIXED  # FIXED, END or FREE
    # Whether the hosts of a job may have different values, such as local paths.
    per_host: bool = False


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, excludes_low=True)
POSITIVE_OR_INF = Range(0, math.inf, excludes_low=True)
SHARE = Range(0, 1, excludes_high=True)
SHARE_NOT_0 = Range(0, 1, excludes_low=True)
DEVICES = Range(1, also=-1)
FLOATS = OneOf(("float32", "bfloat16", "float16"))

# Units of durations, and the keys of each duration, of which a recipe sets one.
DURATION_UNITS = ("steps", "examples", "epochs")
DURATIONS = {
    prefix: [f"{prefix}_{unit}" for unit in DURATION_UNITS]
    for prefix in ("total", "no_patch_dropout")
}

KEYS: dict[str, Key] = {
    "seed": Key(0, Range(0, 2**32, excludes_high=True)),  # of initialisation, order, crops
    # Length of the run: exactly one of the three.
    "total_steps": Key(int, COUNT, END),
    "total_examples": Key(int, COUNT, END),  # instead of steps
    "total_epochs": Key(float, POSITIVE, END),  # instead of steps
    # The last part of the run, trained without patch dropout: at most one of the three.
    "no_patch_dropout_steps": Key(int, COUNT, END),
    "no_patch_dropout_examples": Key(int, COUNT, END),  # instead of steps
    "no_patch_dropout_epochs": Key(float, POSITIVE, END),  # instead of steps
    # Global examples per forward and backward pass, with the exact gradient of the whole
    # batch (GradCache); None processes the whole batch at once.
    "micro_batch": Key(int, COUNT, FREE),
    # Name of a model in diht_jax.models.zoo.
    "model.name": Key("diht_vitb32_224px"),
    # Dtype of the computation; softmax, LayerNorm statistics and losses stay float32.
    "model.dtype": Key("bfloat16", FLOATS),
    "model.param_dtype": Key("float32", FLOATS),  # also that of the optimiser's state
    # Fraction of patches dropped in training (FLIP, arXiv 2212.00794).
    "model.patch_dropout": Key(0.0, SHARE),
    # Compiles one block for all layers (scan); parameters stay per layer.
    "model.scan_layers": Key(False, resume=FREE),
    # Rematerialisation: what a block recomputes in the backward pass, docs/guides/train/memory.md.
    "model.remat": Key("none", OneOf(("none", "dots", "minimal", "full")), FREE),
    # "auto" is "pallas" on TPUs, "cudnn" on NVIDIA GPUs, and "xla" elsewhere.
    "model.attention": Key("auto", OneOf(("auto", "xla", "cudnn", "pallas")), FREE),
    # Work directory, weight file or model name. A new run starts with its parameters and
    # architecture: docs/guides/train/finetuning.md.
    "model.init_from": Key(str, per_host=True),
    # Image preprocessing; not set: that of the model of `init_from`, or else CLIP's.
    "model.pictures.mean": Key(tuple),  # per channel, for values in [0, 1]
    "model.pictures.std": Key(tuple),  # likewise
    # In evaluation: "crop" (scale the short side, crop the centre) or "squash" (scale both sides).
    "model.pictures.resize": Key(str),
    "model.pictures.interpolation": Key(str),  # "bicubic" or "bilinear"
    # Folder with the files of a tokenizer, such as tokenizer.json. The run keeps a copy. Not set:
    # the tokenizer of the model of `init_from`, or else CLIP's.
    "model.tokenizer": Key(str, per_host=True),
    # Cleaning of texts before such a tokenizer, as in open_clip.
    "model.text_cleaning": Key(str, OneOf(("none", "whitespace", "lower", "canonicalize"))),
    # Number of the recipe's stages, which are trained in sequence; None: it has no stages.
    # docs/guides/train/stages.md
    "stage.count": Key(int, COUNT, FREE),
    # Stage to train, from 1, set by the recipe's argument `stage`; None: all stages.
    "stage.number": Key(int, COUNT),
    # Work directory of the previous stage, from which a new run takes parameters and data position.
    # None: the one next to this stage's, as named by diht_jax.train.
    "stage.previous": Key(str, resume=FREE, per_host=True),
    # Low-rank adapters (LoRA), which freeze all other parameters: docs/guides/train/finetuning.md.
    "lora.rank": Key(0, NOT_NEGATIVE),  # 0: no adapters
    "lora.alpha": Key(16.0, POSITIVE),  # the adapters' product is scaled by alpha / rank
    "lora.towers": Key(("vision", "text")),  # towers with adapters
    "lora.matrices": Key(("in_proj", "out_proj", "fc_in", "fc_out")),  # with adapters, per block
    # Name of a loss in diht_jax.losses.registry: "softmax" (InfoNCE, HN-NCE), "sigmoid" (SigLIP)
    # or "fastclip" (small batches).
    "loss.kind": Key("softmax"),
    # "streaming" (memory [b, d]), "gathered" ([b, N], fewer transfers), or "auto", which chooses by
    # the mesh and the batch: losses/dense.py.
    "loss.impl": Key("auto", OneOf(("auto", "streaming", "gathered")), FREE),
    # Weight of the contrastive loss relative to the terms below; 0 trains with those terms only.
    "loss.weight": Key(1.0, NOT_NEGATIVE),
    # Fraction of pairs that may be wrong. Losses are weighted by the probability that a pair is
    # right. 0: equal weights.
    "loss.noise_share": Key(0.0, Range(0, 0.5)),
    # Number of records for which "fastclip" keeps a running mean; None: all records of the data.
    "loss.num_records": Key(int, Range(1, 2**31, excludes_high=True), FREE),
    # Sizes of leading parts of the embeddings, such as (64, 128, 256). Each has its own loss and
    # weight; empty weights mean 1, the weight of the whole embeddings.
    "matryoshka.sizes": Key(()),
    "matryoshka.weights": Key((), NOT_NEGATIVE),  # one for each size
    # "muon" uses orthogonalised updates for the matrices of blocks.
    "optimizer.kind": Key("adamw", OneOf(("adamw", "muon"))),
    "optimizer.learning_rate": Key(1e-3, NOT_NEGATIVE),  # peak
    # After the warm-up: "cosine", or "wsd", which keeps the peak until the last `decay_steps`.
    "optimizer.schedule": Key("cosine", OneOf(("cosine", "wsd"))),
    "optimizer.warmup_steps": Key(2000, NOT_NEGATIVE),  # of a linear rise from 0 to the peak
    "optimizer.decay_steps": Key(int, COUNT, END),  # decay of "wsd", at the end of the run
    "optimizer.final_learning_rate": Key(0.0, NOT_NEGATIVE, END),  # after the last step
    "optimizer.b1": Key(0.9, SHARE),  # decay of AdamW's first moment
    "optimizer.b2": Key(0.98, SHARE),  # decay of AdamW's second moment
    "optimizer.eps": Key(1e-6, POSITIVE),  # added to AdamW's denominator
    "optimizer.weight_decay": Key(0.1, NOT_NEGATIVE),  # on matrices only
    "optimizer.clip_global_norm": Key(1.0, POSITIVE_OR_INF),  # of the gradients; inf: no limit
    "optimizer.max_logit_scale": Key(100.0, POSITIVE_OR_INF),  # after exp
    # Regular expressions of frozen parameters: ("^vision/",) is LiT.
    "optimizer.frozen": Key(()),
    # (pattern, learning-rate factor, weight-decay factor); the first that matches a name applies.
    "optimizer.multipliers": Key(()),
    # Learning rate of a block relative to the block above it, in both towers; None: equal rates.
    "optimizer.layer_decay": Key(float, SHARE_NOT_0),
    "optimizer.muon.momentum": Key(0.95, SHARE),  # decay of Muon's mean gradient
    # RMS of an update. 0.2 matches AdamW, whose learning rate and weight decay then carry over.
    "optimizer.muon.rms": Key(0.2, POSITIVE),
    # Decay of the parameters' moving average (EMA); None disables it.
    "ema.decay": Key(float, SHARE),
    # Devices along the data axis; -1 takes the remaining devices.
    "mesh.data": Key(-1, DEVICES, FREE),
    "mesh.fsdp": Key(1, DEVICES, FREE),  # devices that shard parameters and optimiser state
    # Topology that the recipe is meant for, as --topology of diht_jax.compile: "v5e:16x16".
    "topology": Key(str, resume=FREE),
    # Required. Directory, glob or list of record shards, or several sources as name ->
    # dict(path=..., weight=...): records/train_data.py.
    "data.train": Key(PathsOrSections, resume=FREE, per_host=True),
    # Output folder of data_prep.label with labels of these records; None: in the records.
    "data.labels": Key(str, resume=FREE, per_host=True),
    # Fraction of the records held out from training; 0: none. The task "validation" is retrieval on
    # them, and `checkpoint.best_metric` may name it: "validation/t2i_r10".
    "data.validation_share": Key(0.0, SHARE),
    "data.batch_size": Key(65536, COUNT),  # global
    # Decoding processes; None: one per core available to this process; 0 decodes in threads.
    "data.num_workers": Key(int, NOT_NEGATIVE, FREE, per_host=True),
    # Order of the records: "global" (a permutation of all records per epoch), "blocks" (blocks of
    # consecutive records, for object stores), or "auto", which is "blocks" for data at a URL.
    "data.order": Key("auto", OneOf(("auto", "global", "blocks"))),
    "data.block_records": Key(256, COUNT),  # K, records per request
    "data.num_streams": Key(1024, COUNT),  # V; divides the batch, and the hosts divide it
    "data.window_blocks": Key(16, COUNT),  # W per stream: a batch draws from V * W * K records
    # Batches that the workers of a host decode ahead, in total.
    "data.prefetch_batches": Key(2, COUNT, FREE, per_host=True),
    # Memory limit of waiting decoded examples; None: the free memory. The log states their size.
    "data.max_in_flight_gib": Key(float, POSITIVE, FREE, per_host=True),
    # Folder for blocks prefetched from an object store; not set: shared memory.
    "data.cache_dir": Key(str, resume=FREE, per_host=True),
    # Limit of these blocks on each host; None: half of the free space there, and for shared memory
    # at most a quarter of the free memory. The log states their size. If this key or the folder is
    # set, all blocks are kept if they fit.
    "data.read_ahead_gib": Key(float, POSITIVE, FREE, per_host=True),
    # Concurrent block requests of a host.
    "data.read_threads": Key(32, COUNT, FREE, per_host=True),
    # How long a store may fail before the run ends.
    "data.read_timeout_secs": Key(600.0, POSITIVE, FREE, per_host=True),
    # Relative area of RandomResizedCrop, lowest and highest.
    "data.crop_scale": Key((0.9, 1.0), SHARE_NOT_0),
    # Decodes JPEG at a reduced scale, and resizes with cykooz-resizer; False: exactly as Pillow.
    "data.fast_decode": Key(True),
    "data.text_template": Key("{caption}"),  # input of the text tower
    # For a record with several captions: "first", or "sample" to draw one at every visit.
    "data.captions": Key("first", OneOf(("first", "sample"))),
    # Sampling weights by kind of caption, such as "alt=1,synthetic=3". In a section, weights may be
    # schedules, as for sources. Not set: all captions of a record are equally likely.
    "data.caption_weights": Key(TextOrSections),
    # Further captions from metadata columns, by kind, such as "synthetic=re_caption".
    "data.caption_columns": Key(""),
    # Number of consecutive sentences of a caption in an example, drawn at every visit of a record;
    # 0: all sentences.
    "data.caption_sentences": Key(0, NOT_NEGATIVE),
    # Number of consecutive words of these sentences, likewise; words are separated by spaces.
    "data.caption_words": Key(0, NOT_NEGATIVE),
    # Metadata key that names a class, such as "class_name". Records with the same value are equal
    # pairs (loss.equal_pairs); records without it are equal if their texts are.
    "data.class_key": Key(str),
    # For an unreadable record: "error", or "skip" to count it and replace it by another record.
    "data.on_bad_record": Key("error", OneOf(("error", "skip")), FREE),
    # Continues although the shards have changed since the checkpoint was saved.
    "data.allow_changed": Key(False, resume=FREE),
    # Makes a resumed run bit-identical on GPUs, but slower: XLA uses kernels with a fixed order of
    # summation, and the work directory records the chosen kernels. Not needed on CPUs and TPUs.
    "deterministic": Key(False, resume=FREE),
    # Folder of XLA's persistent compilation cache; empty: every start compiles.
    "compilation_cache": Key("~/.cache/diht_jax/compiled", resume=FREE, per_host=True),
    # Size limit of the cache, which deletes the least recently used programs; inf: no limit.
    "compilation_cache_max_gib": Key(10.0, POSITIVE_OR_INF, FREE, per_host=True),
    "log_every_steps": Key(50, COUNT, FREE),  # interval of lines in metrics.jsonl
    # Trackers in addition to metrics.jsonl: "tensorboard", "wandb", "trackio".
    "trackers": Key(("tensorboard",), resume=FREE),
    "tracking.project": Key(str, resume=FREE),  # project in W&B and trackio; None: "diht_jax"
    "tracking.name": Key(str, resume=FREE),  # name of the run there; None: the work directory's
    # The run ends after this many consecutive updates with non-finite numbers.
    "max_skipped_steps": Key(10, COUNT, FREE),
    # Ends the run at the first non-finite update; the error names where the numbers arise.
    "debug_nans": Key(False, resume=FREE),
    # First step to profile.
    "profile.start_step": Key(int, COUNT, FREE),
    "profile.stop_step": Key(int, COUNT, FREE),  # last step to profile
    "checkpoint.every_steps": Key(1000, COUNT, FREE),  # also before evaluations and at the end
    "checkpoint.keep_last": Key(3, COUNT, FREE),  # older ones are deleted
    # Staging folder on disk for runs in s3:// and similar; None: ~/.cache/diht_jax/staging.
    # Hosts of one job must share it. If set, it is also used for gs://.
    "checkpoint.staging": Key(str, resume=FREE, per_host=True),
    # Evaluation result that selects the best checkpoint, such as "cifar10/top1"; None keeps the
    # last checkpoints only.
    "checkpoint.best_metric": Key(str, resume=FREE),
    "evaluation.every_steps": Key(int, NOT_NEGATIVE, FREE),  # None or 0: only at the end
    # name -> dict(kind=..., source=..., OPTION=...), such as tasks.pets = dict(kind="retrieval",
    # source="/data/pets.tar"); or a comma-separated text, as --tasks of diht_jax.evaluate.
    "evaluation.tasks": Key(TextOrSections, resume=FREE, per_host=True),
    "evaluation.batch_size": Key(512, COUNT, FREE),  # images or texts per batch, over all devices
    # Evaluates the moving average of the parameters.
    "evaluation.use_ema": Key(False, resume=FREE),
}


def build_config(keys: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns a config with the defaults of some keys.

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
    """Checks the numbers and words of a config or a section against the ranges of its keys.

    Args:
        config: config with names and types checked by `validate_config`.
        keys: dotted name -> `Key`. None is accepted for a key that is not set by default. Other
            entries have no range.

    Raises:
        ValueError: names the first key with a value outside its range, and the range.
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
