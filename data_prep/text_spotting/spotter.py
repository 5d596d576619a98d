"""Text-spotting, the T of CAT: drops pairs whose picture shows the caption as text.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". `match` holds the
match decision as pure functions, `ocr` runs EasyOCR, `readings` stores results. Reading input files
and writing records do not belong here.

Ours: the order of work. A caption that OCR could not output is skipped at no cost. A first look at
low resolution skips pictures without any text; a sample of them is read anyway to count what
the first look misses. Lines are read in order of promise until the captions match. If text is
detected but hardly any of it can be read, a closer look follows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import ml_collections
import numpy as np

from data_prep.text_spotting import readings
from data_prep.text_spotting.match import can_match, caption_matches
from data_prep.text_spotting.networks import OcrSettings
from data_prep.text_spotting.ocr import Box, Ocr, Shrunk, crop_line, shrink
from data_prep.text_spotting.settings import Settings
from diht_jax.input import transforms as images

__all__ = ["Settings", "Spot", "TextSpotter", "Verdict", "caption_matches"]

# Maximum number of decoded pixels held at a time, to bound memory.
_MAX_WINDOW_PIXELS = 2**26
# The first look is taken only if detection has more than this many times its pixels.
_GATE_GAIN = 1.5


@dataclasses.dataclass(frozen=True)
class Spot:
    """One line of text in a picture.

    Attributes:
        box: in px, see `ocr.Box`.
        text: the text, or None if it was not read.
        confidence: of the text, 0 to 1, or None if it was not read.
    """

    box: Box
    text: str | None
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision about one picture and its captions.

    Attributes:
        matches: for each caption, the spotted text of one or several lines that repeats it, or
            None.
        looked: "no_run" if OCR could not output any caption, "gated" if the first look saw no
            text, "read" if lines were detected or the picture could not be decoded.
        audited: whether it was read although the first look saw no text.
        spots: lines of the last look that was needed, in the detector's order.
        error: why the picture could not be decoded.
    """

    matches: tuple[str | None, ...]
    looked: str
    audited: bool = False
    spots: tuple[Spot, ...] = ()
    error: images.ImageError | None = None

    @property
    def missed(self) -> bool:
        """Whether the first look would have missed a match."""
        return self.audited and any(match is not None for match in self.matches)


class TextSpotter:
    """Decides for each picture whether it shows its captions."""

    def __init__(self, settings: Settings, cache: readings.SpotCache | None = None):
        """Stores the settings. The networks are loaded when the first picture has to be read.

        The cache, if any, must have been opened with the same settings.
        """
        self.settings = settings
        self._cache = cache

    def judge(self, data: Sequence[bytes], captions: Sequence[Sequence[str]]) -> list[Verdict]:
        """Reads encoded pictures, each only as far as its captions require.

        Verdicts depend neither on batching nor on the cache.

        Raises:
            ValueError: EasyOCR or its weights are missing.
        """
        pictures = [
            _Picture(one, texts, self.settings) for one, texts in zip(data, captions, strict=True)
        ]
        for window in _windows([p for p in pictures if p.captions], self.settings.window):
            self._read(window)
        return [picture.verdict() for picture in pictures]

    def _read(self, pictures: list[_Picture]) -> None:
        s = self.settings
        if self._cache is not None:
            for picture in pictures:
                picture.reading = self._cache.get(picture.hash)
        unseen = [p for p in pictures if s.gate_size and s.gate_size not in p.reading.peaks]
        self._gate([p for p in unseen if p.decode()])
        for size in (s.ocr.canvas_size, s.closer_size):
            seen = [p for p in pictures if p.needs_look(size)]
            self._detect([p for p in seen if size not in p.reading.looks and p.decode()], size)
            lines = 1
            while waiting := [
                p for p in seen if p.is_open() and p.next_lines(size, lines) and p.decode()
            ]:
                self._read_lines(waiting, size, lines)
                lines *= 2
        if self._cache is not None:
            for picture in pictures:
                if picture.error is None:
                    self._cache.put(picture.hash, picture.reading)
            self._cache.flush()
        for picture in pictures:
            picture.forget_pixels()

    def _gate(self, pictures: list[_Picture]) -> None:
        size = self.settings.gate_size
        gates = [p.shrink(size) for p in pictures]
        shrunk = []
        for picture, gate in zip(pictures, gates, strict=True):
            picture.reading.peaks[size] = 1.0  # stays if the picture is too small to gain by a look
            canvas = picture.shrink(self.settings.ocr.canvas_size)
            if canvas.pixels.size > _GATE_GAIN * gate.pixels.size:
                shrunk.append((picture, gate))
        if shrunk:
            peaks = self._ocr.peaks([gate for _, gate in shrunk], size, self.settings.batch_size)
            for (picture, _), peak in zip(shrunk, peaks, strict=True):
                # Rounded, so that cached and new values compare equally.
                picture.reading.peaks[size] = round(peak, 4)

    def _detect(self, pictures: list[_Picture], size: int) -> None:
        if pictures:
            canvases = [p.shrink(size) for p in pictures]
            maps = self._ocr.heat_maps(canvases, size, self.settings.batch_size)
            for picture, heat in zip(pictures, maps, strict=True):
                boxes = self._ocr.find_boxes(heat)
                picture.reading.looks[size] = readings.Lines(boxes, [None] * len(boxes))
                picture.reading.peaks[size] = round(float(heat.text.max()), 4)

    def _read_lines(self, pictures: list[_Picture], size: int, count: int) -> None:
        wanted = [
            (picture, picture.reading.looks[size], i)
            for picture in pictures
            for i in picture.next_lines(size, count)
        ]
        crops = [crop_line(np.asarray(picture.grey), look.boxes[i]) for picture, look, i in wanted]
        read = self._ocr.read(crops, self.settings.batch_size)
        for (_, look, i), (text, confidence) in zip(wanted, read, strict=True):
            look.texts[i] = (text, round(confidence, 4))

    @functools.cached_property
    def _ocr(self) -> Ocr:
        return Ocr(self.settings.ocr)


def open_spotter(config: ml_collections.ConfigDict, max_pixels: int, shard: str) -> TextSpotter:
    """Opens the spotter of one shard, with its cache file, from the config section `spotter`.

    Raises:
        ValueError: a cache is set, but EasyOCR is missing or a setting is not supported.
    """
    values = config.to_dict() | {"max_pixels": max_pixels}
    cache = values.pop("cache")
    ocr = {field.name: values.pop(field.name) for field in dataclasses.fields(OcrSettings)}
    settings = Settings(ocr=OcrSettings(**ocr), **values)
    if cache is None:
        return TextSpotter(settings)
    return TextSpotter(settings, readings.SpotCache(cache, settings.describe_readings(), shard))


class _Picture:
    """The state of one picture during `TextSpotter.judge`."""

    def __init__(self, data: bytes, captions: Sequence[str], settings: Settings):
        self._data = data
        self._settings = settings
        self._all_captions = tuple(captions)
        self.captions = tuple(c for c in captions if can_match(c, settings.min_chars))
        self.hash = readings.hash_image(data) if self.captions else ""
        self.reading = readings.Reading()
        self.error: images.ImageError | None = None
        self.forget_pixels()

    def decode(self) -> bool:
        """Decodes the pixels. Returns False if that fails."""
        if self.error is None and self.grey is None:
            import cv2

            try:
                pixels = self._decode()
            except images.ImageError as error:
                self.error = error
                return False
            self.grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
            sizes = (self._settings.gate_size, self._settings.ocr.canvas_size)
            self._shrunk = {size: shrink(pixels, size) for size in sizes if size}
        return self.error is None

    def forget_pixels(self) -> None:
        """Frees the memory that `decode` took."""
        self.grey: np.ndarray | None = None
        self._shrunk: dict[int, Shrunk] = {}

    def shrink(self, size: int) -> Shrunk:
        """Returns the decoded picture with a longer side of at most `size` px."""
        if size in self._shrunk:
            return self._shrunk[size]
        # Few pictures need a closer look: decoding them again is cheaper than keeping all pixels.
        return shrink(self._decode(), size)

    def _decode(self) -> np.ndarray:
        rgb = images.decode_rgb(self._data, max_pixels=self._settings.max_pixels)
        return np.ascontiguousarray(np.asarray(rgb)[..., ::-1])

    def read_size(self) -> tuple[int, int]:
        """Returns width and height in px from the header, or zeros if it is unreadable."""
        try:
            return images.open_image(self._data, max_pixels=self._settings.max_pixels).size
        except images.ImageError:
            return 0, 0

    @property
    def shows_text(self) -> bool:
        """Whether the first look saw text; True if there is no first look."""
        s = self._settings
        return not s.gate_size or self.reading.peaks.get(s.gate_size, 0.0) >= s.gate_score

    @property
    def is_audited(self) -> bool:
        """Whether the picture was skipped by the first look but is sampled to be read anyway."""
        if self.shows_text or not self.captions:
            return False
        # A hash serves as a random number that is the same in every run.
        return int(self.hash, 16) < self._settings.audit_share * 2**128

    def needs_look(self, size: int) -> bool:
        """Returns whether a look at resolution `size` is needed, given those before it."""
        s = self._settings
        first = s.ocr.canvas_size
        if self.error is not None or not (self.shows_text or self.is_audited):
            return False
        if size == first:
            return True
        look = self.reading.looks.get(first)
        return (
            size > first
            and look is not None
            and self.reading.peaks[first] >= s.closer_score
            and readings.count_sure_chars(look) < s.closer_chars
            and not (s.stop_at_match and self._is_matched([look]))
            and max(self.read_size()) > first
        )

    def is_open(self) -> bool:
        """Returns whether more lines have to be read."""
        return not (self._settings.stop_at_match and self._is_matched(self.reading.looks.values()))

    def next_lines(self, size: int, count: int) -> list[int]:
        """Returns the `count` most promising unread lines of a look."""
        look = self.reading.looks.get(size)
        if look is None:  # the picture cannot be decoded
            return []
        return [i for i in readings.rank_lines(look) if look.texts[i] is None][:count]

    def verdict(self) -> Verdict:
        """Returns the verdict for what has been read so far."""
        if not self.captions:
            return Verdict((None,) * len(self._all_captions), "no_run")
        if self.error is not None:
            return Verdict((None,) * len(self._all_captions), "read", error=self.error)
        s = self._settings
        sizes = (s.ocr.canvas_size, s.closer_size)
        looks = [self.reading.looks[size] for size in sizes if self.needs_look(size)]
        if looks and self._is_matched(looks[:1]):
            looks = looks[:1]
        matches = tuple(
            self._find_match(looks, c) if c in self.captions else None for c in self._all_captions
        )
        spots = ()
        if looks:
            pairs = zip(looks[-1].boxes, looks[-1].texts, strict=True)
            spots = tuple(Spot(box, *(text or (None, None))) for box, text in pairs)
        looked = "read" if self.shows_text else "gated"
        return Verdict(matches, looked, self.is_audited, spots)

    def _find_match(self, looks: Iterable[readings.Lines], caption: str) -> str | None:
        found = (readings.find_match(look, caption, self._settings) for look in looks)
        return next((text for text in found if text is not None), None)

    def _is_matched(self, looks: Iterable[readings.Lines]) -> bool:
        looks = list(looks)
        return all(self._find_match(looks, caption) is not None for caption in self.captions)


def _windows(pictures: Iterable[_Picture], size: int) -> Iterable[list[_Picture]]:
    """Groups pictures, in order, within the memory limit and at most `size` at a time."""
    window, pixels = [], 0
    for picture in pictures:
        more = math.prod(picture.read_size())
        if window and (len(window) == size or pixels + more > _MAX_WINDOW_PIXELS):
            yield window
            window, pixels = [], 0
        window.append(picture)
        pixels += more
    if window:
        yield window
