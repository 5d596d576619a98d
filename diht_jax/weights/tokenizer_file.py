"""CLIP's tokenizer as a `tokenizer.json`, whose normaliser cleans texts as ours as far as it can.

Of ftfy's repairs and the HTML entities it has those that replace one text by another. What depends
on the text around it, above all broken encodings ("â€™"), no normaliser of `tokenizers` can do.
"""

from __future__ import annotations

import tokenizers
from ftfy import chardata
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from diht_jax.data import tokenizer

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"

# Each once for every time that CLIP unescapes; "&amp;" last, as a single pass would have it.
_ENTITIES = {
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&#34;": '"',
    "&#39;": "'",
    "&#039;": "'",
    "&#x27;": "'",
    "&apos;": "'",
    "&nbsp;": " ",
    "&#160;": " ",
    "&ndash;": "\u2013",
    "&mdash;": "\u2014",
    "&hellip;": "\u2026",
    "&lsquo;": "\u2018",
    "&rsquo;": "\u2019",
    "&ldquo;": "\u201c",
    "&rdquo;": "\u201d",
    "&amp;": "&",
}
# ASCII's without the whitespace, and what is deprecated or marks a byte order.
_CONTROL_CHARACTERS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def pieces(vocab_size: int) -> list[str]:
    """The vocabulary by id, with the markers as transformers calls them."""
    return [*tokenizer.vocabulary(vocab_size)[:-2], START_OF_TEXT, END_OF_TEXT]


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer for `PreTrainedTokenizerFast`, with both markers around each text."""
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces(vocab_size))},
            merges=tokenizer.merges(vocab_size),
            end_of_word_suffix="</w>",
            unk_token=END_OF_TEXT,
        )
    )
    made.normalizer = make_normalizer()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing(
        (END_OF_TEXT, vocab_size - 1),
        (START_OF_TEXT, vocab_size - 2),
        trim_offsets=False,
        add_prefix_space=False,
    )
    made.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    for marker in (START_OF_TEXT, END_OF_TEXT):
        made.add_special_tokens([tokenizers.AddedToken(marker, normalized=False)])
    return made


def make_normalizer() -> normalizers.Normalizer:
    """Typographic quotes, ligatures, widths, entities, control characters; NFC and lower case."""
    entities = [normalizers.Replace(*pair) for pair in _ENTITIES.items()]
    replaced = [
        (tokenizers.Regex("[\u02bc\u2018-\u201b]"), "'"),
        (tokenizers.Regex("[\u201c-\u201f]"), '"'),
        *((chr(code), text) for code, text in chardata.LIGATURES.items()),
        *((chr(code), text) for code, text in chardata.WIDTH_MAP.items()),
        (tokenizers.Regex(_CONTROL_CHARACTERS), ""),
    ]
    return normalizers.Sequence(
        [
            *entities,
            *entities,
            *(normalizers.Replace(*pair) for pair in replaced),
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
