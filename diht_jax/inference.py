"""A model ready to embed images and texts, on all devices of its mesh.

`diht_jax.load_model` makes it from files. Nothing here reads files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diht_jax import sharding
from diht_jax.data import tokenizer
from diht_jax.data.images import transforms
from diht_jax.data.images.decode import load_rgb
from diht_jax.models.parameters import ModelDefinition, merge_model


class LoadedModel:
    """Encodes images and texts into the shared, L2-normalised space.

    Attributes:
        config: the training config that the model came with.
        image_size: side of the images it takes, in pixels.
        context_length: length of the texts it takes, in tokens.
        step: optimiser step of the parameters, or None.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        params: dict[str, Any],
        *,
        mesh: Mesh,
        config: ml_collections.ConfigDict,
        image_size: int,
        context_length: int,
        batch_size: int = 256,
        step: int | None = None,
        mean: Sequence[float] = transforms.CLIP_MEAN,
        std: Sequence[float] = transforms.CLIP_STD,
    ):
        """Wraps parameters that lie on `mesh`.

        Args:
            definition, params: of `models.parameters`.
            mesh: axes `data` and `fsdp`.
            config: kept for the reader.
            image_size: in pixels.
            context_length: in tokens.
            batch_size: most examples embedded at once, over all devices.
            step: optimiser step of the parameters, where known.
            mean, std: of the pictures, per channel, for values in [0, 1].
        """
        self.config = config
        self.image_size = image_size
        self.context_length = context_length
        self.step = step
        self._params = params
        self._batch_sharding = sharding.batch_sharding(mesh)
        num_devices = mesh.size
        self._batch_size = math.ceil(batch_size / num_devices) * num_devices
        self._num_devices = num_devices
        dtype = jnp.dtype(config.model.dtype)
        whole = sharding.replicated(mesh)

        def encode_image(params, images):
            pixels = transforms.normalize(images, dtype, mean=mean, std=std)
            return merge_model(definition, params).encode_image(pixels)

        def encode_text(params, tokens):
            return merge_model(definition, params).encode_text(tokens)

        self._encode_image = jax.jit(encode_image, out_shardings=whole)
        self._encode_text = jax.jit(encode_text, out_shardings=whole)

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, after exp."""
        return float(np.exp(np.asarray(self._params["log_logit_scale"], np.float64)))

    @property
    def embed_dim(self) -> int:
        """Size `d` of the embeddings."""
        return self._params["text"]["projection"]["kernel"].shape[1]

    def update(self, params: dict[str, Any], step: int) -> None:
        """Takes the parameters of another step; same shapes, so nothing is compiled again."""
        self._params = params
        self.step = step

    def own_rows(self, size: int) -> np.ndarray | None:
        """Which rows of a batch this process embeds, in a job of several processes.

        Of the other rows it does not look at the values, so they need not be decoded here.

        Args:
            size: rows of the batch given to `encode_image`; a multiple of `batch_size`, or less.

        Returns:
            bool [size]; None where this process has all devices of the mesh, and so all rows.
        """
        if self._batch_sharding.is_fully_addressable:
            return None
        own = np.zeros(size, bool)
        for start in range(0, size, self._batch_size):
            padded = self._padded_size(min(size - start, self._batch_size))
            indices = self._batch_sharding.addressable_devices_indices_map((padded,))
            for (rows,) in indices.values():
                own[start:][rows] = True
        return own

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float32 values of all parameters, in hex.

        Equal for the same parameters whatever file, format or placement they came from.
        """
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            digest.update(f"{name} {tuple(leaf.shape)}\n".encode())
            digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).data)
        return digest.hexdigest()

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """PIL image of any size and mode -> uint8 [size, size, 3].

        Transparency is composed on white, as in training; short side resized, centre cropped.
        """
        return transforms.eval_transform(load_rgb(image), self.image_size)

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Texts -> int32 [b, context_length]."""
        if self._vocab_size < tokenizer.VOCAB_SIZE:
            raise ValueError(
                f"this model's vocabulary of {self._vocab_size} entries is not CLIP's; tokenize "
                "its texts elsewhere and give `encode_text` the ids"
            )
        return tokenizer.tokenize(texts, self.context_length)

    def encode_image(self, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
        """Embeds images.

        Args:
            images: uint8 [b, size, size, 3], or PIL images of any size.

        Returns:
            float32 [b, d], rows of unit length. Where the model lies on several processes, all
            call with as many rows, each row is taken from the process that `own_rows` names, and
            all get the whole result.

        Raises:
            ValueError: an array of another dtype or shape.
        """
        if not isinstance(images, np.ndarray | jax.Array):
            images = [self.preprocess(image) for image in images]
            images = np.stack(images) if images else self._no_images()
        expected = (self.image_size, self.image_size, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"images: expected uint8 [b, {', '.join(map(str, expected))}], got {images.dtype} "
                f"{list(images.shape)}; `preprocess` makes such an array of a PIL image"
            )
        return self._in_batches(self._encode_image, np.asarray(images))

    def encode_text(self, texts: Sequence[str] | np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: strings, or int32 [b, context_length] of `tokenize`.

        Returns:
            float32 [b, d], rows of unit length.

        Raises:
            ValueError: an array of another dtype or shape, or an id outside of the vocabulary.
        """
        tokens = texts
        if not isinstance(texts, np.ndarray | jax.Array):
            tokens = self.tokenize(list(texts))
        if tokens.ndim != 2 or tokens.dtype != np.int32 or tokens.shape[1] != self.context_length:
            raise ValueError(
                f"texts: expected strings or int32 [b, {self.context_length}], got {tokens.dtype} "
                f"{list(tokens.shape)}; `tokenize` makes such an array of strings"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(
                f"texts: expected ids from 0 to {self._vocab_size - 1}, got {tokens.min()} to "
                f"{tokens.max()}"
            )
        return self._in_batches(self._encode_text, np.asarray(tokens))

    @property
    def _vocab_size(self) -> int:
        return self._params["text"]["token_embedding"]["embedding"].shape[0]

    def _no_images(self) -> np.ndarray:
        return np.zeros((0, self.image_size, self.image_size, 3), np.uint8)

    def _in_batches(self, encode: Callable[..., jax.Array], inputs: np.ndarray) -> np.ndarray:
        outputs = [np.zeros((0, self.embed_dim), np.float32)]
        for start in range(0, len(inputs), self._batch_size):
            chunk = inputs[start : start + self._batch_size]
            padding = self._padded_size(len(chunk)) - len(chunk)
            widths = [(0, padding)] + [(0, 0)] * (chunk.ndim - 1)
            padded = np.pad(chunk, widths)
            # By global index: with several processes each puts the rows of its own devices.
            batch = jax.make_array_from_callback(
                padded.shape, self._batch_sharding, lambda index, rows=padded: rows[index]
            )
            outputs.append(np.asarray(encode(self._params, batch))[: len(chunk)])
        return np.concatenate(outputs)

    def _padded_size(self, size: int) -> int:
        """The next power-of-two multiple of the devices: few shapes, so few compilations."""
        padded = self._num_devices
        while padded < size:
            padded *= 2
        return min(padded, self._batch_size)
