"""A model for embedding images and texts, on all devices of its mesh.

`diht_jax.load_model` creates it from files. This module reads no files except pictures given by
path.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diht_jax import sharding
from diht_jax.data import tokenizer
from diht_jax.extras.captioning import decode_captions, merge_decoder
from diht_jax.input import transforms
from diht_jax.input.transforms import Preprocessing, decode_rgb, load_rgb
from diht_jax.models.parameters import ModelDefinition, merge_model
from diht_jax.weights.source import LOGIT_BIAS, ModelFiles

# A picture: a PIL image, the path of a file, or uint8 [h, w, 3].
Picture = Image.Image | str | os.PathLike | np.ndarray
_EXPECTED_PICTURES = "expected PIL images, paths of pictures, or uint8 arrays [h, w, 3]"


class LoadedModel:
    """Encodes images and texts into the shared, L2-normalised space.

    Attributes:
        config: the training config that the model came with.
        image_size: side of the input images, in pixels.
        context_length: length of the input texts, in tokens.
        embed_dim: size `d` of the embeddings.
        preprocessing: of the images.
        step: optimiser step of the parameters, or None.
        logit_bias: learnt with SigLIP's loss: logits are `logit_scale * similarity + logit_bias`,
            and their sigmoid is the probability of a pair; 0 for other losses.
    """

    def __init__(
        self, definition: ModelDefinition, model: ModelFiles, mesh: Mesh, *, batch_size: int = 256
    ):
        """Wraps a model whose parameters are on the devices.

        Args:
            definition: how the model computes.
            model: everything else, in the dtype of its config.
            mesh: devices, with axes `data` and `fsdp`.
            batch_size: maximum examples per batch, over all devices.
        """
        self.config, self.step = model.config, model.step
        self.logit_bias = model.loss_scalars.get(LOGIT_BIAS, 0.0)
        self.image_size, self.context_length = model.arch.image_size, model.arch.context_length
        self.embed_dim, self._vocab_size = model.arch.embed_dim, model.arch.vocab_size
        self.preprocessing = model.preprocessing
        self._params, self._decoder = model.params, model.decoder
        self._has_tokenizer, self._own_tokenizer = model.has_tokenizer, model.tokenizer
        self._batch_sharding = sharding.batch_sharding(mesh)
        self._num_devices = mesh.size
        self._batch_size = math.ceil(batch_size / mesh.size) * mesh.size
        dtype = jnp.dtype(model.config.model.dtype)
        whole = sharding.replicated(mesh)
        mean, std = self.preprocessing.mean, self.preprocessing.std

        def encode_image(params, images):
            pixels = transforms.normalize(images, dtype, mean=mean, std=std)
            return merge_model(definition, params).encode_image(pixels)

        def encode_text(params, tokens):
            return merge_model(definition, params).encode_text(tokens)

        def write_captions(
            params, decoder_params, images, rows, key, *, length, top_k, temperature
        ):
            pixels = transforms.normalize(images, dtype, mean=mean, std=std)
            image_tokens = merge_model(definition, params).vision.tokens(pixels)
            decoder = merge_decoder(decoder_params, definition.arch, dtype=dtype)
            # A key per picture, so that a caption depends neither on the batch nor on the devices.
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
            return decode_captions(
                decoder,
                image_tokens,
                keys,
                start_id=self._used_vocab_size - 2,
                end_id=self._used_vocab_size - 1,
                length=length,
                top_k=top_k,
                temperature=temperature,
            )

        self._encode_image = jax.jit(encode_image, out_shardings=whole)
        self._encode_text = jax.jit(encode_text, out_shardings=whole)
        self._write_captions = jax.jit(
            write_captions, static_argnames=("length", "top_k"), out_shardings=whole
        )

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, after exp."""
        return float(np.exp(np.asarray(self._params["log_logit_scale"], np.float64)))

    def update(self, params: dict[str, Any], step: int | None) -> None:
        """Replaces the parameters by those of another step; equal shapes avoid recompilation."""
        self._params = params
        self.step = step

    def fingerprint(self, *, decoder: bool = False) -> str:
        """SHA-256 over names, shapes and float32 values of all parameters, in hex.

        It is the same for equal parameters in any file, format or placement. Preprocessing and
        tokenizer are included if they are not CLIP's.

        Args:
            decoder: include the caption decoder, which does not affect embeddings.
        """
        params = (self._params, self._decoder) if decoder else self._params
        digest = hashlib.sha256()
        if self.preprocessing != Preprocessing():
            digest.update(f"{self.preprocessing}\n".encode())
        if self._own_tokenizer is not None:
            digest.update(f"{self._own_tokenizer.describe()}\n".encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            digest.update(f"{name} {tuple(leaf.shape)}\n".encode())
            digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).data)
        return digest.hexdigest()

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Converts a PIL image of any size and mode to uint8 [size, size, 3].

        Transparency is composed on white, as in training. Depending on the model, the short side is
        then resized and the centre cropped, or both sides are resized.
        """
        return transforms.eval_transform(load_rgb(image), self.image_size, self.preprocessing)

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Converts texts to int32 [b, context_length]."""
        if self._own_tokenizer is not None:
            return self._own_tokenizer.tokenize(texts, self.context_length)
        return tokenizer.tokenize(texts, self.context_length, self._used_vocab_size)

    def encode_image(self, images: Picture | Iterable[Picture]) -> np.ndarray:
        """Embeds images.

        Args:
            images: one picture or several: PIL images, paths of files, uint8 arrays [h, w, 3], or
                one array [b, h, w, 3]. Pictures of another size than [image_size, image_size] are
                preprocessed.

        Returns:
            float32 [b, d], rows of unit length; b is 1 for a single picture.

        Raises:
            ValueError: an array of another dtype or shape, an object that is no picture, or a file
                that cannot be decoded.
        """
        return self._embed(self._encode_image, self._pixels_of_all(images))

    def encode_text(self, texts: str | Iterable[str] | np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: a string or several, or int32 [b, context_length] from `tokenize`.

        Returns:
            float32 [b, d], rows of unit length; b is 1 for a single string.

        Raises:
            ValueError: an array of another dtype or shape, an object that is no string, or an id
                outside of the vocabulary.
        """
        tokens: Any = texts
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
        return self._embed(self._encode_text, np.asarray(tokens))

    def caption(
        self,
        images: Picture | Iterable[Picture],
        *,
        max_tokens: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Writes a caption for each picture, with a model trained with `config.captioning`.

        Args:
            images: see `encode_image`.
            max_tokens: maximum tokens of a caption, without its end; by default as many as in
                training.
            top_k: number of most likely tokens to sample each token from, by their probabilities;
                None takes the most likely one (greedy).
            temperature: divisor of the logits before sampling.
            seed: of the sampling; a picture at the same index gets the same caption.

        Returns:
            One text per picture, in lower case, with spaces between words and punctuation.

        Raises:
            ValueError: the model has no decoder, or a value is out of range; see `encode_image`.
        """
        if self._decoder is None:
            raise ValueError(
                "this model has no caption decoder: it was trained without config.captioning.weight"
            )
        vocab_size = self._used_vocab_size
        most = self._decoder["positional_embedding"].shape[0] - 2
        max_tokens = most if max_tokens is None else max_tokens
        if not 1 <= max_tokens <= most:
            raise ValueError(f"max_tokens={max_tokens}: expected 1 to {most}")
        if top_k is not None and not 1 <= top_k <= self._vocab_size:
            raise ValueError(f"top_k={top_k}: expected 1 to {self._vocab_size}, or None")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: expected a number above 0")
        write = functools.partial(
            self._write_captions,
            key=jax.random.key(seed),
            length=max_tokens + 1,  # includes the start token; an end after the last is not needed
            top_k=top_k,
            temperature=temperature,
        )
        pixels = self._pixels_of_all(images)
        written = [np.zeros((0, 1), np.int32)]
        rows = np.arange(len(pixels), dtype=np.int32)
        for batch, batch_rows in zip(self._batches(pixels), self._batches(rows), strict=True):
            written.append(np.asarray(write(self._params, self._decoder, batch, batch_rows)))
        rows = [tokenizer.decode(row, vocab_size) for part in written for row in part]
        return rows[: len(pixels)]

    @property
    def _used_vocab_size(self) -> int:
        """Vocabulary entries that the tokenizer uses; raises ValueError without a tokenizer."""
        if not self._has_tokenizer:
            raise ValueError(
                f"this model's vocabulary of {self._vocab_size} entries is not CLIP's, and no "
                "tokenizer's file is in the folder of its weights; copy it there, or tokenize "
                "texts elsewhere and give `encode_text` the ids"
            )
        return tokenizer.check_vocab_size(self._vocab_size)

    def _pixels_of_all(self, pictures: Picture | Iterable[Picture]) -> np.ndarray:
        """Converts inputs of `encode_image` to uint8 [b, size, size, 3]."""
        images: Any = pictures
        shape = (self.image_size, self.image_size, 3)
        is_array = isinstance(images, np.ndarray | jax.Array)
        if is_array and images.shape[1:] == shape and images.dtype == np.uint8:
            return np.asarray(images)
        if isinstance(images, Image.Image | str | os.PathLike) or (is_array and images.ndim < 4):
            images = [images]
        if not isinstance(images, Iterable) or isinstance(images, bytes | dict):
            raise ValueError(f"images: {_EXPECTED_PICTURES}, got {type(images).__name__}")
        rows = [self._pixels_of(image, f"images[{i}]") for i, image in enumerate(images)]
        return np.reshape(np.asarray(rows, np.uint8), (len(rows), *shape))

    def _pixels_of(self, image: Picture, name: str) -> np.ndarray:
        """Converts one picture to uint8 [size, size, 3]."""
        if isinstance(image, np.ndarray | jax.Array):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(
                    f"{name}: expected uint8 [h, w, 3] with values from 0 to 255, got "
                    f"{image.dtype} {list(image.shape)}"
                )
            if image.shape[:2] == (self.image_size, self.image_size):
                return image
            image = Image.fromarray(image)
        elif isinstance(image, str | os.PathLike):
            try:
                image = decode_rgb(pathlib.Path(image).read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{name}: '{image}' cannot be read as a picture: {error}"
                ) from error
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name}: {_EXPECTED_PICTURES}, got {type(image).__name__}")
        return self.preprocess(image)

    def _embed(self, encode: Callable[..., jax.Array], inputs: np.ndarray) -> np.ndarray:
        outputs = [np.zeros((0, self.embed_dim), np.float32)]
        for batch in self._batches(inputs):
            outputs.append(np.asarray(encode(self._params, batch)))
        return np.concatenate(outputs)[: len(inputs)]

    def _batches(self, inputs: np.ndarray) -> Iterator[jax.Array]:
        """Yields batches of rows, on the devices; the last one is padded."""
        for start in range(0, len(inputs), self._batch_size):
            chunk = inputs[start : start + self._batch_size]
            # Padded to a power-of-two multiple of the devices: few shapes, so few compilations.
            size = self._num_devices
            while size < len(chunk):
                size *= 2
            padding = min(size, self._batch_size) - len(chunk)
            padded = np.pad(chunk, [(0, padding)] + [(0, 0)] * (chunk.ndim - 1))
            # By global index: each process places the rows of its own devices.
            yield jax.make_array_from_callback(
                padded.shape, self._batch_sharding, padded.__getitem__
            )
