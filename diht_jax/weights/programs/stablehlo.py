"""Both towers as StableHLO, by `jax.export`; JAX and IREE run it on CPUs, GPUs and TPUs."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from jax import export

from diht_jax.input import transforms
from diht_jax.models.parameters import merge_model, model_definition
from diht_jax.models.transformer import Execution
from diht_jax.storage.files import write_bytes
from diht_jax.weights.source import ModelFiles

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write_stablehlo(output: pathlib.Path, model: ModelFiles, dtype: str) -> None:
    """Writes `image.stablehlo` and `text.stablehlo` for `jax.export.deserialize`.

    Args:
        output: directory.
        model: layer by layer.
        dtype: of the parameters in the files; what is computed is float32.
    """
    arch, mean, std = model.arch, model.preprocessing.mean, model.preprocessing.std
    # XLA's attention is the one that every platform has.
    definition, _ = model_definition(arch, "float32", dtype, Execution(attention="xla"))
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.params)

    def encode_image(images):
        pixels = transforms.normalize(images, jnp.dtype("float32"), mean=mean, std=std)
        return merge_model(definition, stored).encode_image(pixels)

    def encode_text(tokens):
        return merge_model(definition, stored).encode_text(tokens)

    (batch,) = export.symbolic_shape("b")
    side = arch.image_size
    towers = {
        "image": (encode_image, jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)),
        "text": (encode_text, jax.ShapeDtypeStruct((batch, arch.context_length), jnp.int32)),
    }
    for name, (encode, inputs) in towers.items():
        exported = export.export(jax.jit(encode), platforms=_PLATFORMS)(inputs)
        write_bytes(output / f"{name}.stablehlo", bytes(exported.serialize()))
