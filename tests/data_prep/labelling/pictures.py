"""Pictures with colours and names that a small frozen network recognises, and label configs."""

import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from diht_jax.config import load_recipe
from tests.make import PREP_RECIPES, encoded

COLORS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220)}
NAMES = ("car", "house")  # a car fills the lower half, a house the upper one
NUM_IMAGES = 90

# A frozen network that locates colours: the mean of each quarter of the picture.
TEACHER = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
"""


def draw(color: str, name: str, rng: np.random.Generator) -> bytes:
    pixels = rng.integers(100, 156, (24, 24, 3))
    half = slice(12, 24) if name == "car" else slice(0, 12)
    pixels[half] = np.array(COLORS[color]) + rng.integers(-15, 16, (12, 24, 3))
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_embeddings(path: pathlib.Path, keys: Iterable[str]) -> dict[str, str]:
    """Writes random embeddings for keys; returns changes of a config that name them as teacher."""
    keys = np.array(list(keys))
    vectors = np.random.default_rng(0).normal(size=(len(keys), 4)).astype(np.float32)
    np.savez(path, key=keys, image_emb=vectors)
    return {"teacher__kind": "precomputed", "teacher__precomputed__files": str(path)}


def label_config(source, output, **changes):
    config = load_recipe(PREP_RECIPES / "concepts.py")
    config.update({"input": str(source), "output": str(output), "num_workers": 0})
    config.teacher.update({"kind": "torch", "batch_size": 16})
    config.teacher.torch.update({"function": "quarters:build", "image_size": 24})
    config.vocabulary.min_count = 5
    config.heads.update({"steps": 60, "batch_size": 64, "learning_rate": 0.05, "held_out": 0.25})
    config.report_images = 6
    config.merge = True
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config
