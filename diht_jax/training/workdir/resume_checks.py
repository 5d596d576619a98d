"""Whether a config is that of the run in a work directory.

Called by the training loop before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_collections
from etils import epath

from diht_jax.training.workdir.checkpoint import CHECKPOINT_DIRECTORY, CONFIG_FILE, read_config

# A run that goes on under other values of these is no continuation of the same run.
_FIXED_IN_A_RUN = (
    "model",
    "loss",
    "concepts",
    "optimizer",
    "ema",
    "data",
    "seed",
    "total_",
    "unmasked_",
)
_FREE_IN_A_RUN = (
    "data.train",
    "data.num_workers",
    "data.prefetch_batches",
    "data.on_bad_record",
    "data.allow_changed",
    # Other ways to compute the same.
    "model.scan_layers",
    "model.remat",
    "model.attention",
)


def check_same_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Refuses to mix two runs in one directory; names the keys that differ."""
    if not (workdir / CONFIG_FILE).exists():
        return
    changed = changed_keys(
        read_config(workdir),
        config,
        lambda name: name.startswith(_FIXED_IN_A_RUN) and name not in _FREE_IN_A_RUN,
    )
    if changed and (workdir / CHECKPOINT_DIRECTORY).exists():
        raise ValueError(
            f"{workdir} holds a run with another config; changed: {', '.join(changed)}. "
            "Take the same values to resume it, or another --workdir to start anew"
        )


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
