"""Both towers as ONNX, by torch's exporter on the model of transformers."""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
from typing import Any

import numpy as np

from diht_jax.storage.files import write_bytes
from diht_jax.weights import huggingface
from diht_jax.weights.source import ModelFiles

PACKAGES = ("torch", "transformers", "onnx", "onnxscript")


def check_packages() -> None:
    """Raises ValueError where a package is missing that `write_onnx` needs."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format 'onnx' needs {', '.join(missing)}: `pip install {' '.join(missing)}`, or take "
            "the format 'stablehlo', which needs none of them"
        )


def write_onnx(output: pathlib.Path, model: ModelFiles) -> None:
    """Writes `image.onnx` and `text.onnx`, with float32 parameters, into a directory."""
    import torch

    for name, (tower, argument, example) in _make_towers(model).items():
        with tempfile.TemporaryDirectory(dir=output) as folder:
            path = pathlib.Path(folder) / "tower.onnx"
            torch.onnx.export(
                tower,
                (example,),
                path,
                input_names=[argument],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("b")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
            write_bytes(output / f"{name}.onnx", path.read_bytes())


def _make_towers(source: ModelFiles) -> dict[str, tuple[Any, str, Any]]:
    """Modules of torch by tower, each with the name of its argument and an example of it."""
    import torch
    from transformers import AutoConfig, AutoModel

    arch, preprocessing = source.arch, source.preprocessing
    # "eager" attention becomes plain matrix products, which every runtime has.
    settings: dict[str, Any] = huggingface.make_config(arch, "float32")
    settings["attn_implementation"] = "eager"
    model = AutoModel.from_config(AutoConfig.for_model(**settings)).eval()
    tensors = huggingface.to_huggingface(source.params, arch)
    # Copies: the parameters may be views of arrays that cannot be written to.
    state = {name: torch.from_numpy(np.array(v, np.float32)) for name, v in tensors.items()}
    model.load_state_dict(state)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    class ImageTower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = model.vision_model
            self.projection = getattr(model, "visual_projection", torch.nn.Identity())

        def forward(self, images):
            pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
            pooled = self.tower(pixel_values=(pixels - mean) / std).pooler_output
            return torch.nn.functional.normalize(self.projection(pooled), dim=-1)

    class TextTower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = model.text_model
            self.projection = getattr(model, "text_projection", torch.nn.Identity())

        def forward(self, tokens):
            pooled = self.tower(input_ids=tokens).pooler_output
            return torch.nn.functional.normalize(self.projection(pooled), dim=-1)

    side = arch.image_size
    return {
        "image": (ImageTower(), "images", torch.zeros((2, side, side, 3), dtype=torch.uint8)),
        "text": (TextTower(), "tokens", torch.zeros((2, arch.context_length), dtype=torch.int32)),
    }
