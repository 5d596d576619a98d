"""Text-spotting, the T of CAT: drop pairs whose picture shows the caption as text.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". The match decision
is pure and lives in `match`, EasyOCR in `ocr`, results on disk in `cache`; how files are read and
records written must not come in.

Ours: the order of work. A caption that no spotter could read costs nothing. A look at low
resolution skips pictures without a trace of text; a sample of those is read all the same,
so that what the look misses is counted. Lines are read from the most promising on, until one
matches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.text_spotting.cache import Reading, SpotCache, hash_image
from data_prep.text_spotting.lines import stack_lines
from data_prep.text_spotting.match import can_match, caption_matches
from data_prep.text_spotting.networks import OcrSettings
from data_prep.text_spotting.ocr import (
    Box,
    Ocr,
    Shrunk,
    box_size,
    crop_line,
    load_ocr,
    resolve_for_networks,
    shrink,
)
from data_prep.text_spotting.weights import easyocr_version
from diht_jax.data.images import decode as images

__all__ = ["Settings", "Spot", "TextSpotter", "Verdict", "caption_matches"]

# Decoded pixels that are held at a time, so that large pictures do not fill the memory.
_MAX_WINDOW_PIXELS = 2**26
# How many times the pixels of the first look detection must take for the look to be worth it.
_GATE_GAIN = 1.5
# A line of fewer heights than this in width can hardly hold five letters.
_WORD_ASPECT = 1.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are read and what counts as a match; the defaults are calibrated.

    docs/benchmarks.md shows the curves that they come from.

    Attributes:
        ocr: of the networks.
        gate_size: px of the longer side at the first look; 0 for no first look.
        gate_score: character score (0 to 1) at the first look from which a picture is read.
        audit_share: of the pictures that the first look skips, how many are read anyway.
        min_confidence: of a line (0 to 1) to count.
        min_chars: length of the run that a line must share with the caption.
        misread_min_chars: length of such a run with one character misread; None allows none.
        weigh_words: whether a run is weighed by the words it lies in (`match.caption_matches`).
        join_lines: whether lines that stand under one another are matched as one text as well.
        stop_at_match: leave the other lines unread once one has matched.
        window: pictures that are decoded and looked at together, unless they are very large;
            batches are made of those of like size among them.
        batch_size: most pictures that the networks take at once.
        max_pixels: of a picture that is still decoded.
    """

    ocr: OcrSettings = OcrSettings()
    gate_size: int = 160
    gate_score: float = 0.03
    audit_share: float = 0.01
    min_confidence: float = 0.1
    min_chars: int = 5
    misread_min_chars: int | None = None
    weigh_words: bool = True
    join_lines: bool = True
    stop_at_match: bool = True
    window: int = 256
    batch_size: int = 32
    max_pixels: int = images.MAX_PIXELS

    def describe_readings(self) -> dict[str, Any]:
        """All that a reading depends on, JSON-able: the settings of a `SpotCache`.

        Raises:
            ValueError: EasyOCR is missing, or a setting cannot be met.
        """
        ocr = dataclasses.asdict(resolve_for_networks(self.ocr))
        del ocr["device"]  # Another device rounds otherwise, as another processor does.
        return {"easyocr": easyocr_version(), **ocr}


@dataclasses.dataclass(frozen=True)
class Spot:
    """One line of text in a picture.

    Attributes:
        box: in px, of `ocr`.
        text: as it was read; None if it was not.
        confidence: of the text, 0 to 1; None if it was not read.
    """

    box: Box
    text: str | None
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found out about one picture and its captions.

    Attributes:
        matches: for every caption, the spotted text that repeats it, of one line or of several, or
            None.
        looked: "no_run" where no caption could be read, "gated" where the first look saw no text,
            "read" where lines were looked for.
        gate: highest character score at the first look; 1 for a picture that is too small for one
            to gain anything, None without one.
        audited: the first look saw no text, and it was read all the same.
        spots: the lines, in the detector's order.
        error: why the picture could not be decoded.
    """

    matches: tuple[str | None, ...]
    looked: str
    gate: float | None = None
    audited: bool = False
    spots: tuple[Spot, ...] = ()
    error: images.ImageError | None = None

    @property
    def missed(self) -> bool:
        """Whether the first look would have let a match through."""
        return self.audited and any(match is not None for match in self.matches)


class TextSpotter:
    """Judges pictures by their captions."""

    def __init__(self, settings: Settings, cache: SpotCache | None = None):
        """The networks are loaded when the first picture has to be read.

        Args:
            settings: see there.
            cache: where readings are looked up and kept; its settings must be `settings`'.
        """
        self.settings = settings
        self._cache = cache

    def judge(self, data: Sequence[bytes], captions: Sequence[Sequence[str]]) -> list[Verdict]:
        """Reads pictures as far as their captions demand it.

        Args:
            data: encoded images.
            captions: for each image, its captions.

        Returns:
            A verdict per image. They depend neither on the batches nor on the cache.

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
        unseen = [p for p in pictures if s.gate_size and s.gate_size not in p.reading.gates]
        self._gate([p for p in unseen if p.decode()])
        unread = [p for p in pictures if p.is_open() and p.reading.boxes is None]
        self._detect([p for p in unread if p.decode()])
        lines = 1
        while waiting := [
            p for p in pictures if p.is_open() and p.next_lines(lines) and p.decode()
        ]:
            self._read_lines(waiting, lines)
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
        shrunk = [p for p in pictures if p.canvas.pixels.size > _GATE_GAIN * p.gate.pixels.size]
        for picture in pictures:
            picture.reading.gates[size] = 1.0  # a small one: nothing is gained by a first look
        if shrunk:
            peaks = self._ocr.peaks([p.gate for p in shrunk], size, self.settings.batch_size)
            for picture, peak in zip(shrunk, peaks, strict=True):
                # Rounded, so that the cache holds what is compared.
                picture.reading.gates[size] = round(peak, 4)

    def _detect(self, pictures: list[_Picture]) -> None:
        if pictures:
            s = self.settings
            canvases = [p.canvas for p in pictures]
            maps = self._ocr.heat_maps(canvases, s.ocr.canvas_size, s.batch_size)
            for picture, heat in zip(pictures, maps, strict=True):
                picture.reading.boxes = self._ocr.find_boxes(heat)
                picture.reading.texts = [None] * len(picture.reading.boxes)

    def _read_lines(self, pictures: list[_Picture], count: int) -> None:
        wanted = [(picture, i) for picture in pictures for i in picture.next_lines(count)]
        crops = [crop_line(picture.grey, picture.reading.boxes[i]) for picture, i in wanted]
        for (picture, i), (text, confidence) in zip(
            wanted, self._ocr.read(crops, self.settings.batch_size), strict=True
        ):
            picture.reading.texts[i] = (text, round(confidence, 4))

    @property
    def _ocr(self) -> Ocr:
        return load_ocr(self.settings.ocr)


class _Picture:
    """One picture on its way through `TextSpotter.judge`."""

    def __init__(self, data: bytes, captions: Sequence[str], settings: Settings):
        self._data = data
        self._settings = settings
        self._all_captions = tuple(captions)
        self.captions = tuple(c for c in captions if can_match(c, settings.min_chars))
        self.hash = hash_image(data) if self.captions else ""
        self.reading = Reading()
        self.error: images.ImageError | None = None
        self.forget_pixels()

    def decode(self) -> bool:
        """Makes the pixels ready; False for a picture that cannot be decoded."""
        if self.error is None and self.grey is None:
            try:
                rgb = images.decode_rgb(self._data, max_pixels=self._settings.max_pixels)
            except images.ImageError as error:
                self.error = error
                return False
            import cv2

            image = np.ascontiguousarray(np.asarray(rgb)[..., ::-1])
            self.grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            self.canvas = shrink(image, self._settings.ocr.canvas_size)
            if self._settings.gate_size:
                self.gate = shrink(image, self._settings.gate_size)
        return self.error is None

    def forget_pixels(self) -> None:
        """Frees the memory of `decode`."""
        self.grey: np.ndarray | None = None
        self.canvas: Shrunk | None = None
        self.gate: Shrunk | None = None

    def count_pixels(self) -> int:
        """Of the decoded picture, from its header; 0 if it cannot be opened."""
        try:
            width, height = images.open_image(self._data, max_pixels=self._settings.max_pixels).size
        except images.ImageError:
            return 0
        return width * height

    @property
    def shows_text(self) -> bool:
        """Whether the first look saw text; True without a first look."""
        s = self._settings
        return not s.gate_size or self.reading.gates.get(s.gate_size, 0.0) >= s.gate_score

    @property
    def is_audited(self) -> bool:
        """Skipped by the first look, but of the sample that is read anyway."""
        if self.shows_text or not self.captions:
            return False
        # The hash of the picture is as good as a random number, and the same in every run.
        return int(self.hash, 16) < self._settings.audit_share * 2**128

    def is_open(self) -> bool:
        """Whether lines, or more lines, have to be read."""
        if self.error is not None or not (self.shows_text or self.is_audited):
            return False
        if self.reading.boxes is None or not self._settings.stop_at_match:
            return True
        return any(self._find_match(caption) is None for caption in self.captions)

    def next_lines(self, count: int) -> list[int]:
        """The most promising lines that were not read."""
        return [i for i in self._rank_lines() if self.reading.texts[i] is None][:count]

    def verdict(self) -> Verdict:
        """What is known now."""
        if not self.captions:
            return Verdict((None,) * len(self._all_captions), "no_run")
        if self.error is not None:
            return Verdict((None,) * len(self._all_captions), "read", error=self.error)
        is_read = self.shows_text or self.is_audited
        spots = ()
        if is_read:
            pairs = zip(self.reading.boxes, self.reading.texts, strict=True)
            spots = tuple(Spot(box, *(text or (None, None))) for box, text in pairs)
        matches = tuple(
            self._find_match(c) if is_read and c in self.captions else None
            for c in self._all_captions
        )
        looked = "read" if self.shows_text else "gated"
        gate = self.reading.gates.get(self._settings.gate_size)
        return Verdict(matches, looked, gate, self.is_audited, spots)

    def _rank_lines(self) -> list[int]:
        """All lines, tall ones that are wide enough for a word first."""

        def rank(index: int) -> tuple[bool, float, int]:
            width, height = box_size(self.reading.boxes[index])
            return width < _WORD_ASPECT * height, -height, index

        return sorted(range(len(self.reading.texts)), key=rank)

    def _find_match(self, caption: str) -> str | None:
        """The text that matches: of a line, of a group of lines, or of all that it took."""
        s = self._settings
        known = [
            i
            for i in self._rank_lines()
            if self.reading.texts[i] is not None and self.reading.texts[i][1] >= s.min_confidence
        ]
        groups = stack_lines(self.reading.boxes) if s.join_lines and known else []
        if not known or not self._matches(known, groups, caption):
            return None
        # In the order of reading, so that lines that happen to be known do not change the answer.
        count = 1
        while not self._matches(known[:count], groups, caption):
            count += 1
        texts = [self.reading.texts[i][0] for i in known[:count]]
        if self._matches(known[count - 1 : count], [], caption):
            return texts[-1]
        joined = self._join(known[:count], [g for g in groups if known[count - 1] in g])
        return joined[0] if joined else " / ".join(texts)

    def _matches(self, lines: Sequence[int], groups: Sequence[Sequence[int]], caption: str) -> bool:
        s = self._settings
        return caption_matches(
            [self.reading.texts[i][0] for i in lines] + self._join(lines, groups),
            caption,
            s.min_chars,
            misread_min_chars=s.misread_min_chars,
            weigh_words=s.weigh_words,
        )

    def _join(self, lines: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
        """The texts of the groups that more than one of the lines is in."""
        together = [[i for i in group if i in lines] for group in groups]
        texts = self.reading.texts
        return [" ".join(texts[i][0] for i in group) for group in together if len(group) > 1]


def _windows(pictures: Iterable[_Picture], size: int) -> Iterable[list[_Picture]]:
    """In order; as many together as the memory should hold, `size` at most."""
    window, pixels = [], 0
    for picture in pictures:
        more = picture.count_pixels()
        if window and (len(window) == size or pixels + more > _MAX_WINDOW_PIXELS):
            yield window
            window, pixels = [], 0
        window.append(picture)
        pixels += more
    if window:
        yield window
