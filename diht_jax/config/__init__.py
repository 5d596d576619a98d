"""Configs: the full set of training keys with their defaults, and their validation.

Recipes in `configs/` start from `default_config()`; commands call `validate_config` before
they do anything else. The keys of losses and of terms of the objective come from their own files.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import placeholder

DURATION_UNITS = ("steps", "examples", "epochs")

# Names of older versions, which recipes, command lines and work directories may still have.
RENAMED_KEYS = {f"unmasked_{unit}": f"no_patch_dropout_{unit}" for unit in DURATION_UNITS}

# Fields of models.zoo.Architecture and their types.
ARCHITECTURE_FIELDS = {
    "image_size": int,
    "patch_size": int,
    "vision_layers": int,
    "vision_width": int,
    "vision_heads": int,
    "text_layers": int,
    "text_width": int,
    "text_heads": int,
    "embed_dim": int,
    "context_length": int,
    "vocab_size": int,
    "activation": str,
    "layer_norm_epsilon": float,
    "vision_mlp_width": int,
    "text_mlp_width": int,
    "end_of_text_id": int,
}
_FIELD_NAMES = ", ".join(ARCHITECTURE_FIELDS)


class TextOrSections:
    """Type of a key that is a text, or a section of named sections that others check."""

    expected = "a text or a section of sections"
    kinds: tuple[type, ...] = (str, ml_collections.ConfigDict)

    @classmethod
    def reference(cls) -> ml_collections.FieldReference:
        """An empty section that a text may replace, and the other way round."""
        return _TextOrSectionsReference(ml_collections.ConfigDict(), field_type=cls)

    @classmethod
    def check(cls, value: Any) -> None:
        """Raises TypeError for a value of another kind; None is none."""
        if value is not None and not isinstance(value, cls.kinds):
            raise TypeError(f"expected {cls.expected}, got {type(value).__name__} {value!r:.200}")


class PathsOrSections(TextOrSections):
    """Type of a key that is a path, a list of paths, or a section of named sections."""

    expected = "a path, a list of paths or a section of sources"
    kinds = (*TextOrSections.kinds, list, tuple)

    @classmethod
    def reference(cls) -> ml_collections.FieldReference:
        """Not set."""
        return _TextOrSectionsReference(None, field_type=cls)


class _TextOrSectionsReference(ml_collections.FieldReference):
    def set(self, value: Any, type_safe: bool = True) -> None:
        if isinstance(value, dict):
            value = ml_collections.ConfigDict(value)
        self.get_type().check(value)
        super().set(value, type_safe=False)


class _TextOrSectionsParser(flags.ArgumentParser):
    """Of `--config.evaluation.tasks=TEXT`; the flag's default is the recipe's own value."""

    def parse(self, argument: Any) -> Any:
        return argument


for _kind in (TextOrSections, PathsOrSections):
    config_flags.register_flag_parser_for_type(_kind, _TextOrSectionsParser())


def default_config() -> ml_collections.ConfigDict:
    """Every key of a training recipe, with its default; None means "not set"."""
    # Here and not above: they import JAX, which is not needed to validate a config.
    from diht_jax.losses.registry import default_settings
    from diht_jax.training.terms.registry import TERMS

    c = ml_collections.ConfigDict()
    c.seed = 0
    # Exactly one of the three says how long to train.
    c.total_steps = placeholder(int)
    c.total_examples = placeholder(int)
    c.total_epochs = placeholder(float)
    # At most one of the three: the last part of the run, trained without patch dropout.
    c.no_patch_dropout_steps = placeholder(int)
    c.no_patch_dropout_examples = placeholder(int)
    c.no_patch_dropout_epochs = placeholder(float)
    # Examples (global) embedded and back-propagated at once, with the exact gradient of the whole
    # batch (GradCache); None takes the whole batch at once.
    c.micro_batch = placeholder(int)

    c.model = ml_collections.ConfigDict()
    c.model.name = "diht_vitb32_224px"  # a name of diht_jax.models.zoo
    c.model.dtype = "bfloat16"  # compute; softmax, LayerNorm statistics and losses stay float32
    c.model.param_dtype = "float32"
    c.model.patch_dropout = 0.0  # share of patches left out in training (FLIP, arXiv 2212.00794)
    c.model.scan_layers = False  # one compiled block for all layers; parameters stay per layer
    c.model.remat = "none"  # what a block computes again in the backward pass: see docs/training.md
    c.model.attention = "auto"  # "pallas" on TPUs, "cudnn" on NVIDIA GPUs, else "xla"
    # Texts that share a row of the text tower, for long contexts and short texts; 1: none do.
    c.model.texts_per_row = 1
    # Work directory, weight file or released name whose parameters a new run starts from; its
    # positions are resized to fit.
    c.model.init_from = placeholder(str)
    # Fields of models.zoo.Architecture to replace.
    c.model.overrides = ml_collections.ConfigDict(
        {field: placeholder(kind) for field, kind in ARCHITECTURE_FIELDS.items()}
    )

    # Low-rank adapters, which alone of the model are trained: models/lora.py, docs/finetuning.md.
    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0  # 0: no adapters
    c.lora.alpha = 16.0  # the adapters' product counts alpha / rank times
    c.lora.towers = ("vision", "text")
    c.lora.matrices = ("in_proj", "out_proj", "fc_in", "fc_out")  # of each block

    c.loss = ml_collections.ConfigDict()
    c.loss.kind = "softmax"  # of diht_jax.losses.registry: InfoNCE and HN-NCE; "sigmoid": SigLIP
    # How it is computed: "streaming" (memory [b, d]), "gathered" ([b, N], fewer transfers), or
    # "auto", by the mesh and the batch: losses/choice.py.
    c.loss.impl = "auto"
    # Of the contrastive loss in the sum with the terms below; 0 leaves these alone to be learnt.
    c.loss.weight = 1.0
    # Share of pairs that may be wrong, up to 0.5: losses count by how likely a pair is right, as
    # losses/noise.py has it. 0: all alike.
    c.loss.noise_share = 0.0
    c.loss.update(default_settings())  # such as alpha and beta; see losses/softmax.py

    # The loss of the first numbers of the embeddings as well, such as (64, 128, 256), each with a
    # weight; () weighs them like the whole embeddings, by 1: losses/nested.py.
    c.matryoshka = ml_collections.ConfigDict()
    c.matryoshka.sizes = ()
    c.matryoshka.weights = ()

    # Terms of the objective beside the contrastive loss: `concepts`; see training/objectives/.
    for name, term in TERMS.items():
        # Copied, for placeholders would be shared with every other config.
        c[name] = ml_collections.ConfigDict(copy.deepcopy(term.settings))

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.kind = "adamw"  # "muon": orthogonal updates for the matrices of blocks
    c.optimizer.learning_rate = 1e-3  # peak
    # After the warm-up: "cosine", or "wsd": the peak until the last `decay_steps`.
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000
    c.optimizer.decay_steps = placeholder(int)
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.98
    c.optimizer.eps = 1e-6
    c.optimizer.weight_decay = 0.1  # on matrices only
    c.optimizer.clip_global_norm = 1.0
    c.optimizer.max_logit_scale = 100.0
    # Patterns (regular expressions) of parameters that stay as they are: ("^vision/",) is LiT.
    c.optimizer.frozen = ()
    # (pattern, learning-rate factor, weight-decay factor); the first found in a name counts.
    c.optimizer.multipliers = ()
    # Learning rate of a block relative to the one above it, in both towers; None: all the same.
    c.optimizer.layer_decay = placeholder(float)
    c.optimizer.muon = ml_collections.ConfigDict()
    c.optimizer.muon.momentum = 0.95
    c.optimizer.muon.rms = 0.2  # of an update, as of AdamW's: rate and decay need no other values

    # Metrics of the gradient noise scale, from two backward passes over halves of the batch.
    c.gradient_noise = False

    c.ema = ml_collections.ConfigDict()
    c.ema.decay = placeholder(float)  # of the parameters' moving average; None keeps none

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices along the axis; -1 takes what is left
    c.mesh.fsdp = 1
    # What the recipe is meant for, as --topology of diht_jax.compile: "v5e:16x16", "local".
    c.topology = placeholder(str)

    c.data = ml_collections.ConfigDict()
    # Directory, glob or list of TFRecord shards; or several sources, name -> dict(path=...,
    # weight=...): records/train_data.py. Must be set.
    c.data.train = PathsOrSections.reference()
    # Folder of data_prep.label with the labels of these records; None: they are in the records.
    c.data.labels = placeholder(str)
    c.data.batch_size = 65536  # global
    # Decoding processes; None: one for each core that this process may use; 0 decodes in threads.
    c.data.num_workers = placeholder(int)
    # Which record comes when: "global" (every epoch a permutation of all records), "blocks" (of
    # consecutive records, as object stores need it), or "auto": blocks where the data has a URL.
    c.data.order = "auto"
    c.data.block_records = 256  # K, records that one request brings
    c.data.num_streams = 1024  # V, of blocks; divides the batch, and the hosts divide it
    c.data.window_blocks = 16  # W, that a stream mixes: a batch draws from V * W * K records
    c.data.prefetch_batches = 2  # batches of this host decoded ahead, by all workers together
    # Bound of the decoded examples that wait; None: what is free. The log has what they take.
    c.data.max_in_flight_gib = placeholder(float)
    # Blocks of an object store are fetched ahead, and wait in shared memory, or in this folder.
    c.data.cache_dir = placeholder(str)
    # Bound of these blocks on each host; None: half of what is free there, and of shared memory at
    # most a quarter of the free memory. The log has what they take.
    c.data.read_ahead_gib = placeholder(float)
    c.data.read_threads = 32  # blocks that a host requests at the same time
    c.data.read_timeout_secs = 600.0  # that a store may fail until the run ends
    c.data.crop_scale = (0.9, 1.0)  # area of RandomResizedCrop
    c.data.fast_decode = True  # reduced-scale JPEG decoding and OpenCV; False: Pillow, exactly
    c.data.text_template = "{caption}"
    # Of a record with several captions: "first", or "sample" to draw one each time it comes.
    c.data.captions = "first"
    # By kind, such as "alt=1,synthetic=3", or a section whose weights may be schedules, as those of
    # sources are; not set: each caption of a record is as likely as the others.
    c.data.caption_weights = TextOrSections.reference()
    # More captions in columns of the metadata, by kind, such as "synthetic=re_caption".
    c.data.caption_columns = ""
    # Key of the records' metadata that names a class, such as "class_name": records that agree in
    # it are equal pairs (loss.equal_pairs), those without it are equal by their texts.
    c.data.class_key = placeholder(str)
    # Texts of the same words are equal pairs, whatever their capitals, punctuation and articles.
    c.data.near_equal = False
    # A record that cannot be read: "error", or "skip" to replace it by another one, and count it.
    c.data.on_bad_record = "error"
    # Go on although the shards are others than when the checkpoint was saved.
    c.data.allow_changed = False

    # Folder where compiled programs are kept for the next start; empty: every start compiles.
    c.compilation_cache = "~/.cache/diht_jax/compiled"
    c.compilation_cache_max_gib = 10.0  # what was used least recently is deleted; inf: nothing is
    c.log_every_steps = 50
    # So many updates in a row with numbers that are not finite end the run.
    c.max_skipped_steps = 10
    # The first update with such numbers ends the run, and the error names where they begin.
    c.debug_nans = False
    c.profile = ml_collections.ConfigDict()
    c.profile.start_step = placeholder(int)  # profiles these steps, both included
    c.profile.stop_step = placeholder(int)
    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_steps = 1000
    c.checkpoint.keep_last = 3
    # Where a run in s3:// and the like works on disk; None: ~/.cache/diht_jax/staging. Hosts of one
    # job must share it. With a folder given, gs:// goes by way of it as well.
    c.checkpoint.staging = placeholder(str)
    # Such as "cifar10/top1"; None keeps the last ones only.
    c.checkpoint.best_metric = placeholder(str)
    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.every_steps = placeholder(int)  # None: at the end only
    # name -> dict(kind=..., source=..., OPTION=...), such as tasks.pets = dict(kind="retrieval",
    # source="/data/pets.tar"); or a text with commas, as --tasks of diht_jax.evaluate.
    c.evaluation.tasks = TextOrSections.reference()
    c.evaluation.batch_size = 512
    c.evaluation.use_ema = False  # evaluates the moving average of the parameters
    return c


def load_recipe(path: str | pathlib.Path, arg: str = "") -> ml_collections.ConfigDict:
    """The config that a recipe file's `get_config(arg)` returns.

    Args:
        path: a Python file such as `configs/emoji.py`.
        arg: what follows the colon on a command line, such as "debug=True".

    Raises:
        ValueError: no such file, or it gives no config.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{path}: no such config file; expected a path such as configs/emoji.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{path}: a config file must define get_config(); it does not")
    config = get_config(arg) if arg else get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"{path}: get_config() must return an ml_collections.ConfigDict, such as that of "
            f"diht_jax.config.default_config(); got {type(config).__name__}"
        )
    return config


def validate_config(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Checks names and types of every key of `config` against `defaults`.

    Args:
        config: what the recipe and the command line gave; `rename_old_keys` is applied to it.
        defaults: all known keys, but for those inside of a `TextOrSections`. None is accepted for
            every key but a section, and an int where a float stands; a default of None without a
            type accepts everything. The elements of a tuple must be of the type of those in the
            default, where it has any. NaN is no value of anything.

    Raises:
        ValueError: an unknown key (names the nearest known one) or a value of another type.
    """
    rename_old_keys(config)
    known = dict(_walk(defaults))
    free = tuple(
        f"{name}." for name, (_, kind) in known.items() if issubclass(kind, TextOrSections)
    )
    for name, (value, _) in _walk(config).items():
        if name.startswith(free):
            continue
        if name not in known:
            raise ValueError(_unknown_key_message(name, list(known)))
        default, expected = known[name]
        if issubclass(expected, TextOrSections):
            try:
                expected.check(value)
            except TypeError as error:
                raise ValueError(f"config key '{name}': {error}") from error
            continue
        if not _type_matches(value, expected) or not _elements_match(value, default):
            such_as = f" (such as {default!r})" if default is not None else ""
            raise ValueError(
                f"config key '{name}': expected {expected.__name__}{such_as:.200}, "
                f"got {type(value).__name__} {value!r:.200}"
            )


def rename_old_keys(config: ml_collections.ConfigDict) -> None:
    """Gives the keys of `RENAMED_KEYS` their new names, in place.

    Raises:
        ValueError: a key is set under both names.
    """
    for old, new in RENAMED_KEYS.items():
        if old not in config:
            continue
        value = config[old]
        with config.unlocked():
            del config[old]
            if value is None:
                continue
            if config.get(new) is not None:
                raise ValueError(f"config.{old} is the old name of config.{new}; set one of them")
            if new in config:
                del config[new]  # its type is checked by `validate_config`, as that of any other
            config[new] = value


def rename_old_flags(arguments: Iterable[str]) -> list[str]:
    """A command line with the keys of `RENAMED_KEYS` under their new names."""
    pattern = re.compile(rf"^(--?config\.)({'|'.join(RENAMED_KEYS)})(?==|$)")
    return [pattern.sub(lambda m: m[1] + RENAMED_KEYS[m[2]], text) for text in arguments]


def parse_fields(settings: Iterable[str]) -> dict[str, Any]:
    """Fields of an architecture from a command line.

    Args:
        settings: such as "activation=quick_gelu" and "vision_heads=16".

    Returns:
        Names and values, of the types of `ARCHITECTURE_FIELDS`.

    Raises:
        ValueError: not of this form, or no such field.
    """
    fields = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if equals and name and name not in ARCHITECTURE_FIELDS:
            nearest = nearest_name(name[:200], ARCHITECTURE_FIELDS)
            hint = f"did you mean '{nearest}'?" if nearest else f"known: {_FIELD_NAMES}"
            raise ValueError(f"--architecture {setting[:200]}: no field '{name[:200]}'; {hint}")
        try:
            value = ARCHITECTURE_FIELDS.get(name, str)(text)
        except ValueError:
            equals = ""
        if not name or not equals or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(
                f"--architecture: expected a pair like activation=quick_gelu, got '{setting[:200]}'"
            )
        fields[name] = value
    return fields


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is alike."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _walk(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, tuple[Any, type]]:
    """Dotted name -> (value, type); the type of an unset key is that of its placeholder."""
    found = {}
    for key in sorted(config.keys()):
        value, name = config[key], f"{prefix}{key}"
        found[name] = (value, config.get_type(key))
        if isinstance(value, ml_collections.ConfigDict):
            found.update(_walk(value, f"{name}."))
    return found


def _unknown_key_message(name: str, known: list[str]) -> str:
    section, _, last = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    # A right name in a wrong section is a common slip: config.beta for config.loss.beta.
    anywhere = {k.rpartition(".")[2]: k for k in known}
    for candidates in (siblings, anywhere):
        nearest = nearest_name(last[:200], candidates)
        if nearest:
            return f"unknown config key '{name[:200]}'; did you mean '{candidates[nearest]}'?"
    return f"unknown config key '{name[:200]}'; known keys: {', '.join(sorted(siblings.values()))}"


def _elements_match(value: Any, default: Any) -> bool:
    if not isinstance(value, list | tuple) or not isinstance(default, list | tuple) or not default:
        return True
    kinds = {type(element) for element in default}
    return len(kinds) > 1 or all(
        element is not None and _type_matches(element, *kinds) for element in value
    )


def _type_matches(value: Any, expected: type) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return False
    if value is None:
        return not issubclass(expected, ml_collections.ConfigDict)
    if expected is type(None):
        return True
    if bool in (expected, type(value)):
        return isinstance(value, bool) and expected is bool
    if expected is float:
        return isinstance(value, int | float)
    if expected in (list, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, expected)
