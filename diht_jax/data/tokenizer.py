"""Tokenizers: CLIP's, from captions to int32 ids and back, and those read from models' files.

The Rust library `tokenizers` runs the byte-pair encoding of CLIP, whose merges are in
bpe_simple_vocab_16e6.md, and a `tokenizer.json`. sentencepiece runs a `.model` file, and is only
imported then. This module must not import model or image code.

A small model has a small vocabulary: the bytes, CLIP's first merges, and the two markers. Any text
can still be encoded, but rare words become more pieces.

A tokenizer from files gives the same ids as transformers and open_clip;
`diht_jax.weights.tokenizer_file` reads a model folder's tokenizer settings.

Safe in threads and in forked workers: texts are encoded one by one, which never starts the
library's thread pool, so a fork cannot inherit a locked pool.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import html
import importlib.resources
import os
import pathlib
import re
import string
from collections.abc import Callable, Iterable, Sequence

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408
START_OF_TEXT_ID = 49_406
END_OF_TEXT_ID = 49_407
_NUM_BYTES = 2 * 256  # pieces of one byte, within a word and at its end
SMALLEST_VOCAB = _NUM_BYTES + 2

# Characters read per id of the context length. The longest piece of the vocabulary has 32 bytes,
# and cleaning hardly shortens a text to a 32nd. Reading all of 10 MB would take ten seconds.
_CHARACTERS_PER_ID = 1024

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_START_OF_TEXT, _END_OF_TEXT = "<start_of_text>", "<end_of_text>"
_END_OF_WORD = "</w>"

# Words are: the two markers, contractions, runs of letters, single digits, runs of anything else.
# CLIP's pattern ignores case. On lower-cased text, this matters for two characters only: the long s
# matches an s, and U+0345 (its upper case is a letter) matches no class. Characters newer than the
# Unicode tables of `tokenizers` are always symbols.
_WORD_PATTERN = (
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)

# Ways to clean a text before a tokenizer from files; see `FileTokenizer`.
CLEANINGS = ("none", "whitespace", "lower", "canonicalize")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_METASPACE = "\u2581"  # sentencepiece's sign for a space


def tokenize(
    texts: str | Sequence[str],
    context_length: int = CONTEXT_LENGTH,
    vocab_size: int = VOCAB_SIZE,
) -> np.ndarray:
    """Tokenizes texts as CLIP does: start marker, text, end marker, zeros.

    Args:
        texts: one text or a sequence of texts. They are cleaned here: broken Unicode and HTML
            entities are repaired, whitespace is collapsed, and letters are lower-cased.
        context_length: t, at least 2. A longer text is cut, and its last id is the end marker. At
            most 1,024 t characters of a text are read.
        vocab_size: entries of the model's vocabulary, at least 514. The last two are the markers.
            Entries beyond CLIP's 49,408 are unused.

    Returns:
        int32 [b, t]; b is 1 for a single string.

    Raises:
        ValueError: an element is not a string, or `context_length` or `vocab_size` is too small.

    Source: the tokenizer of CLIP (arXiv 2103.00020), as in open_clip.
    """
    texts = check_texts(texts, context_length)
    vocab_size = check_vocab_size(vocab_size)
    ids = np.zeros((len(texts), context_length), np.int32)
    for row, text in enumerate(texts):
        words = _encode_words(repair_text(text).lower(), vocab_size)[: context_length - 2]
        ids[row, : len(words) + 2] = [vocab_size - 2, *words, vocab_size - 1]
    return ids


def check_texts(texts: str | Sequence[str], context_length: int) -> list[str]:
    """Checks texts, and returns the part of each that is tokenized.

    Raises:
        ValueError: an element is not a string, or `context_length` is invalid.
    """
    if not isinstance(context_length, int | np.integer):
        raise ValueError(f"context_length: expected an integer, got {context_length!r}")
    if context_length < 2:
        raise ValueError(
            f"context_length: expected at least 2 (start and end of text), got {context_length}"
        )
    most, parts = _CHARACTERS_PER_ID * context_length, []
    for row, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            raise ValueError(
                f"texts[{row}]: expected a str, got {type(text).__name__} {str(text)[:80]!r}; "
                "decode bytes and fill missing captions before tokenizing"
            )
        parts.append(text.lstrip()[:most] if len(text) > most else text)
    return parts


def check_vocab_size(vocab_size: int) -> int:
    """Returns the number of used entries of a model's vocabulary, at most CLIP's.

    Raises:
        ValueError: the size is too small for the bytes and the markers.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size: expected at least {SMALLEST_VOCAB} (all bytes, start and end of text), "
            f"got {vocab_size}"
        )
    return min(vocab_size, VOCAB_SIZE)


def decode(ids: Iterable[int], vocab_size: int = VOCAB_SIZE) -> str:
    """Decodes a row of ids to the cleaned text.

    Args:
        ids: integers [t], a row of `tokenize` or a part of one. Start markers are skipped, and
            everything after the first end marker (padding) is ignored.
        vocab_size: argument of `tokenize`.

    Returns:
        The text with one space after each word, since CLIP's vocabulary does not keep the original
        spacing ("it's" becomes "it 's"). Bytes of an incomplete character become U+FFFD.

    Raises:
        ValueError: the ids are not one row, or an id is outside the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(
            f"ids: expected one row of integers [t], got shape {ids.shape} of {ids.dtype}"
        )
    vocab_size = check_vocab_size(vocab_size)
    vocab, pieces = vocabulary(vocab_size), []
    for token_id in ids.tolist():
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"ids: expected 0 <= id < {vocab_size}, got {token_id}")
        if token_id == vocab_size - 1:
            break
        if token_id == vocab_size - 2:
            continue
        word = vocab[token_id].removesuffix(_END_OF_WORD)
        pieces += [word] if word == vocab[token_id] else [word, " "]
    return decoders.ByteLevel().decode(pieces).strip()


def repair_text(text: str) -> str:
    """Applies CLIP's cleaning without lower-casing: `ftfy`, two HTML unescapes, single spaces."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())  # nothing to repair, nor to unescape
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _encode_words(text: str, vocab_size: int) -> list[int]:
    """Returns the ids of a cleaned text, without start and end markers."""
    tokenizer = _tokenizer(vocab_size)
    if _START_OF_TEXT not in text and _END_OF_TEXT not in text:
        return tokenizer.encode(text, add_special_tokens=False).ids
    # As in CLIP, a caption that spells out a marker gets the marker's id, but only if the pattern
    # matches it as a word. The library's special tokens would match anywhere.
    markers = {_START_OF_TEXT: vocab_size - 2, _END_OF_TEXT: vocab_size - 1}
    ids = []
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        if word in markers:
            ids.append(markers[word])
        else:
            ids.extend(token.id for token in tokenizer.model.tokenize(word))
    return ids


@functools.cache
def _tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    ids = dict(zip(vocabulary(vocab_size), range(vocab_size), strict=True))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges(vocab_size), end_of_word_suffix=_END_OF_WORD)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@functools.cache
def vocabulary(vocab_size: int = VOCAB_SIZE) -> list[str]:
    """Returns the vocabulary by id: bytes, bytes that end a word, merges, markers.

    Each byte is represented by a printable character; visible bytes of Latin-1 come first.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [
        *characters,
        *[character + _END_OF_WORD for character in characters],
        *map("".join, merges(vocab_size)),
        _START_OF_TEXT,
        _END_OF_TEXT,
    ]


@functools.cache
def merges(vocab_size: int = VOCAB_SIZE) -> list[tuple[str, str]]:
    """Returns the first merges of CLIP, in order, that fill a vocabulary."""
    num_merges = vocab_size - SMALLEST_VOCAB
    packed = importlib.resources.files("diht_jax.data").joinpath(_MERGES_FILE).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    pairs = []
    for line in lines[1 : num_merges + 1]:
        first, second = line.split(" ")
        pairs.append((first, second))
    return pairs


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
