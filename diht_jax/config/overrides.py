"""Config keys on a command line: `None` unsets a key, and a duration replaces the recipe's.

ml_collections converts what a command line gives to the type of the key, and None has none of
these types; and a recipe has one duration already where the command line gives another one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
from absl import logging

from diht_jax.config.checks import TextOrSections

# Units of a duration; a recipe sets one of them.
DURATION_UNITS = ("steps", "examples", "epochs")
_DURATIONS = [
    [f"{prefix}_{unit}" for unit in DURATION_UNITS] for prefix in ("total", "no_patch_dropout")
]


def take_unset_keys(
    arguments: Sequence[str], defaults: ml_collections.ConfigDict
) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=None` and `--config.KEY None` out of a command line.

    Args:
        defaults: all keys; those whose default is None, and those of a `TextOrSections`, are
            optional. Unknown keys stay on the command line, whose parser refuses them.

    Returns:
        The other arguments, and the keys that are None in the end: of several values for one key
        the last one counts.
    """
    rest: list[str] = []
    unset: dict[str, None] = {}
    position, end = 0, len(arguments)
    if "--" in arguments:
        end = list(arguments).index("--")
    while position < end:
        argument = arguments[position]
        position += 1
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        key, value = match.groups() if match else (None, None)
        is_apart = match is not None and value is None and arguments[position:end][:1] == ["None"]
        if key is not None:
            unset.pop(key, None)
        if key and (value == "None" or is_apart) and _is_optional(key, defaults):
            unset[key] = None
            position += is_apart
        else:
            rest.append(argument)
    return [*rest, *arguments[end:]], list(unset)


def apply_overrides(
    config: ml_collections.ConfigDict, unset: Collection[str], given: Collection[str]
) -> None:
    """Unsets keys, and those durations that a duration of the command line replaces; in place.

    A recipe's warm-up that does not fit into fewer steps becomes a tenth of them.

    Raises:
        AttributeError, KeyError: the recipe has no such key.
    """
    for key in unset:
        set_key(config, key, None)
    for names in _DURATIONS:
        if any(config.get(name) is not None for name in names if name in given):
            for name in set(names).difference(given):
                config[name] = None
    steps = config.total_steps if "total_steps" in given else None
    if steps and "optimizer.warmup_steps" not in given and config.optimizer.warmup_steps >= steps:
        before, config.optimizer.warmup_steps = config.optimizer.warmup_steps, steps // 10
        logging.warning(
            "--config.total_steps=%d is shorter than the recipe's warm-up of %d steps; taking %d "
            "(--config.optimizer.warmup_steps)",
            steps,
            before,
            steps // 10,
        )


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets a key by its dotted name, in place."""
    *parents, last = key.split(".")
    section = config
    for name in parents:
        section = section[name]
    section[last] = value


def _is_optional(key: str, defaults: ml_collections.ConfigDict) -> bool:
    """Returns whether a key may be None; False for an unknown one."""
    section, name = defaults, ""
    for name in key.split("."):
        if not isinstance(section, ml_collections.ConfigDict) or name not in section:
            return False
        if issubclass(section.get_type(name), TextOrSections):
            return True
        section = section[name]
    if isinstance(section, ml_collections.ConfigDict):
        raise ValueError(f"--config.{key}=None: a section cannot be unset, only its keys")
    if section is not None:
        raise ValueError(
            f"--config.{key}=None: this key cannot be unset; its default is {section!r:.200}"
        )
    return True
