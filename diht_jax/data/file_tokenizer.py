"""A tokenizer read from a model's files, with the same ids as transformers and open_clip.

The library `tokenizers` runs a `tokenizer.json`. sentencepiece runs a `.model` file, and is only
imported then. `diht_jax.weights.tokenizer_file` reads a model folder's tokenizer settings.

Safe in threads and in forked workers, like `diht_jax.data.tokenizer`.
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
    """Tokenizes texts with a tokenizer's file, which is opened at first use."""

    # A `tokenizer.json`, or a `.model` file of sentencepiece. Texts for the latter are cleaned and
    # encoded as by transformers' SiglipTokenizer.
    path: str
    pad: str  # padding token after a text (or before it)
    pads_left: bool = False  # padding comes before the text
    # Cleaning before the tokenizer, as in open_clip: "whitespace" repairs Unicode and HTML entities
    # and collapses whitespace, "lower" also lower-cases, and "canonicalize" also removes
    # punctuation. "none" as in transformers.
    clean: str = "none"
    lower_case: bool = False  # the tokenizer lower-cases, even if its file does not
    start: str = ""  # token before a text, if `has_own_ends`; "" for none
    end: str = ""  # token after a text, likewise; also for a `.model` file
    has_own_ends: bool = False  # `start` and `end` replace those of the file
    unknown: str = ""  # unknown token of a `.model` file

    def tokenize(self, texts: str | Sequence[str], context_length: int) -> np.ndarray:
        """Returns the token ids of texts.

        Args:
            context_length: t. A longer text is cut but keeps its end marker. Of each text, at most
                1,024 t characters are read.

        Returns:
            int32 [b, t]; b is 1 for a single string.

        Raises:
            ValueError: an element is not a string, or the file cannot be read.
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
        """Opens the file to check it.

        Raises:
            ValueError: the file cannot be read, or lacks a token.
        """
        self._opened()

    def describe(self) -> str:
        """Returns the settings and the file's SHA-256; if these are equal, so are all token ids."""
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
        except Exception as error:  # both libraries raise nearly any type for a damaged file
            raise ValueError(
                f"{self.path}: not a tokenizer's file ({type(error).__name__}: {error!s:.200}); "
                "download it again"
            ) from error


# (function from text and maximum length to ids with markers, without padding; padding id)
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
    """Opens a `.model` file that gives the ids of transformers' SiglipTokenizer.

    A text is split at the markers that it spells out. Each part is encoded after the unknown token,
    whose pieces are then removed, which preserves a leading space.
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
        # A text that spells out the marker already has it.
        return found if found[-1:] == [end] else [*found, end]

    return encode, find(settings.pad)


def _find_id(settings: FileTokenizer, look: Callable[[str], int | None], token: str) -> int:
    number = look(token)
    if number is None:
        raise ValueError(f"{settings.path}: the token '{token}' is not in its vocabulary")
    return number
