"""From pairs and texts to embeddings, in batches of one shape, with decoding ahead of the device.

Nothing here knows a metric, a task or a file: pairs come in as an iterator, embeddings go out as
NumPy arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
import PIL.Image
from jax.experimental import multihost_utils

from diht_jax.data.images.decode import REASONS, ImageError, decode_rgb
from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair
from diht_jax.progress import ProgressBar

# Decoded images waiting for the device, in batches: enough to keep the threads busy while one
# batch is on the device, small enough for the memory of a laptop.
_BATCHES_AHEAD = 2

# Of encoded images that wait for a thread; an ordinary window takes a tenth of it.
_WAITING_BYTES = 2**28

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
        positions: n ints, the index of each usable pair among the entries.
        dropped: reason -> number of entries left out: "image_" + a reason of `data.images.decode`,
            reason of a `Skipped` entry or an `UnusablePair`.
        dropped_keys: keys of the first few of them.
        seconds: wall time of reading, decoding and encoding together.
        digest: of the keys of the usable pairs, in order: equal where two models saw the same.
    """

    image_emb: np.ndarray
    notes: list[Any]
    positions: list[int]
    dropped: dict[str, int]
    dropped_keys: list[str]
    seconds: float
    digest: str = ""


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
    share = _Share.of(model, batch_size)
    embeddings, notes, positions, keys = [], [], [], []
    left_out: list[tuple[int, str, str]] = []
    waiting: list[np.ndarray] = []

    def encode_waiting() -> None:
        fill = bool(embeddings) or share is not None
        embeddings.append(_encode_padded(model.encode_image, waiting, batch_size, fill))
        waiting.clear()

    decoded = _decode_ahead(
        entries, describe, model.preprocess, batch_size * _BATCHES_AHEAD, num_threads, share
    )
    for position, (key, note, outcome) in enumerate(decoded):
        if share is not None and not isinstance(outcome, UnusablePair | Skipped):
            outcome = share.take(key, outcome)
        if isinstance(outcome, ImageError | UnusablePair | Skipped):
            prefix = "image_" if isinstance(outcome, ImageError) else ""
            left_out.append((position, key, f"{prefix}{outcome.reason}"))
            continue
        waiting.append(outcome)
        notes.append(note)
        positions.append(position)
        keys.append(key)
        if len(waiting) == batch_size:
            encode_waiting()
    if waiting:
        encode_waiting()
    image_emb = np.concatenate(embeddings or [np.zeros((0, 0), np.float32)])
    if share is not None:
        for slot, reason in share.failures_of_all():
            left_out.append((positions[slot], share.keys[slot], f"image_{reason}"))
        image_emb, notes, positions, keys = share.usable(image_emb, notes, positions, keys)
    left_out.sort()
    dropped = dict(collections.Counter(reason for _, _, reason in left_out))
    if not len(image_emb) and not allow_empty:
        raise ValueError(
            f"no usable pair in the source: {len(left_out)} entries, left out for {dropped}"
        )
    check_finite(image_emb, "image embeddings")
    return EncodedImages(
        image_emb=image_emb,
        notes=notes,
        positions=positions,
        dropped=dropped,
        dropped_keys=[key for _, key, _ in left_out[:_DROPPED_KEYS_KEPT]],
        seconds=time.perf_counter() - start,
        digest=hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest(),
    )


def encode_texts(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    texts: Collection[str],
    *,
    batch_size: int,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """Yields [up to batch_size, d] embeddings of the texts, in order.

    Every call of `encode_text` gets the same number of texts (the last batch is filled up with
    empty ones), so a jitted encoder compiles once. `progress` shows a bar on stderr, where there
    is more than one batch.
    """
    remaining = iter(texts)
    hidden = not progress or len(texts) <= batch_size
    with ProgressBar(total=len(texts), desc="texts", unit=" texts", disable=hidden) as bar:
        while batch := list(itertools.islice(remaining, batch_size)):
            fill = [""] * (batch_size - len(batch)) if len(texts) > batch_size else []
            embedded = np.asarray(encode_text(batch + fill), np.float32)[: len(batch)]
            bar.update(len(batch))
            yield check_finite(embedded, "text embeddings")


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


class _Share:
    """This process's share of the decoding, where the model lies on several processes.

    All processes read all entries, which costs little, and know from them which pairs there are.
    Each decodes the pictures of the rows that its devices embed; rows of others, and pictures that
    could not be decoded, are blank. What failed is exchanged once, at the end.

    Attributes:
        keys: of the pairs so far, by slot: the index among the pairs that take up a row.
    """

    def __init__(self, own_rows: np.ndarray, blank: np.ndarray):
        self.keys: list[str] = []
        self._own_rows = own_rows
        self._blank = blank
        self._failed: dict[int, str] = {}
        self._failed_anywhere = np.zeros(0, np.int8)

    @classmethod
    def of(cls, model: EmbeddingModel, batch_size: int) -> _Share | None:
        """None where this process has all rows."""
        find_rows = getattr(model, "own_rows", None)
        own_rows = None if find_rows is None else find_rows(batch_size)
        if own_rows is None:
            return None
        size = model.image_size
        return cls(own_rows, np.zeros((size, size, 3), np.uint8))

    def has(self, slot: int) -> bool:
        """Whether this process decodes the pair of a slot."""
        return bool(self._own_rows[slot % len(self._own_rows)])

    def take(self, key: str, outcome: np.ndarray | ImageError | None) -> np.ndarray:
        """The row of the next slot; notes where it could not be decoded."""
        slot = len(self.keys)
        self.keys.append(key)
        if isinstance(outcome, ImageError):
            self._failed[slot] = outcome.reason
        return outcome if isinstance(outcome, np.ndarray) else self._blank

    def failures_of_all(self) -> list[tuple[int, str]]:
        """Slots and reasons of what no process could decode. All processes must call."""
        codes = np.zeros(len(self.keys), np.int8)
        for slot, reason in self._failed.items():
            codes[slot] = 1 + REASONS.index(reason)
        if len(codes):
            codes = np.asarray(multihost_utils.process_allgather(codes)).max(axis=0)
        self._failed_anywhere = codes
        return [(int(slot), REASONS[codes[slot] - 1]) for slot in np.flatnonzero(codes)]

    def usable(
        self, image_emb: np.ndarray, *lists: list[Any]
    ) -> tuple[np.ndarray, list[Any], list[Any], list[Any]]:
        """What is left of them without the failures."""
        kept = np.flatnonzero(self._failed_anywhere == 0)
        return image_emb[kept], *([values[i] for i in kept] for values in lists)


def _encode_padded(
    encode: Callable[[np.ndarray], np.ndarray],
    images: list[np.ndarray],
    batch_size: int,
    fill_up: bool,
) -> np.ndarray:
    batch = np.stack(images)
    # A source smaller than one batch needs no filling: nothing has been compiled for it yet.
    if fill_up and len(batch) < batch_size:
        fill = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
        batch = np.concatenate([batch, fill])
    return np.asarray(encode(batch), np.float32)[: len(images)]


def _decode_ahead(
    entries: Iterable[Pair | Skipped],
    describe: Callable[[Pair], Any],
    preprocess: Callable[[PIL.Image.Image], np.ndarray],
    window: int,
    num_threads: int | None,
    share: _Share | None,
) -> Iterator[tuple[str, Any, np.ndarray | ImageError | UnusablePair | Skipped | None]]:
    """Yields (key, note, pixels or why there are none) in order, up to `window` images in work.

    Fewer are in work where their encoded bytes take much memory. None stands for the pixels that
    another process decodes.
    """

    def decode(data: bytes) -> np.ndarray | ImageError:
        try:
            return preprocess(decode_rgb(data))
        except ImageError as error:
            return error

    pool = futures.ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 16))
    queue: collections.deque[tuple[str, Any, Any, int]] = collections.deque()
    slot = waiting_bytes = 0
    try:
        for entry in itertools.chain(entries, [None]):
            size = 0
            if isinstance(entry, Skipped):
                queue.append((entry.key, None, entry, size))
            elif entry is not None:
                try:
                    note = describe(entry)
                    work = None
                    if share is None or share.has(slot):
                        work, size = pool.submit(decode, entry.image), len(entry.image)
                    queue.append((entry.key, note, work, size))
                    slot += 1
                except UnusablePair as unusable:
                    queue.append((entry.key, None, unusable, size))
            waiting_bytes += size
            while queue and (
                entry is None or len(queue) > window or waiting_bytes > _WAITING_BYTES
            ):
                key, note, outcome, size = queue.popleft()
                waiting_bytes -= size
                is_work = isinstance(outcome, futures.Future)
                yield key, note, outcome.result() if is_work else outcome
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
