"""The parts of the first hour: what each measures, where, and how long it is expected to take.

A part is a function of a module of this package, `function(setting, **arguments)`, which returns
what its entry of the JSON file holds. It runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DEVICES = ("cpu", "gpu", "tpu")
# Of a CPU, so that the parts about several devices run there too.
CPU_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all parts of a run have in common.

    Attributes:
        device: one of `DEVICES`.
        small: tiny models and few repetitions, to see that everything runs.
        output: folder for profiles and for what a part needs on disk.
        bucket: URL of a folder in an object store, or a folder; None where none is named.
    """

    device: str
    small: bool
    output: str
    bucket: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of work.

    Attributes:
        name: of its entry in the JSON file.
        function: "module:function".
        expected_secs: on a GPU or a TPU; the part is begun only where that much time is left.
        arguments: of the function, after the setting.
        packages: distributions that it needs, such as "easyocr" or "open_clip_torch>=3.3".
        devices: where it applies.
        starts_commands: that take the device themselves, so that its own process leaves it free.
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
# What says most comes first.
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
    """The parts for a device, or those of the names among them, in the order of `PARTS`.

    Raises:
        ValueError: a name of no part of this device.
    """
    found = [part for part in PARTS if device in part.devices]
    known = [part.name for part in found]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(
            f"--parts={unknown[0]}: expected some of {', '.join(known)} on --device {device}"
        )
    return [part for part in found if not names or part.name in names]
