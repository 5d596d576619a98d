"""One training step of open_clip, built like its own training script.

Model, loss and optimiser are those of open_clip 3 (open_clip_train/main.py and train.py).
`benchmarks/train_step.py` compares its time with diht_jax.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping

import numpy as np
import open_clip
import torch

from diht_jax.input.transforms import CLIP_MEAN, CLIP_STD
from diht_jax.models import Architecture


class OpenClipStep:
    """Trains open_clip's CLIP on one batch; calling it runs some steps and waits for them."""

    def __init__(
        self,
        arch: Architecture,
        weights: Mapping[str, np.ndarray],
        images: np.ndarray,
        tokens: np.ndarray,
        *,
        device: str,
        compiled: bool,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
        clip_norm: float,
        max_logit_scale: float,
    ):
        """Builds the model and puts the batch on the device.

        Args:
            arch: sizes of the model.
            weights: initial weights in CLIP's layout (`diht_jax.weights.clip_layout.to_clip`).
            images: uint8 [b, size, size, 3].
            tokens: int32 [b, t].
            device: "cpu" (float32) or "gpu" (bfloat16 autocast).
            compiled: run the model under `torch.compile`.
            learning_rate, weight_decay, betas, epsilon: settings of AdamW.
            clip_norm: maximum global norm of the gradient.
            max_logit_scale: maximum after exp.
        """
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        self._clip_norm, self._max_scale = clip_norm, max_logit_scale
        if device == "gpu":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        else:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = open_clip_model(arch)
        self._model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
        self._model.to(self._device).train()
        self.num_params = sum(p.numel() for p in self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, weight_decay), lr=learning_rate, betas=betas, eps=epsilon
        )
        self._forward = torch.compile(self._model) if compiled else self._model
        self._loss = open_clip.ClipLoss(cache_labels=True)
        normalized = (images.astype(np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(
            CLIP_STD
        )
        nchw = np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
        self._images = torch.from_numpy(nchw).to(self._device)
        self._tokens = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        self.losses: list[float] = []

    def __call__(self, steps: int) -> None:
        """Runs `steps` steps and waits for the last one."""
        for _ in range(steps):
            self._optimizer.zero_grad()
            with self._autocast():
                outputs = self._forward(self._images, self._tokens)
                loss = self._loss(**outputs, output_dict=True)["contrastive_loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
            with torch.no_grad():
                self._model.logit_scale.clamp_(0, math.log(self._max_scale))
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.losses.append(loss.item())

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)


def open_clip_model(arch: Architecture) -> torch.nn.Module:
    """Returns open_clip's CLIP with the sizes of `arch`, exact GELU, and random weights."""
    return open_clip.model.CLIP(
        embed_dim=arch.embed_dim,
        vision_cfg={
            "image_size": arch.image_size,
            "patch_size": arch.patch_size,
            "layers": arch.vision_layers,
            "width": arch.vision_width,
            "head_width": arch.vision_width // arch.vision_heads,
        },
        text_cfg={
            "context_length": arch.context_length,
            "vocab_size": arch.vocab_size,
            "layers": arch.text_layers,
            "width": arch.text_width,
            "heads": arch.text_heads,
        },
        output_dict=True,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Returns open_clip's two groups: no decay on vectors, norms, biases and the logit scale."""
    plain, decayed = [], []
    for name, param in model.named_parameters():
        is_plain = param.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
        (plain if is_plain or "logit_scale" in name else decayed).append(param)
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
