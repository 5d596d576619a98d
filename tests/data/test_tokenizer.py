"""The tokenizer against open_clip's, which is CLIP's original code."""

import itertools
import unicodedata

import numpy as np
import pytest

from diht_jax.data import tokenizer

HARD_TEXTS = [
    "",
    "   \t\n ",
    "a",
    "A Photo   of\ta\n\nCAT.",
    "it's he'll we've you're I'm they'd can't 'S 'LL '' ''s 's's",
    "ROCK'N'ROLL o'clock 'tis d'artagnan x'ſ 'ſ",
    "snake_case __init__ a_b_c ___",
    "1 22 333 4,444.55 3rd 10x 2½ ² ⅷ ٣",
    "Tom &amp; Jerry &amp;amp; &lt;b&gt;bold&lt;/b&gt; &quot;q&quot;",
    "&#39;x&#39; &nbsp;&copy; &#x1F600;",
    "&amp;amp;lt; &notanentity; &#xD800; &#28; &#0; 5 < 6 & 7 > 3",
    "“curly” ‘quotes’ it’s l’été « guillemets » ‚low‘",
    "ﬁne ﬂow oﬃce ﬀ ﬆone ĳ ǆ Ⅷ",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ❤️ ☃ 👍🏽",
    "猫が好き 中文字幕 한국어 테스트 ภาษาไทย नमस्ते العربية עברית Ελληνικά кириллица",
    "e\u0301 e\u0308\u0301 Z\u0351\u036b\u0343a\u030algo \u0301 a\u0345 !!\u0345!!",
    "bell\x07 nul\x00 esc\x1b[31mred\x1b[0m del\x7f nel\x85 unit\x1f sep\x1c bom\ufeff zwsp\u200b",
    "wide\u3000space no-break\u00a0space thin\u2009space line\u2028sep",
    "rtl\u202emark soft\u00adhyphen",
    "schÃ¶n â€œmojibakeâ€\x9d Ã© doesnâ€™t",
    "lone \ud83d surrogate \udc00 and pair \ud83d\ude00",
    "ＦＵＬＬ　ｗｉｄｔｈ ℌ𝔢𝔩𝔩𝔬 ＜start_of_text＞",
    "İstanbul ISPARTA ß ẞ Ǆ Σίσυφος ΌΣΟΣ K Å",
    "<start_of_text>",
    "<end_of_text> after",
    "a<start_of_text>b <START_OF_TEXT> <<start_of_text>> !<end_of_text> <ſtart_of_text>",
    "&lt;start_of_text&gt; <start_of_text",
    "</w> a</w>b <|endoftext|> <br/> <b>bold</b>",
    "http://example.com/a_b?c=d&e=f#g IMG_0001.JPG me@example.com #tag @user 100% $5 €5 £5",
    "a" * 2000,
    "long caption " * 154,
    "猫" * 2000,
    "word " * 74 + "last",
    "word " * 75 + "last",
]


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def differing(texts, open_clip_tokenizer, context_length=77):
    ours = tokenizer.tokenize(texts, context_length)
    theirs = open_clip_tokenizer(texts, context_length=context_length).numpy()
    assert ours.dtype == np.int32 and ours.shape == (len(texts), context_length)
    return [
        text
        for text, row, expected in zip(texts, ours, theirs, strict=True)
        if not np.array_equal(row, expected)
    ]


def test_equals_open_clip_on_web_captions(shared_data, open_clip_tokenizer):
    captions = (shared_data / "captions_web.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == 5000
    assert differing(captions, open_clip_tokenizer) == []


@pytest.mark.parametrize("context_length", [2, 77, 300])
def test_equals_open_clip_on_hard_texts(open_clip_tokenizer, context_length):
    assert differing(HARD_TEXTS, open_clip_tokenizer, context_length) == []


def test_equals_open_clip_on_every_assigned_character(open_clip_tokenizer):
    """Alone, and next to letters, digits, apostrophes and the neighbouring code points."""
    code_points = itertools.chain(range(1, 0x3400), range(0xA000, 0xAC00), range(0xF900, 0x1FB00))
    characters = [
        chr(code) for code in code_points if unicodedata.category(chr(code)) not in ("Cn", "Cs")
    ]
    assert len(characters) > 35_000
    texts = [
        "a{0}b {0}1{1} {2}{3} '{0}s {1}!{2}".format(*characters[first : first + 4])
        for first in range(0, len(characters) - 3, 4)
    ]
    assert differing(texts, open_clip_tokenizer, context_length=96) == []


def test_decode_equals_open_clip(shared_data, open_clip_tokenizer):
    captions = (shared_data / "captions_web.txt").read_text(encoding="utf-8").splitlines()[:500]
    texts = [*captions, *(text for text in HARD_TEXTS if "_of_text" not in text)]
    for text, row in zip(texts, tokenizer.tokenize(texts), strict=True):
        end = row.tolist().index(tokenizer.END_OF_TEXT_ID)
        expected = open_clip_tokenizer.decode(row[1:end].tolist()).strip()
        assert tokenizer.decode(row) == expected, text


@pytest.mark.parametrize("words", ["a red fox &amp;amp; ", "ox", "é", "🐕 犬", "\u00a0\n", "<&lt;"])
def test_what_stands_far_behind_the_last_id_changes_nothing(words, monkeypatch):
    """The ids equal those of the whole text, with or without spaces between the words."""
    text = "  " + words * (9000 // len(words))
    monkeypatch.setattr(tokenizer, "_CHARACTERS_PER_ID", 10**9)
    expected = tokenizer.tokenize(text)
    monkeypatch.setattr(tokenizer, "_CHARACTERS_PER_ID", 64)  # 1/16 of the real bound
    np.testing.assert_array_equal(tokenizer.tokenize(text), expected)


@pytest.mark.parametrize("vocab_size", [514, 515, 4096])
def test_a_small_vocabulary_equals_open_clip_with_as_many_merges(vocab_size, shared_data):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    num_merges = vocab_size - 514
    theirs.bpe_ranks = {k: rank for k, rank in theirs.bpe_ranks.items() if rank < num_merges}
    markers = ("<start_of_text>", "<end_of_text>")
    theirs.encoder |= {marker: vocab_size - 2 + i for i, marker in enumerate(markers)}
    theirs.cache = {marker: marker for marker in markers}
    captions = (shared_data / "captions_web.txt").read_text(encoding="utf-8").splitlines()[:300]
    texts = [*captions, *(text for text in HARD_TEXTS if len(text) < 500)]
    ours = tokenizer.tokenize(texts, 600, vocab_size)
    for text, row in zip(texts, ours.tolist(), strict=True):
        expected = [vocab_size - 2, *theirs.encode(text), vocab_size - 1]
        assert row[: len(expected)] == expected, text
        assert not any(row[len(expected) :])


def test_a_small_vocabulary_keeps_every_text():
    texts = ["a croissant, 3 zebras", "naïve 猫 😀", "don't"]
    for text, row in zip(texts, tokenizer.tokenize(texts, vocab_size=600), strict=True):
        whole = tokenizer.tokenize(text)[0]
        assert tokenizer.decode(row, 600) == tokenizer.decode(whole)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["ok", b"bytes"], 49408, r"texts\[1\]: expected a str, got bytes"),
        ("a", 513, "vocab_size: expected at least 514 .* got 513"),
    ],
)
def test_what_cannot_be_encoded_is_refused(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize(texts, vocab_size=vocab_size)
