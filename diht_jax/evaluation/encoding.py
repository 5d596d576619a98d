"""From pairs and texts to embeddings, in batches of one shape, with decoding ahead of the device.

Called by `classification` and `retrieval`. Nothing here knows a metric, a task or a file: pairs
come in as an iterator, embeddings go out as NumPy arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
import PIL.Image

from diht_jax.data.images import ImageError, decode_rgb
from diht_jax.data.schema import Pair
from diht_jax.data.source import Skipped

# Decoded images waiting for the device, in batches: enough to keep the threads busy while one
# batch is on the device, small enough for the memory of a laptop.
_BATCHES_AHEAD = 2

_DROPPED_KEYS_KEPT = 10


class EmbeddingModel(Protocol):
    """What evaluation needs of a model; `diht_jax.loading.LoadedModel` is one."""

    @property
    def logit_scale(self) -> float: ...

    def encode_image(self, images: np.ndarray) -> np.ndarray: ...

    def encode_text(self, texts: Sequence[str]) -> np.ndarray: ...

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray: ...


class UnusablePair(ValueError):
    """Raised by a `describe` for a pair that the task cannot use; counted under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The usable images of a source, embedded, in the order of the source.

    Attributes:
        image_emb: float32 [n, d], L2-normalised.
        notes: n values, what `describe` returned for each usable pair.
        positions: n ints, the place of each usable pair among the entries, from 0.
        dropped: reason -> number of entries left out: "image_" + a reason of `data.images`, or the
            reason of a `Skipped` entry or an `UnusablePair`.
        dropped_keys: keys of the first few of them.
        seconds: wall time of reading, decoding and encoding together.
    """

    image_emb: np.ndarray
    notes: list[Any]
    positions: list[int]
    dropped: dict[str, int]
    dropped_keys: list[str]
    seconds: float


def encode_images(
    model: EmbeddingModel,
    entries: Iterable[Pair | Skipped],
    describe: Callable[[Pair], Any],
    *,
    batch_size: int,
    num_threads: int | None = None,
    allow_empty: bool = False,
) -> EncodedImages:
    """Embeds the image of every pair; a pair that cannot be used is counted with its reason.

    Threads decode and resize while the device works. All batches have one shape: the last one is
    filled up and what was filled in is cut off again, so each image counts exactly once.

    Args:
        model: see `EmbeddingModel`; uses all its devices.
        entries: consumed once, in order.
        describe: called once per pair, in order; what it returns is kept, so it should be small.
            Raises `UnusablePair` to leave a pair out, any other ValueError to stop.
        batch_size: images a batch, over all devices.
        num_threads: decoding threads; None is one per core, 16 at most.
        allow_empty: without any usable pair, return embeddings of shape [0, 0].

    Raises:
        ValueError: no usable pair at all, unless `allow_empty`; or an embedding that is not
            finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    start = time.perf_counter()
    embeddings, notes, positions = [], [], []
    dropped: collections.Counter[str] = collections.Counter()
    dropped_keys: list[str] = []
    waiting: list[np.ndarray] = []

    def encode_waiting() -> None:
        embeddings.append(_encode_padded(model.encode_image, waiting, batch_size, bool(embeddings)))
        waiting.clear()

    decoded = _decode_ahead(
        entries, describe, model.preprocess, batch_size * _BATCHES_AHEAD, num_threads
    )
    for position, (key, note, outcome) in enumerate(decoded):
        if isinstance(outcome, ImageError | UnusablePair | Skipped):
            prefix = "image_" if isinstance(outcome, ImageError) else ""
            dropped[f"{prefix}{outcome.reason}"] += 1
            if len(dropped_keys) < _DROPPED_KEYS_KEPT:
                dropped_keys.append(key)
            continue
        waiting.append(outcome)
        notes.append(note)
        positions.append(position)
        if len(waiting) == batch_size:
            encode_waiting()
    if waiting:
        encode_waiting()
    if not embeddings and not allow_empty:
        raise ValueError(
            f"no usable pair in the source: {dropped.total()} entries, left out for {dict(dropped)}"
        )
    image_emb = np.concatenate(embeddings or [np.zeros((0, 0), np.float32)])
    check_finite(image_emb, "image embeddings")
    return EncodedImages(
        image_emb=image_emb,
        notes=notes,
        positions=positions,
        dropped=dict(dropped),
        dropped_keys=dropped_keys,
        seconds=time.perf_counter() - start,
    )


def encode_texts(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    texts: Iterable[str],
    *,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yields [up to batch_size, d] embeddings of the texts, in order.

    Every call of `encode_text` gets the same number of texts (the last batch is filled up with
    empty ones), so a jitted encoder compiles once.
    """
    batch: list[str] = []
    full_batch_seen = False
    for text in texts:
        batch.append(text)
        if len(batch) == batch_size:
            yield check_finite(np.asarray(encode_text(batch), np.float32), "text embeddings")
            batch, full_batch_seen = [], True
    if batch:
        fill = [""] * (batch_size - len(batch)) if full_batch_seen else []
        last = np.asarray(encode_text(batch + fill), np.float32)[: len(batch)]
        yield check_finite(last, "text embeddings")


def check_finite(embeddings: np.ndarray, what: str) -> np.ndarray:
    """Returns `embeddings` [n, d] as they are; a NaN or infinity in them is a ValueError.

    A comparison with NaN is false both ways, so a diverged model would get arbitrary numbers.
    """
    bad = ~np.isfinite(embeddings).all(axis=-1)
    if bad.any():
        raise ValueError(
            f"{what}: {bad.sum()} of {len(bad)} rows are not finite (first at {bad.argmax()}); "
            "the model has diverged or its weights are broken"
        )
    return embeddings


def _encode_padded(
    encode: Callable[[np.ndarray], np.ndarray],
    images: list[np.ndarray],
    batch_size: int,
    full_batch_seen: bool,
) -> np.ndarray:
    batch = np.stack(images)
    # A source smaller than one batch needs no filling: nothing has been compiled for it yet.
    if full_batch_seen and len(batch) < batch_size:
        fill = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
        batch = np.concatenate([batch, fill])
    return np.asarray(encode(batch), np.float32)[: len(images)]


def _decode_ahead(
    entries: Iterable[Pair | Skipped],
    describe: Callable[[Pair], Any],
    preprocess: Callable[[PIL.Image.Image], np.ndarray],
    window: int,
    num_threads: int | None,
) -> Iterator[tuple[str, Any, np.ndarray | ImageError | UnusablePair | Skipped]]:
    """Yields (key, note, pixels or why there are none) in order, up to `window` images in work."""

    def decode(data: bytes) -> np.ndarray | ImageError:
        try:
            return preprocess(decode_rgb(data))
        except ImageError as error:
            return error

    pool = futures.ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 16))
    queue: collections.deque[tuple[str, Any, Any]] = collections.deque()

    def take_first():
        key, note, outcome = queue.popleft()
        return key, note, outcome.result() if isinstance(outcome, futures.Future) else outcome

    try:
        for entry in entries:
            if isinstance(entry, Skipped):
                queue.append((entry.key, None, entry))
            else:
                try:
                    note = describe(entry)
                    queue.append((entry.key, note, pool.submit(decode, entry.image)))
                except UnusablePair as unusable:
                    queue.append((entry.key, None, unusable))
            if len(queue) > window:
                yield take_first()
        while queue:
            yield take_first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
