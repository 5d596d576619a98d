"""The parts of the first hour: what each measures, on which devices, and its expected seconds.

A part is a function `function(setting, **arguments)` in a module of this package. It returns the
contents of its entry in the JSON file, and runs in its own process.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DEVICES = ("cpu", "gpu", "tpu")
# Number of simulated devices on a CPU, for the parts that need several devices.
CPU_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings shared by all parts of a run.

    Attributes:
        device: one of `DEVICES`.
        small: tiny models and few repetitions, to check that everything runs.
        output: folder for profiles and other files of the parts.
        bucket: URL of a folder in an object store, or a local folder; None if not given.
    """

    device: str
    small: bool
    output: str
    bucket: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement of the first hour.

    Attributes:
        name: name of its entry in the JSON file.
        function: "module:function".
        expected_secs: on a GPU or a TPU. A part needs this time to start, except the first.
        arguments: keyword arguments of the function, after the setting.
        packages: distributions that it needs, such as "easyocr" or "open_clip_torch>=3.3".
        devices: kinds of devices that it runs on.
        starts_commands: whether it starts commands that use the device, which it then leaves free.
    """

    name: str
    function: str
    expected_secs: int
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = DEVICES
    starts_commands: bool = False


_HERE = "benchmarks.first_hour"
_SLICES = ("cpu", "tpu")
# The most informative parts come first.
PARTS = (
    Part("machine", f"{_HERE}.machine:describe", 40),
    Part("rates", f"{_HERE}.machine:measure_rates", 60),
    Part("step_b16", f"{_HERE}.steps:measure_step", 150, {"recipe": "diht_vitb16"}),
    Part("kernels_b16", f"{_HERE}.kernels:compare", 90, {"model": "diht_vitb16_224px"}),
    Part(
        "open_clip_b16",
        f"{_HERE}.steps:compare_open_clip",
        200,
        {"model": "b16"},
        packages=("torch", "open_clip_torch>=3.3"),
    ),
    Part(
        "loop",
        f"{_HERE}.loop:stop_and_resume",
        300,
        {"recipe": "diht_vitb16"},
        starts_commands=True,
    ),
    Part("collectives", f"{_HERE}.network:measure_collectives", 90, devices=_SLICES),
    Part("loss_forms", f"{_HERE}.network:compare_losses", 120, devices=_SLICES),
    Part(
        "step_b16_two_micro_batches",
        f"{_HERE}.steps:measure_step",
        180,
        {"recipe": "diht_vitb16", "micro_batches": 2},
    ),
    Part("step_l14", f"{_HERE}.steps:measure_step", 200, {"recipe": "diht_vitl14"}),
    Part("kernels_b32", f"{_HERE}.kernels:compare", 90, {"model": "diht_vitb32_224px"}),
    Part("kernels_l14", f"{_HERE}.kernels:compare", 90, {"model": "diht_vitl14_224px"}),
    Part("kernels_l14_336", f"{_HERE}.kernels:compare", 90, {"model": "diht_vitl14_336px"}),
    Part("swag", f"{_HERE}.embedding:measure_swag", 120),
    Part(
        "text_spotting",
        f"{_HERE}.embedding:measure_text_spotting",
        90,
        packages=("torch", "easyocr", "matplotlib"),
    ),
    Part("store", f"{_HERE}.network:save_and_restore", 120, devices=_SLICES),
)


def parts_for(device: str, names: list[str] | None = None) -> list[Part]:
    """Returns the parts for a device, optionally only the named ones, in the order of `PARTS`.

    Raises:
        ValueError: no part for this device has one of the names.
    """
    found = [part for part in PARTS if device in part.devices]
    known = [part.name for part in found]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(
            f"--parts={unknown[0]}: expected some of {', '.join(known)} on --device {device}"
        )
    return [part for part in found if not names or part.name in names]
