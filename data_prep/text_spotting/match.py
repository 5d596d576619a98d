"""The match decision of text-spotting: whether text read in a picture repeats its caption.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". Ours: words are
weighed by how common they are. The paper's rule, as recalled, matches any run of five characters;
it drops pairs for a single word that many captions contain. This module contains pure functions
of strings and imports neither images nor OCR.
"""

from __future__ import annotations

import collections
import functools
import itertools
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from data_prep.captions.lexicon import FUNCTION_WORDS, word_set

_FUNCTION_WORDS = FUNCTION_WORDS | {"also", "may", "only"}
# Words in at least 0.3% of captions, counted on every second line of `captions_web.txt`, and some
# that describe pictures anywhere. A plural counts as its singular.
_COMMON_WORDS = word_set(pathlib.Path(__file__).with_name("common_words.txt").read_text("utf-8"))
# Weights of a rare and of a common word. Half of a rare word weighs as much as a common word.
_RARE, _COMMON = 2, 1
# Weight that is evidence regardless of what else the picture shows.
_ENOUGH = 3
# Less weight is evidence if the picture shows little else. Each tuple is a set of minima: weight,
# characters found in the caption, and their share of all characters read with confidence.
_ENOUGH_ALONE = ((2, 5, 0.33), (1, 8, 0.6))
# Minimum confidence at which a text that is not in the caption counts against a match.
SURE = 0.5
# A word counts if a run contains this share of its characters, or this many of them.
_MOST_OF_WORD = 0.75
_LONG_PIECE = 7
_SHORT_RUN = 4
# Largest share of misread characters in a whole text, and the minimum length of such a text.
_MISREAD = 0.3
_MISREAD_MIN_CHARS = 6
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


# Characters that EasyOCR's English recogniser can output, folded as by `fold_text`.
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

    Ours: both sides are NFKC-normalised and case-folded, and white space is removed. A run must
    lie within one spotted text, which is one box of the spotter.

    Ours: with `weigh_words`, the texts must be all that the picture shows, and the words that they
    share with the caption are weighed by how common they are (see `weigh_texts`).

    Args:
        spotted_texts: one text per box.
        caption: the pair's caption.
        min_chars: minimum length of an exact run.
        misread_min_chars: minimum length of a run with at most one character replaced; None
            allows no misreading.
        weigh_words: whether to weigh words; otherwise any run is a match.

    Raises:
        ValueError: a minimum length is less than 1.
    """
    for name, value in (("min_chars", min_chars), ("misread_min_chars", misread_min_chars)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    texts = [(text, 1.0) for text in spotted_texts]
    return texts_match(texts, (), caption, min_chars, misread_min_chars, weigh_words)


def texts_match(
    texts: Sequence[tuple[str, float]],
    joined: Sequence[str],
    caption: str,
    min_chars: int,
    misread_min_chars: int | None,
    weigh_words: bool,
    *,
    is_all: bool = True,
) -> bool:
    """Like `caption_matches`, for `texts`, `joined` and `is_all` as in `weigh_texts`."""
    folded, plain = fold_text(caption), [*(text for text, _ in texts), *joined]
    if misread_min_chars is not None and any(
        _has_misread_run(text, folded, misread_min_chars) for text in map(fold_text, plain)
    ):
        return True
    if weigh_words:
        return weigh_texts(texts, joined, caption, min_chars, is_all=is_all)
    runs = (
        text[start : start + min_chars]
        for text in map(fold_text, plain)
        for start in range(len(text) - min_chars + 1)
    )
    return any(run in folded for run in runs)


def can_match(caption: str, min_chars: int = 5) -> bool:
    """Returns whether the caption has a run of `min_chars` characters that OCR could output."""
    length = 0
    for char in fold_text(caption):
        length = length + 1 if char in RECOGNIZABLE else 0
        if length >= min_chars:
            return True
    return False


def _has_misread_run(spotted: str, caption: str, length: int) -> bool:
    # On each diagonal of the table of character pairs, the longest run with one difference ends
    # just before a difference and starts just after the second difference before it.
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


def fold_text(text: str) -> str:
    """Folds case and compatibility forms, and removes white space."""
    # Case folding can undo the normal form, and normalising can introduce new cases. Unicode's
    # compatibility caseless match therefore does both twice.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(unicodedata.normalize("NFKC", folded).casefold().split())


class Shared(NamedTuple):
    """Words and runs that a text and a caption share.

    Attributes:
        weights: the caption's words found in the text -> their weights.
        chars: number of characters of the text that are found in the caption.
        longest: length of the longest shared run; for a text found with misread characters, the
            number of its correct ones.
        size: number of characters of the text.
    """

    weights: dict[str, int]
    chars: int
    longest: int
    size: int


def weigh_texts(
    texts: Sequence[tuple[str, float]],
    joined: Sequence[str],
    caption: str,
    min_chars: int,
    *,
    is_all: bool = True,
) -> bool:
    """Returns whether the texts in a picture are evidence that it shows its caption.

    Each word of the caption that occurs in the texts counts once. A common word
    (`_COMMON_WORDS`) counts half as much as a rare one, and a function word ("in", "the") not at
    all. A weight of one and a half rare words is evidence. One rare word or two common ones are
    evidence only if they cover much of the text read with confidence (`_ENOUGH_ALONE`), and one
    common word only if it covers nearly all of it.

    Args:
        texts: text and confidence (0 to 1) of each line.
        joined: texts of lines that belong together, which add words.
        min_chars: minimum length of the longest shared run.
        is_all: whether `texts` are all that the picture shows; otherwise weak evidence is ignored.
    """
    shared = [compare(text, caption, min_chars) for text, _ in texts]
    together = [compare(text, caption, min_chars) for text in joined]
    weights: dict[str, int] = {}
    for one in shared + together:
        for word, weight in one.weights.items():
            weights[word] = max(weight, weights.get(word, 0))
    score = sum(weights.values())
    if max((one.longest for one in shared + together), default=0) < min_chars:
        return False
    if score >= _ENOUGH:
        return True
    if not is_all:
        return False
    # A repeated text counts once.
    chars = sum(
        {fold_text(t): one.chars for (t, _), one in zip(texts, shared, strict=True)}.values()
    )
    sure = [one for one, (_, confidence) in zip(shared, texts, strict=True) if confidence >= SURE]
    share = sum(one.chars for one in sure) / max(1, sum(one.size for one in sure))
    return any(
        score >= weight and chars >= max(least, min_chars) and share >= least_share
        for weight, least, least_share in _ENOUGH_ALONE
    )


@functools.lru_cache(maxsize=4096)
def compare(text: str, caption: str, min_chars: int) -> Shared:
    """Compares a text with a caption; runs shorter than `min_chars` only contribute words."""
    spotted, target = _split_words(text), _split_words(caption)
    weights: dict[str, int] = {}
    inside: set[int] = set()
    longest = 0
    for start, at, length in _find_runs(spotted.text, target.text):
        pieces = dict(_split_run(spotted, target, start, at, length))
        for word, weight in pieces.items():
            weights[word] = max(weight, weights.get(word, 0))
        longest = max(longest, length)
        if length >= min_chars and (pieces or length >= 2 * _SHORT_RUN):
            inside.update(range(start, start + length))
    stands = _find_misread(spotted.text, target.text)
    if stands is not None:
        first, last, errors = stands
        for owner, size in collections.Counter(target.owner[first:last]).items():
            word = target.words[owner]
            if word and size >= _MOST_OF_WORD * len(word):
                weights[word] = _weigh(word)
        if last - first - errors >= min_chars:
            inside.update(range(len(spotted.text)))
            longest = max(longest, last - first - errors)
    return Shared(weights, len(inside), longest, len(spotted.text))


class _Words:
    """A folded text with its word boundaries.

    Attributes:
        text: the text folded by `fold_text`.
        owner: for each character, the index of its word.
        words: the words, without surrounding punctuation.
    """

    def __init__(self, text: str):
        parts = [part for part in map(fold_text, text.split()) if part]
        self.text = "".join(parts)
        self.owner = [index for index, part in enumerate(parts) for _ in part]
        self.words = [part.strip(_MARKS) for part in parts]

    def splits(self, i: int) -> bool:
        """Returns whether a word starts at character `i`, or `i` is an end of the text."""
        if not 0 < i < len(self.text):
            return True
        before, after = self.text[i - 1], self.text[i]
        return self.owner[i - 1] != self.owner[i] or before in _MARKS or after in _MARKS


_split_words = functools.lru_cache(maxsize=1024)(_Words)


def _weigh(word: str) -> int:
    if word in _FUNCTION_WORDS or len(word) < 3:
        return 0
    is_common = word in _COMMON_WORDS or word.removesuffix("s") in _COMMON_WORDS
    return _COMMON if is_common else _RARE


def _find_runs(spotted: str, caption: str) -> Iterator[tuple[int, int, int]]:
    """Yields (start, start in the caption, length) of maximal shared runs of four or more."""
    grams = [spotted[i : i + _SHORT_RUN] for i in range(len(spotted) - _SHORT_RUN + 1)]
    if not any(gram in caption for gram in grams):
        return
    for shift in range(_SHORT_RUN - len(spotted), len(caption) - _SHORT_RUN + 1):
        start, stop = max(0, -shift), min(len(spotted), len(caption) - shift)
        same = (spotted[i] == caption[i + shift] for i in range(start, stop))
        for equal, group in itertools.groupby(enumerate(same, start), key=lambda pair: pair[1]):
            if equal:
                run = [i for i, _ in group]
                if len(run) >= _SHORT_RUN:
                    yield run[0], run[0] + shift, len(run)


def _split_run(
    spotted: _Words, target: _Words, start: int, at: int, length: int
) -> Iterator[tuple[str, int]]:
    """Yields the caption's words of which a run contains enough, and their weights.

    Ignores parts of words with fewer than three characters, which may match by chance.
    """
    for owner, group in itertools.groupby(range(at, at + length), key=target.owner.__getitem__):
        word, piece = target.words[owner], list(group)
        first, last = piece[0], piece[-1] + 1
        size = sum(target.text[i] not in _MARKS for i in piece)
        if not word or size < min(3, len(word)):
            continue
        begins = first > at or (target.splits(first) and spotted.splits(first - at + start))
        ends = last < at + length or (target.splits(last) and spotted.splits(last - at + start))
        is_whole = begins and ends and size == len(word)
        is_most = size >= _SHORT_RUN and size >= _MOST_OF_WORD * len(word)
        if is_whole or is_most or size >= _LONG_PIECE:
            yield word, _weigh(word)
        elif size > _SHORT_RUN and size >= len(word) / 2:
            yield word, min(_COMMON, _weigh(word))


def _find_misread(spotted: str, caption: str) -> tuple[int, int, int] | None:
    """Returns (start, end, errors) of the part of the caption that matches the text best, or None.

    Errors are insertions, deletions and substitutions, minimised over all substrings of the caption
    (P. Sellers, 1980). The result is None for a short text or too many errors.
    """
    limit = int(_MISREAD * len(spotted))
    if len(spotted) < _MISREAD_MIN_CHARS:
        return None
    above = [(0, j) for j in range(len(caption) + 1)]  # (errors, start of the part)
    for i, char in enumerate(spotted, 1):
        row = [(i, 0)]
        for j, other in enumerate(caption, 1):
            diagonal, up, left = above[j - 1], above[j], row[j - 1]
            best = (diagonal[0] + (char != other), diagonal[1])
            if up[0] + 1 < best[0]:
                best = (up[0] + 1, up[1])
            if left[0] + 1 < best[0]:
                best = (left[0] + 1, left[1])
            row.append(best)
        above = row
        if min(row)[0] > limit:
            return None
    errors, end = min((cell[0], j) for j, cell in enumerate(above))
    return (above[end][1], end, errors) if errors <= limit else None
