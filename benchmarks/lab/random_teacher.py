"""A teacher without knowledge: EfficientNet-Lite0 with random weights.

    --config.teacher.torch.function=benchmarks.lab.random_teacher:build

It is the control for distillation. `build_0` to `build_7` use other random weights. The batch-norm
statistics come from smooth random pictures. Without them, 16 blocks of random weights would give
almost the same features for every picture.
"""

from __future__ import annotations

import functools
from typing import Any

_PICTURES, _SIDE = 64, 224


def build(seed: int = 0) -> Any:
    """Like `data_prep.teachers.efficientnet_lite:build`, with random weights."""
    import torch

    from data_prep.teachers import efficientnet_lite

    network = efficientnet_lite.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # cumulative average over all batches
        coarse = torch.randn(_PICTURES, 3, 8, 8)
    pictures = torch.nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear")
    network.train()
    with torch.inference_mode():
        for part in pictures.split(16):
            network(part)
    return network.eval()


build_0, build_1, build_2, build_3, build_4, build_5, build_6, build_7 = (
    functools.partial(build, seed) for seed in range(1, 9)
)
