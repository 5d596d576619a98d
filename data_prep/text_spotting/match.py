"""The match decision of text-spotting: does text read in a picture repeat its caption?

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". Pure functions of
strings. No picture and no OCR library may come in.
"""

from __future__ import annotations

from collections.abc import Iterable

from data_prep.text_spotting.evidence import fold_text, weigh_texts

# What EasyOCR's English recogniser can write, folded as `fold_text` does.
RECOGNIZABLE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~€")


def caption_matches(
    spotted_texts: Iterable[str],
    caption: str,
    min_chars: int = 5,
    *,
    misread_min_chars: int | None = None,
    weigh_words: bool = False,
) -> bool:
    """Returns whether any spotted text shares a long enough run of characters with the caption.

    Ours: both sides are NFKC-normalised, case-folded and freed of white space; a run is within
    one spotted text, which is one box of the spotter.

    Ours, with `weigh_words`: the texts are all that a picture shows, and the words that they share
    with the caption are weighed by how common they are (`evidence.weigh_texts`).

    Args:
        spotted_texts: one text per box.
        caption: of the pair.
        min_chars: length of a run that occurs in the caption as it is.
        misread_min_chars: length of a run that occurs with at most one character replaced; None
            allows no misreading.
        weigh_words: whether words are weighed; else any run is a match.

    Raises:
        ValueError: a length under 1.
    """
    for name, value in (("min_chars", min_chars), ("misread_min_chars", misread_min_chars)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    spotted_texts = list(spotted_texts)
    if misread_min_chars is not None and shares_misread_run(
        spotted_texts, caption, misread_min_chars
    ):
        return True
    if weigh_words:
        return weigh_texts([(text, 1.0) for text in spotted_texts], (), caption, min_chars)
    folded = fold_text(caption)
    return any(_shares_run(fold_text(spotted), folded, min_chars) for spotted in spotted_texts)


def shares_misread_run(spotted_texts: Iterable[str], caption: str, min_chars: int) -> bool:
    """Returns whether any text and the caption share `min_chars` characters, one misread."""
    folded = fold_text(caption)
    return any(_has_misread_run(fold_text(text), folded, min_chars) for text in spotted_texts)


def can_match(caption: str, min_chars: int = 5) -> bool:
    """Returns whether the caption has a run that a spotter could read.

    Args:
        caption: of the pair.
        min_chars: length of the run of recognisable characters.
    """
    length = 0
    for char in fold_text(caption):
        length = length + 1 if char in RECOGNIZABLE else 0
        if length >= min_chars:
            return True
    return False


def _shares_run(spotted: str, caption: str, length: int) -> bool:
    starts = range(len(spotted) - length + 1)
    return any(spotted[start : start + length] in caption for start in starts)


def _has_misread_run(spotted: str, caption: str, length: int) -> bool:
    # Along every diagonal of the table of all pairs of characters, the distance between a
    # difference and the one before the last is the longest run with one difference.
    for shift in range(length - len(spotted), len(caption) - length + 1):
        start = max(0, -shift)
        stop = min(len(spotted), len(caption) - shift)
        before_last = last = start - 1
        for i in range(start, stop):
            if spotted[i] != caption[i + shift]:
                before_last, last = last, i
            if i - before_last >= length:
                return True
    return False
