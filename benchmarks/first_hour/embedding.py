"""Data preparation on an accelerator: images per second of SWAG and of text-spotting."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.first_hour.plan import Setting
from benchmarks.first_hour.timing import repetitions, secs_of_call


def measure_swag(setting: Setting) -> dict[str, Any]:
    """Measures the embedding of images by ViT-H/14 on one device, with random weights."""
    from flax import nnx

    from data_prep.teachers.base import IMAGENET_MEAN, IMAGENET_STD
    from diht_jax.input import transforms
    from diht_jax.weights.swag import ARCHITECTURES, SwagArchitecture, swag_definition

    arch = SwagArchitecture(32, 8, 2, 32, 2, 64) if setting.small else ARCHITECTURES["vit_h_14"]
    dtype = "float32" if setting.device == "cpu" else "bfloat16"
    batch_size = 4 if setting.device == "cpu" else 256
    graphdef, shapes = swag_definition(arch, dtype)
    leaves, structure = jax.tree.flatten(shapes)

    @jax.jit
    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        drawn = [
            0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    @functools.partial(jax.jit)
    def encode(params: Any, images: jax.Array) -> jax.Array:
        pixels = transforms.normalize(images, dtype, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return nnx.merge(graphdef, params)(pixels).astype(jnp.float32)

    params = draw(jax.random.key(0))
    side = arch.image_size
    images = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    on_device = jax.device_put(images)
    features = np.asarray(encode(params, on_device))
    secs = secs_of_call(lambda: encode(params, on_device), **repetitions(setting.small))
    return {
        "architecture": "vit_h_14" if not setting.small else "tiny",
        "dtype": dtype,
        "batch_size": batch_size,
        "all_finite": bool(np.all(np.isfinite(features))),
        "images_per_sec": batch_size / secs,
    }


def measure_text_spotting(setting: Setting) -> dict[str, Any]:
    """Measures text-spotting on synthetic pictures, a third of which contain text."""
    from benchmarks.text_spotting_testset import make_test_set
    from data_prep.text_spotting.networks import OcrSettings
    from data_prep.text_spotting.spotter import Settings, TextSpotter

    device = "cuda" if setting.device == "gpu" else "cpu"
    count = 4 if setting.small else 64 if device == "cpu" else 512
    pictures = make_test_set(count, seed=3)
    spotter = TextSpotter(Settings(ocr=OcrSettings(device=device)))
    data = [picture.image for picture in pictures]
    captions = [[picture.caption] for picture in pictures]
    # Loads the networks, and lets them choose their kernels.
    spotter.judge(data[: count // 2], captions[: count // 2])
    start = time.perf_counter()
    verdicts = spotter.judge(data, captions)
    secs = time.perf_counter() - start
    return {
        "on": device,
        "pictures": count,
        "matched": sum(any(verdict.matches) for verdict in verdicts),
        "images_per_sec": count / secs,
    }
