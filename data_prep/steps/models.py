"""Models that steps take embeddings from: in the worker or in actors that workers share.

A model is known by its files. Where it runs is decided in `data_prep.jobs.models`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from data_prep.duplicates import precomputed
from data_prep.jobs.models import is_shared, open_model
from diht_jax.input.transforms import (
    MAX_PIXELS,
    ImageError,
    Preprocessing,
    decode_rgb,
    eval_transform,
)
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage.hub import is_hub_name
from diht_jax.storage.stores import is_remote
from diht_jax.weights.releases import CONTAINED, HUB_MODELS, RELEASES, locate_weights

# Batches of candidates that a step takes at once, so that shared models have several under way.
BATCHES = 4


class Encoder:
    """A model that `diht_jax.load_model` reads, for pictures and captions.

    Its batches have one shape, filled up with what does not count, so that it is compiled once.
    """

    def __init__(self, model: str, batch_size: int, max_pixels: int = MAX_PIXELS):
        """Loads the model, or leaves that to who shares it.

        Args:
            model: for `diht_jax.load_model`.
            batch_size: pictures, or texts, that it gets at a time.
            max_pixels: of a picture that is decoded.
        """
        self._model = open_model(functools.partial(_load, model, batch_size))
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        if not is_shared():
            _ = self.pictures  # loading is no pair's fault, and no part of a step's time

    @functools.cached_property
    def pictures(self) -> tuple[int, Preprocessing]:
        """Side of the pictures that the model takes, in pixels, and how they are made."""
        (found,) = self._model.map("describe_pictures", [()])
        return found

    def embed_images(self, images: Sequence[bytes]) -> list[np.ndarray | str]:
        """Decodes pictures, while a shared model works on those before.

        Returns:
            float32 [d] of unit length for each, or the reason why it cannot be decoded.
        """
        found: list[np.ndarray | str] = [""] * len(images)
        readable: list[int] = []  # numbers of those that the model gets

        def decode() -> Iterator[tuple[np.ndarray, int]]:
            size, preprocessing = self.pictures
            for start in range(0, len(images), self._batch_size):
                shape = (self._batch_size, size, size, 3)
                pixels, count = np.zeros(shape, np.uint8), 0
                for number in range(start, min(start + self._batch_size, len(images))):
                    try:
                        decoded = decode_rgb(images[number], max_pixels=self._max_pixels)
                        picture = eval_transform(decoded, size, preprocessing)
                    except ImageError as error:
                        found[number] = error.reason
                        continue
                    pixels[count] = picture
                    readable.append(number)
                    count += 1
                if count:
                    yield pixels, count

        rows = itertools.chain.from_iterable(self._model.map("encode_images", decode()))
        for number, row in enumerate(rows):
            found[readable[number]] = row
        return found

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """float32 [d] of unit length for each text."""
        size = self._batch_size
        chunks = (list(texts[start : start + size]) for start in range(0, len(texts), size))
        filled = ((chunk + [""] * (size - len(chunk)), len(chunk)) for chunk in chunks)
        return list(itertools.chain.from_iterable(self._model.map("encode_texts", filled)))


class PictureEmbeddings:
    """Embeddings of the pictures of a shard: stored ones, by the keys of pairs, or a model's."""

    def __init__(
        self,
        source: SourceShard,
        stored: str | None,
        key: str,
        model: str | None,
        batch_size: int,
        max_pixels: int,
    ):
        """Reads what is stored of the shard, or loads the model.

        `stored` is the --output of `diht_jax.embed` on the input, which `key` of the config names;
        the others are those of `Encoder`.
        """
        self._source, self._where, self._missing = source, f"{key}='{stored}'", 0
        self._rows: Mapping[str, np.ndarray] = {}
        self._model: Encoder | None = None
        if stored is None:
            self._model = Encoder(str(model), batch_size, max_pixels)
        else:
            self._rows = precomputed.read_of_shard(stored, source)

    def embed(self, pairs: Sequence[Pair]) -> Sequence[np.ndarray | str | None]:
        """[d] of each; None where nothing is stored, a reason where a picture is not readable."""
        if self._model is not None:
            return self._model.embed_images([pair.image for pair in pairs])
        found = [self._rows.get(pair.key) for pair in pairs]
        self._missing += sum(row is None for row in found)
        return found

    def warn_of_missing(self, lacking: str) -> None:
        """Warns where pairs had no embedding, and so went on without a score, or a comparison."""
        if self._missing:
            logging.warning(
                "%s: %d pairs have no embedding in %s, and went on without %s",
                self._source,
                self._missing,
                self._where,
                lacking,
            )


class _Loaded:
    """The model where it runs; JAX is imported here only."""

    def __init__(self, model: str, batch_size: int):
        from diht_jax.loading import load_model

        self._model = load_model(model, batch_size=batch_size)

    def describe_pictures(self) -> tuple[int, Preprocessing]:
        """Their side in pixels, and their preprocessing."""
        return self._model.image_size, self._model.preprocessing

    def encode_images(self, pixels: np.ndarray, count: int) -> np.ndarray:
        """float32 [count, d] of the first of uint8 [b, size, size, 3]."""
        return self._model.encode_image(pixels)[:count]

    def encode_texts(self, texts: list[str], count: int) -> np.ndarray:
        """float32 [count, d] of the first texts."""
        return self._model.encode_text(texts)[:count]


@functools.lru_cache(maxsize=4)  # several steps may have a model of their own
def _load(model: str, batch_size: int) -> _Loaded:
    return _Loaded(model, batch_size)


@functools.lru_cache(maxsize=4)
def fingerprint(model: str, name: str) -> str:
    """Identifies a model without loading it: files by their bytes, a run by its last checkpoint.

    A released model is its name: its bytes are checked when it is loaded. So is a model of the hub,
    and one in a store. Starting a finished run again, or copying it, leaves it the same model.

    Args:
        model: for `diht_jax.load_model`.
        name: key of the config, for errors.

    Raises:
        ValueError: there is no such model.
    """
    digest = hashlib.blake2b(digest_size=16)
    if os.path.isfile(model):
        with open(model, "rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
    if not os.path.isdir(model):
        if model in CONTAINED:  # a new version of the package may have another
            return fingerprint(str(locate_weights(model) / "model.safetensors"), name)
        known = (*CONTAINED, *RELEASES, *HUB_MODELS)
        if model not in known and not is_remote(model) and not is_hub_name(model):
            raise ValueError(
                f"{name}='{model}': no such work directory or weight file, and no model of this "
                f"name ({', '.join(known)})"
            )
        return model
    from diht_jax.loading import identify_run

    if learnt := identify_run(model):
        digest.update(learnt.encode())
        return digest.hexdigest()
    for folder, folders, names in os.walk(model):
        folders.sort()
        for file_name in sorted(names):
            path = os.path.join(folder, file_name)
            digest.update(f"{os.path.relpath(path, model)}\n".encode("utf-8", "surrogatepass"))
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
