"""The match decision of text-spotting: does text read in a picture repeat its caption?

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". Pure functions of
strings. No picture and no OCR library may come in.
"""

from __future__ import annotations

import collections
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from data_prep.captions.lexicon import word_set

# What EasyOCR's English recogniser can write, folded as `fold_text` does.
RECOGNIZABLE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~€")

# Words between the words that describe: they are shared by texts that have nothing in common.
_FUNCTION_WORDS = word_set(
    """
    a about above after against all along also an and any are around as at away back be because
    been before behind being below between but by can could did do does down during each every few
    for from front get had has have he her here him his how i if in inside into is it its just like
    made make many may me more most my near new next no not now of off on one only or other our out
    outside over own s she should so some such than that the their them then there these they this
    those three through to together too top two under until up us very was we were what when where
    which while who will with without would you your
    """
)
# Words that many captions hold: one of them alone is a coincidence.
_COMMON_WORDS = word_set(
    """
    actor animal apartment artist attend autumn baby background beach beautiful best black blue book
    boy bright brown building business camera car cartoon celebrity character child children
    christmas city close closeup cloud coffee collection color colorful colour country couple cover
    cute dark design drawing dress event family fashion festival field film first floor flower food
    football forest free friend game garden girl glass gold good great green group hair hand happy
    head heart high holding holiday home horse house illustration image isolated kitchen lady lake
    large light little live living logo long looking love market mother mountain music musical
    nature night outdoor painting park part party pattern people perform person photo photograph
    picture pink player playing pool portrait poster price property purple rain river road rock room
    running sale school show showing sign sitting small smile smiling snow sport stage standing
    stock stone street style summer sunset table team texture time top tourist town traditional
    train travel tree vector video view village vintage walk walking wall water wearing wedding
    white wild window winter woman women wood wooden work working world yellow young
    """
)
# A run of so many characters over several words is evidence whatever the words.
_LONG_RUN = 8
# Of one word this share, or so many characters, are evidence wherever they stand in it; a whole
# word of so many is half of it.
_MOST = 0.75
_LONG_PIECE = 7
_SHORT_PIECE = 4
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def caption_matches(
    spotted_texts: Iterable[str],
    caption: str,
    min_chars: int = 5,
    *,
    misread_min_chars: int | None = None,
    weigh_words: bool = False,
) -> bool:
    """Whether any spotted text shares a long enough run of characters with the caption.

    Ours: both sides are NFKC-normalised, case-folded and freed of white space; a run lies within
    one spotted text, which is one box of the spotter.

    Ours, with `weigh_words`: what a run is worth depends on the words of the caption that it lies
    in. Evidence is a run across two words that describe, a long run across words that are not
    common, or nearly all of one spotted text; and so is most of a word that is not common. A word
    that every other caption holds ("person"), half of another word ("image" of "pilgrimage") or a
    whole word of one character less is half of a match: two of different words, in any of the
    texts, make one.

    Args:
        spotted_texts: one text per box.
        caption: of the pair.
        min_chars: length of a run that occurs in the caption as it is.
        misread_min_chars: length of a run that occurs with at most one character replaced; None
            allows no misreading.
        weigh_words: whether runs are weighed by their words.

    Raises:
        ValueError: a length under 1.
    """
    for name, value in (("min_chars", min_chars), ("misread_min_chars", misread_min_chars)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    folded = fold_text(caption)
    spotted_texts = list(spotted_texts)
    if misread_min_chars is not None and any(
        _shares_misread_run(fold_text(spotted), folded, misread_min_chars)
        for spotted in spotted_texts
    ):
        return True
    if weigh_words:
        return _match_words(spotted_texts, caption, min_chars)
    return any(_shares_run(fold_text(spotted), folded, min_chars) for spotted in spotted_texts)


def can_match(caption: str, min_chars: int = 5) -> bool:
    """Whether the caption has a run that a spotter could read; else no picture need be read.

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


def fold_text(text: str) -> str:
    """The text without case, compatibility forms and white space."""
    # Folding can undo the normal form, and the normal form bring new cases: as Unicode has it for
    # caseless matching, both are done twice.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(unicodedata.normalize("NFKC", folded).casefold().split())


def _shares_run(spotted: str, caption: str, length: int) -> bool:
    starts = range(len(spotted) - length + 1)
    return any(spotted[start : start + length] in caption for start in starts)


def _shares_misread_run(spotted: str, caption: str, length: int) -> bool:
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


class _Words:
    """A folded text that knows where its words begin.

    Attributes:
        text: as `fold_text` gives it.
        owner: for each character the index of its word.
        words: the words, freed of the marks around them.
    """

    def __init__(self, text: str):
        parts = [part for part in map(fold_text, text.split()) if part]
        self.text = "".join(parts)
        self.owner = [index for index, part in enumerate(parts) for _ in part]
        self.words = [part.strip(_MARKS) for part in parts]

    def splits(self, i: int) -> bool:
        """Whether a word begins at a character, or the text ends before it."""
        if not 0 < i < len(self.text):
            return True
        before, after = self.text[i - 1], self.text[i]
        return self.owner[i - 1] != self.owner[i] or before in _MARKS or after in _MARKS


def _match_words(spotted_texts: Sequence[str], caption: str, min_chars: int) -> bool:
    """The decision with weights: a run that is evidence, or two halves from different words."""
    target = _Words(caption)
    halves: set[str] = set()
    for spotted in map(_Words, spotted_texts):
        for start, at, length in _find_runs(spotted.text, target.text):
            pieces = list(_split_run(spotted, target, start, at, length))
            is_whole = length >= max(min_chars, _MOST * len(spotted.text))
            if _crosses_words(target, at, length, pieces, min_chars, is_whole):
                return True
            for word, size, whole in pieces:
                most = size >= min_chars and size >= _MOST * len(word)
                if (most or size >= max(min_chars, _LONG_PIECE)) and not _is_common(word):
                    return True
                if (
                    (whole and size >= min_chars - 1)
                    or most
                    or (size >= min_chars and size >= len(word) / 2)
                ):
                    halves.add(word)
    return len(halves) > 1


def _crosses_words(
    target: _Words,
    at: int,
    length: int,
    pieces: Sequence[tuple[str, int, bool]],
    min_chars: int,
    is_whole: bool,
) -> bool:
    """Whether a run is evidence since it goes from one word of the caption to the next."""
    counts = collections.Counter(target.owner[at : at + length])
    if (
        sum(
            bool(target.words[i]) and (n > 1 or n == len(target.words[i]))
            for i, n in counts.items()
        )
        < 2
    ):
        return False
    if is_whole and (pieces or length >= _LONG_RUN):
        return True
    if len(pieces) > 1 and sum(size for _, size, _ in pieces) >= min_chars:
        return True
    return length >= max(min_chars, _LONG_RUN) and not any(
        _is_common(word) for word, _, _ in pieces
    )


def _is_common(word: str) -> bool:
    return word in _COMMON_WORDS or word.removesuffix("s") in _COMMON_WORDS


def _find_runs(spotted: str, caption: str) -> Iterator[tuple[int, int, int]]:
    """(start, start in the caption, length) of the longest shared runs of four characters."""
    grams = [spotted[i : i + _SHORT_PIECE] for i in range(len(spotted) - _SHORT_PIECE + 1)]
    if not any(gram in caption for gram in grams):
        return
    for shift in range(_SHORT_PIECE - len(spotted), len(caption) - _SHORT_PIECE + 1):
        start, stop = max(0, -shift), min(len(spotted), len(caption) - shift)
        same = (spotted[i] == caption[i + shift] for i in range(start, stop))
        for equal, group in itertools.groupby(enumerate(same, start), key=lambda pair: pair[1]):
            if equal:
                run = [i for i, _ in group]
                if len(run) >= _SHORT_PIECE:
                    yield run[0], run[0] + shift, len(run)


def _split_run(
    spotted: _Words, target: _Words, start: int, at: int, length: int
) -> Iterator[tuple[str, int, bool]]:
    """(word, characters of it, whether it is a whole word of both) for each word that describes.

    A part of a word of less than three characters is left out: it may be there by chance.
    """
    for owner, group in itertools.groupby(range(at, at + length), key=target.owner.__getitem__):
        word, piece = target.words[owner], list(group)
        first, last = piece[0], piece[-1] + 1
        size = sum(target.text[i] not in _MARKS for i in piece)
        if word in _FUNCTION_WORDS or not word or size < min(3, len(word)):
            continue
        begins = first > at or (target.splits(first) and spotted.splits(first - at + start))
        ends = last < at + length or (target.splits(last) and spotted.splits(last - at + start))
        yield word, size, begins and ends
