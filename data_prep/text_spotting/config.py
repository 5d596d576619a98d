"""Text-spotting as a stage of the filter: its config section, its version, and what it counts.

Decisions are made in `spotter`; records are not written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.text_spotting.cache import SpotCache
from data_prep.text_spotting.networks import PRECISIONS, OcrSettings
from data_prep.text_spotting.ocr import resolve_for_networks
from data_prep.text_spotting.settings import Settings
from data_prep.text_spotting.spotter import TextSpotter
from diht_jax.storage.files import refuse_url

# What is decided about a picture that EasyOCR has read, and how it is read: raised whenever a
# decision may come out differently. tests/data_prep/text_spotting/test_rules_version.py fails when
# decisions change and this number does not.
RULES_VERSION = 3

# Keys of the section that decide where and how fast, but not what is written.
NOT_HASHED = ("cache", "device", "window", "batch_size", "stop_at_match")


# Least values of counts; names of shares, from 0 to 1.
_LEAST = {
    **dict.fromkeys(("canvas_size", "min_chars", "misread_min_chars", "window", "batch_size"), 1),
    **dict.fromkeys(("closer_size", "closer_chars"), 0),
}
_SHARES = (
    "min_confidence",
    "text_threshold",
    "low_text",
    "link_threshold",
    "gate_score",
    "closer_score",
    "audit_share",
)


def default_spotter() -> ml_collections.ConfigDict:
    """The config section `spotter`: the fields of `Settings` and `OcrSettings`, and `cache`."""
    values = dataclasses.asdict(Settings())
    values |= values.pop("ocr")
    del values["max_pixels"]  # of the section `image`
    c = ml_collections.ConfigDict()
    for name, value in values.items():
        c[name] = placeholder(int) if value is None else value
    c.cache = placeholder(str)  # folder that keeps what was read; None: nothing is kept
    return c


def check_spotter(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    refuse_url(config.cache, "config.spotter.cache")
    for name, least in _LEAST.items():
        if config[name] is not None and config[name] < least:
            raise ValueError(f"config.spotter.{name}={config[name]}; expected at least {least}")
    if not 0 <= config.gate_size < config.canvas_size:
        raise ValueError(
            f"config.spotter.gate_size={config.gate_size}; expected less than canvas_size="
            f"{config.canvas_size}, or 0 for no first look"
        )
    for name in _SHARES:
        if not 0 <= config[name] <= 1:
            raise ValueError(f"config.spotter.{name}={config[name]}; expected 0 to 1")
    if config.precision not in PRECISIONS:
        raise ValueError(
            f"config.spotter.precision='{config.precision}'; expected one of "
            f"{', '.join(PRECISIONS)}"
        )


def open_spotter(config: ml_collections.ConfigDict, max_pixels: int, shard: str) -> TextSpotter:
    """The spotter for one shard, with its part of the cache.

    Args:
        config: of `default_spotter`.
        max_pixels: of a picture that is still decoded.
        shard: name of its file in the cache, of `cache.name_shard`.

    Raises:
        ValueError: there is a cache, but no EasyOCR.
    """
    values = config.to_dict() | {"max_pixels": max_pixels}
    cache = values.pop("cache")
    names = [field.name for field in dataclasses.fields(OcrSettings)]
    settings = Settings(ocr=OcrSettings(**{name: values.pop(name) for name in names}), **values)
    if cache is None:
        return TextSpotter(settings)
    return TextSpotter(settings, SpotCache(cache, settings.describe_readings(), shard))


def describe_machine(settings: Settings) -> dict[str, str]:
    """What "auto" means where the networks run: precision and device, on which readings depend.

    Args:
        settings: of the spotter.

    Raises:
        ValueError: a setting cannot be met on this machine.
    """
    resolved = resolve_for_networks(settings.ocr)
    return {"precision": resolved.precision, "device": resolved.device.partition(":")[0]}


def name_machine(described: Mapping[str, str]) -> str:
    """Formats the result of `describe_machine`, such as "bfloat16 on cpu"."""
    return f"{described['precision']} on {described['device']}"


def warn_of_machines(machines: Mapping[str, int]) -> str | None:
    """The warning where shards of one job were read on machines that round differently.

    Args:
        machines: of `name_machine` -> shards.

    Returns:
        None where all of them were alike.
    """
    if len(machines) < 2:
        return None
    counts = ", ".join(f"{name} ({count:,} shards)" for name, count in sorted(machines.items()))
    return (
        f"text was read with different rounding, {counts}: another run, on other machines, may "
        "decide differently about a few pairs; name config.spotter.precision and device to avoid it"
    )


def describe_counts(counts: Mapping[str, Any]) -> str:
    """The counts as a sentence for the table of the funnel."""
    text = (
        f"text-spotting: {counts.get('read', 0):,} pictures read, "
        f"{counts.get('gated', 0):,} without a trace of text at the first look, "
        f"{counts.get('no_run', 0):,} with captions that no spotter reads"
    )
    audited = counts.get("audited", 0)
    if audited:
        missed = counts.get("missed", 0)
        text += f"; audit of the first look: {missed:,} of {audited:,} showed the caption"
    return text
