"""A model's own tokenizer, from its files: token ids as transformers and open_clip make them.

`tokenizer.json` runs in the library `tokenizers`, and a `.model` file in sentencepiece, which is
imported only then. What a model's folder says about its tokenizer is read in
`diht_jax.weights.tokenizer_file`.

Safe in threads and in forked workers, as `diht_jax.data.tokenizer` is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import string
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import normalizers, processors

from diht_jax.data.tokenizer import check_texts, repair_text

CLEANINGS = ("none", "whitespace", "lower", "canonicalize")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_METASPACE = "\u2581"  # sentencepiece's sign for a space


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """Makes token ids by a tokenizer's file. It is opened where it is used first."""

    # `tokenizer.json`, or a `.model` file of sentencepiece, of which texts are cleaned and encoded
    # as by transformers' SiglipTokenizer.
    path: str
    pad: str  # token behind the end of a text (or before its start)
    pads_left: bool = False  # padding comes before the text
    # Of texts, before the tokenizer sees them, as open_clip does it: "whitespace" repairs Unicode
    # and HTML entities and collapses whitespace, "lower" makes lower case besides, "canonicalize"
    # removes punctuation too. "none" as transformers.
    clean: str = "none"
    lower_case: bool = False  # the tokenizer makes lower case, also where its file does not say so
    start: str = ""  # token before a text, where `has_own_ends`; "" for none
    end: str = ""  # token behind a text, likewise, and of a `.model` file
    has_own_ends: bool = False  # `start` and `end` stand for those of the file
    unknown: str = ""  # token for what the vocabulary lacks, of a `.model` file

    def tokenize(self, texts: str | Sequence[str], context_length: int) -> np.ndarray:
        """Token ids of texts.

        Args:
            context_length: t. A longer text is cut so that its end marker stays; of a text with
                more than 1,024 t characters, those behind them are not looked at.

        Returns:
            int32 [b, t]; b is 1 for a single string.

        Raises:
            ValueError: an element is no string, or the file cannot be read.
        """
        texts = check_texts(texts, context_length)
        encode, pad_id = self._opened()
        ids = np.full((len(texts), context_length), pad_id, np.int32)
        for row, text in enumerate(texts):
            found = encode(self._cleaned(text), context_length)
            if found:
                ids[row, slice(-len(found), None) if self.pads_left else slice(len(found))] = found
        return ids

    def check(self) -> None:
        """Opens the file.

        Raises:
            ValueError: it cannot be read, or lacks a token.
        """
        self._opened()

    def describe(self) -> str:
        """Settings and SHA-256 of the file: equal where all token ids are."""
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "path"}
        digest = hashlib.sha256(pathlib.Path(self.path).read_bytes()).hexdigest()
        return f"{sorted(settings.items())} {digest}"

    def _cleaned(self, text: str) -> str:
        if self.clean == "none":
            return text
        text = repair_text(text)
        if self.clean == "lower":
            return text.lower()
        if self.clean == "canonicalize":
            text = " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())
        return text

    def _opened(self) -> _Opened:
        try:
            return _open(self)
        except ValueError:
            raise
        except Exception as error:  # of a damaged file both libraries raise nearly any type
            raise ValueError(
                f"{self.path}: not a tokenizer's file ({type(error).__name__}: {error!s:.200}); "
                "download it again"
            ) from error


# A text and the number of ids -> ids with the markers, without padding; and the id of padding.
_Opened = tuple[Callable[[str, int], list[int]], int]


@functools.lru_cache(maxsize=4)
def _open(settings: FileTokenizer) -> _Opened:
    if not os.path.isfile(settings.path):
        raise ValueError(f"{settings.path}: no such file, which a tokenizer is read from")
    return (_open_json if settings.path.endswith(".json") else _open_model)(settings)


def _open_json(settings: FileTokenizer) -> _Opened:
    opened = tokenizers.Tokenizer.from_file(settings.path)
    opened.no_padding()
    opened.no_truncation()
    if settings.lower_case:
        own = [] if opened.normalizer is None else [opened.normalizer]
        opened.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    find = functools.partial(_find_id, settings, opened.token_to_id)
    if settings.has_own_ends:
        single = [token for token in (settings.start, "$A", settings.end) if token]
        ends = [(token, find(token)) for token in (settings.start, settings.end) if token]
        opened.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    num_ends = opened.num_special_tokens_to_add(False)

    def encode(text: str, length: int) -> list[int]:
        found = opened.encode(text, add_special_tokens=False)
        found.truncate(max(0, length - num_ends))
        return opened.post_process(found).ids[:length]

    return encode, find(settings.pad)


def _open_model(settings: FileTokenizer) -> _Opened:
    """Ids of a text as transformers' SiglipTokenizer makes them.

    Every part of a text between markers that it spells out is encoded behind the unknown token,
    whose pieces are left out again: this is what keeps a space at its start.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{settings.path}: sentencepiece is needed for this tokenizer and is not installed; "
            "`pip install sentencepiece`"
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(settings.path)

    def look(piece: str) -> int | None:
        number = processor.piece_to_id(piece)
        return number if processor.id_to_piece(number) == piece else None

    find = functools.partial(_find_id, settings, look)
    end = find(settings.end)
    markers = {token: processor.piece_to_id(token) for token in (settings.end, settings.unknown)}
    pattern = re.compile(rf"\s*({'|'.join(map(re.escape, markers))})\s*")
    num_prefix = len(processor.encode(settings.unknown))
    space = [processor.piece_to_id(_METASPACE)]

    def encode(text: str, length: int) -> list[int]:
        found: list[int] = []
        for part in filter(None, pattern.split(_METASPACE + text.replace(_METASPACE, " "))):
            if part in markers:
                found = [] if found == space else found
                found.append(markers[part])
                continue
            part = part.lower() if settings.lower_case else part
            part = re.sub(r"\s+", " ", part.translate(_PUNCTUATION)).strip()
            found += processor.encode(settings.unknown + part)[num_prefix:]
        found = found[: length - 1]
        # A text that spells the marker out has it already.
        return found if found[-1:] == [end] else [*found, end]

    return encode, find(settings.pad)


def _find_id(settings: FileTokenizer, look: Callable[[str], int | None], token: str) -> int:
    number = look(token)
    if number is None:
        raise ValueError(f"{settings.path}: the token '{token}' is not in its vocabulary")
    return number
