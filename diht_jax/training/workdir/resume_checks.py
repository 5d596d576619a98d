"""Refuses to go on with a run under another config, or with other data.

Config and data must be the same on all hosts and since the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging
from etils import epath

from diht_jax.input.order import ORDERS, resolve_order
from diht_jax.records.fingerprint import Fingerprint, describe_changes
from diht_jax.records.train_data import describe_train
from diht_jax.training.durations import steps_before_end
from diht_jax.training.multihost import gather_texts
from diht_jax.training.terms.registry import TERMS
from diht_jax.training.workdir.checkpoint import CHECKPOINT_DIRECTORY, finished_steps
from diht_jax.training.workdir.config_file import CONFIG_FILE, read_config

# A run cannot go on under other values of these and of the objective's terms, ...
_FIXED_IN_A_RUN = (
    "model",
    "lora",
    "loss",
    "matryoshka",
    "optimizer",
    "ema",
    "data",
    "seed",
    "total_",
    "no_patch_dropout_",
)
# ... but for these.
_FREE_IN_A_RUN = (
    "data.train",
    "data.labels",
    "data.num_workers",
    "data.prefetch_batches",
    "data.max_in_flight_gib",
    "data.cache_dir",
    "data.read_ahead_gib",
    "data.read_threads",
    "data.read_timeout_secs",
    "data.on_bad_record",
    "data.allow_changed",
    # Other ways to compute the same.
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "model.texts_per_row",
    "loss.impl",
)
# With a learning rate that is constant until its final decay, these decide about a run's end alone.
_OF_THE_END = (
    "total_",
    "no_patch_dropout_",
    "optimizer.decay_steps",
    "optimizer.final_learning_rate",
)
# These may differ between the hosts of a job: paths of their own, and what suits their cores. Data
# and tasks are compared by what they are.
_OWN_OF_A_HOST = (
    "data.train",
    "data.labels",
    "data.num_workers",
    "data.prefetch_batches",
    "data.max_in_flight_gib",
    "data.cache_dir",
    "data.read_ahead_gib",
    "data.read_threads",
    "data.read_timeout_secs",
    "model.init_from",
    "checkpoint.staging",
    "compilation_cache",
    "compilation_cache_max_gib",
    "evaluation.tasks",
)
# Of the sources of a mixture; weights, templates and orders are as fixed as other keys.
_PATHS = re.compile(r"data\.train\.[^.]+\.(path|labels)")
_LONGEST_CONFIG_BYTES = 2**16


def bind_order(config: ml_collections.ConfigDict, workdir: epath.Path) -> ml_collections.ConfigDict:
    """The config with the order of the examples in place of "auto".

    A run that is there already goes on in its own order, also when its data has moved to or from an
    object store.

    Raises:
        ValueError: `config.data.order`, or that of a source, has no such value.
    """
    stored = read_config(workdir).data if (workdir / CONFIG_FILE).exists() else None
    bound = config.copy_and_resolve_references()
    data = bound.data
    if isinstance(data.train, str | list | tuple | None):
        data.order = _run_order("data.order", data.order, data.train, stored)
        return bound
    for name, source in data.train.items():
        order = source.get("order") or data.order
        with bound.unlocked():
            source.order = _run_order(f"data.train.{name}.order", order, source.path, stored)
    return bound


def _run_order(
    key: str, order: str, path: str | Sequence[str] | None, stored: ml_collections.ConfigDict | None
) -> str:
    """The order that a key stands for; where it is "auto", that of the stored run."""
    resolved = resolve_order(order, path, key)
    if order != "auto" or stored is None:
        return resolved
    section: Any = ml_collections.ConfigDict({"data": stored})
    for part in key.split("."):
        section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
    return section if section in ORDERS else resolved


def check_same_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Refuses to mix two runs in one directory; names the keys that differ.

    A run that ended before its first checkpoint may begin anew with any config. With
    `optimizer.schedule="wsd"` another length may be right: see `check_same_start`.
    """
    if not (workdir / CONFIG_FILE).exists():
        return
    stored = read_config(workdir)
    fixed = (*_FIXED_IN_A_RUN, *(f"{name}." for name in TERMS))
    free = _OF_THE_END if config.optimizer.schedule == "wsd" else ()
    changed = changed_keys(
        stored,
        config,
        lambda name: (
            name.startswith(fixed)
            and name not in _FREE_IN_A_RUN
            and not name.startswith(free)
            and not _PATHS.fullmatch(name)
        ),
    )
    if changed and finished_steps(workdir / CHECKPOINT_DIRECTORY):
        raise ValueError(
            f"{workdir} holds a run with another config; changed: {', '.join(changed)}. "
            "Take the same values to resume it, or another --workdir to start anew"
        )


def check_adapted_model(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises ValueError for a new run with adapters and no model that they adapt."""
    if not config.lora.rank or config.model.init_from:
        return
    root = workdir / CHECKPOINT_DIRECTORY
    if not root.exists() or not any(path.name.isdigit() for path in root.iterdir()):
        raise ValueError(
            f"config.lora.rank={config.lora.rank}: adapters alone are trained, and the model would "
            "stay as it was drawn; set config.model.init_from to the model that they adapt"
        )


def check_same_start(
    config: ml_collections.ConfigDict, workdir: epath.Path, *, num_examples: int
) -> None:
    """Refuses another end of the run behind checkpoints that the end before has shaped.

    Args:
        config: of the run, which `check_same_run` has let pass.
        workdir: of the run, with the config and the checkpoints that are there.
        num_examples: size of one epoch, in examples.

    Raises:
        ValueError: names the checkpoints.
    """
    root = workdir / CHECKPOINT_DIRECTORY
    if not (workdir / CONFIG_FILE).exists():
        return
    stored = read_config(workdir)
    if not changed_keys(stored, config, lambda name: name.startswith(_OF_THE_END)):
        return
    common = min(steps_before_end(c, num_examples=num_examples) for c in (stored, config))
    later = [step for step in finished_steps(root) if step > common]
    if later:
        raise ValueError(
            f"{root}: the run was to end otherwise, and only up to step {common} that makes no "
            f"difference; the checkpoints after it are of steps {', '.join(map(str, later))}. To "
            f"go on from step {common} or before, copy {workdir} and remove them from the copy; "
            "or take the same values to resume this run"
        )


def check_hosts_share_config(config: ml_collections.ConfigDict) -> None:
    """Refuses hosts with different configs: each would compute another step. All must call.

    Raises:
        ValueError: names the processes that differ from the first one, and the keys.
    """
    values = _shared_values(config)
    digests = gather_texts(_digest(values))
    others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return
    own = json.dumps({name: _digest(value)[:8] for name, value in values.items()})
    found = [json.loads(text) for text in gather_texts(own, longest_bytes=_LONGEST_CONFIG_BYTES)]
    differing = sorted(
        name for name in set().union(*found) if len({each.get(name) for each in found}) > 1
    )
    raise ValueError(
        f"processes {', '.join(others)} have another config than process 0; give every host the "
        f"same command. Different: {', '.join(differing)}"
    )


def _shared_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values by dotted name, without those that may differ between hosts."""
    flat: dict[str, Any] = {}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            name = f"{prefix}{key}"
            is_mixture = name == "data.train" and isinstance(value, dict)
            if (name in _OWN_OF_A_HOST and not is_mixture) or _PATHS.fullmatch(name):
                continue
            if isinstance(value, dict):
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(json.loads(config.to_json_best_effort()), "")
    return flat


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_hosts_agree(train: Any, fingerprint: Fingerprint) -> None:
    """Refuses hosts that see different data: each would train on another order.

    Args:
        train: `config.data.train`, for the message.
        fingerprint: of what this process sees.

    Raises:
        ValueError: names the processes that differ from the first one.
    """
    digests = gather_texts(fingerprint.digest)
    others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"config.data.train={train}: processes {', '.join(others)} see other shards than "
            "process 0; give every host the same files"
        )


def check_same_data(
    config: ml_collections.ConfigDict, saved: dict[str, Any] | None, fingerprint: Fingerprint
) -> None:
    """Refuses to go on with other data than the checkpoint's, unless that is allowed.

    Args:
        config: the section `data`.
        saved: what the checkpoint keeps (`Fingerprint.pack`); None in one of an older version.
        fingerprint: of the data now.

    Raises:
        ValueError: names the shards that were changed, are missing or were added.
    """
    if saved is None or saved["digest"] == fingerprint.digest:
        return
    changes = describe_changes(Fingerprint.unpack(saved), fingerprint)
    text = (
        f"config.data.train={describe_train(config.train)} is not what this run was trained on; "
        f"{'; '.join(changes)}"
    )
    if not config.allow_changed:
        raise ValueError(
            f"{text}. Put the old shards back, or go on with these by "
            "--config.data.allow_changed=True: the order of the examples is then another one, and "
            "the epoch at hand is not seen exactly once"
        )
    logging.warning("%s; the run goes on with it", text)


def changed_keys(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    matter: Callable[[str], bool],
) -> list[str]:
    """Dotted names of the keys that differ and of which `matter(name)` is true."""
    old_flat, new_flat = (json.loads(c.to_json_best_effort()) for c in (old, new))
    return sorted(name for name in _differences(old_flat, new_flat) if matter(name))


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in old.keys() | new.keys()
            for name in _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [prefix.rstrip(".")]
