"""A model ready to embed images and texts, on all devices of its mesh.

`diht_jax.load_model` makes it from files. Of files only pictures are read here, where their paths
are given.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
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
from diht_jax.data.images.decode import decode_rgb, load_rgb
from diht_jax.models.parameters import ModelDefinition, merge_model

# A picture: of PIL, the path of a file, or uint8 [h, w, 3].
Picture = Image.Image | str | os.PathLike | np.ndarray
_EXPECTED_PICTURES = "expected PIL images, paths of pictures, or uint8 arrays [h, w, 3]"


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

    def update(self, params: dict[str, Any], step: int | None) -> None:
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

    def encode_image(self, images: Picture | Iterable[Picture]) -> np.ndarray:
        """Embeds images.

        Args:
            images: a picture or several: PIL images, paths of files, uint8 arrays [h, w, 3], or one
                array [b, h, w, 3]. Pictures of another size than [image_size, image_size] go
                through `preprocess`.

        Returns:
            float32 [b, d], rows of unit length; b is 1 for a single picture. Where the model lies
            on several processes, all call with as many rows, each row is taken from the process
            that `own_rows` names, and all get the whole result.

        Raises:
            ValueError: an array of another dtype or shape, something that is no picture, or a file
                that cannot be read as one.
        """
        if isinstance(images, Image.Image | str | os.PathLike):
            images = [images]
        if isinstance(images, np.ndarray | jax.Array):
            pixels = self._pixels_of_array(np.asarray(images), "images")
        elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
            rows = [self._pixels_of(image, f"images[{i}]") for i, image in enumerate(images)]
            pixels = np.concatenate([self._no_images(), *rows])
        else:
            raise ValueError(f"images: {_EXPECTED_PICTURES}, got {type(images).__name__}")
        return self._in_batches(self._encode_image, pixels)

    def encode_text(self, texts: str | Iterable[str] | np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: a string or several, or int32 [b, context_length] of `tokenize`.

        Returns:
            float32 [b, d], rows of unit length; b is 1 for a single string.

        Raises:
            ValueError: an array of another dtype or shape, something that is no string, or an id
                outside of the vocabulary.
        """
        tokens = texts
        if not isinstance(texts, np.ndarray | jax.Array) or texts.dtype.kind in "UO":
            if isinstance(texts, bytes | dict) or not isinstance(texts, Iterable):
                raise ValueError(
                    f"texts: expected a string, strings or int32 [b, {self.context_length}], got "
                    f"{type(texts).__name__}"
                )
            tokens = self.tokenize(texts if isinstance(texts, str) else list(texts))
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

    def _pixels_of(self, image: Picture, name: str) -> np.ndarray:
        """uint8 [1, size, size, 3] of one picture among several."""
        if isinstance(image, np.ndarray | jax.Array):
            array = np.asarray(image)
            if array.ndim == 4:
                raise ValueError(f"{name}: expected one picture, got {list(array.shape)}")
            return self._pixels_of_array(array, name)
        if isinstance(image, str | os.PathLike):
            try:
                image = decode_rgb(pathlib.Path(image).read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{name}: '{image}' cannot be read as a picture: {error}"
                ) from error
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name}: {_EXPECTED_PICTURES}, got {type(image).__name__}")
        return self.preprocess(image)[None]

    def _pixels_of_array(self, array: np.ndarray, name: str) -> np.ndarray:
        """uint8 [b, size, size, 3] of [b, h, w, 3], or of one picture [h, w, 3]."""
        is_picture = array.ndim in (3, 4) and array.shape[-1] == 3 and 0 not in array.shape[-3:]
        if array.dtype != np.uint8 or not is_picture:
            raise ValueError(
                f"{name}: expected uint8 [h, w, 3] or [b, h, w, 3] with values from 0 to 255, got "
                f"{array.dtype} {list(array.shape)}"
            )
        array = array[None] if array.ndim == 3 else array
        if array.shape[1:3] == (self.image_size, self.image_size):
            return array
        rows = [self.preprocess(Image.fromarray(image))[None] for image in array]
        return np.concatenate([self._no_images(), *rows])

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
