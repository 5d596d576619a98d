"""Cleans captions before parsing and rejects those that are not English sentences or phrases.

Captions are untrusted input, so no regular expression here may backtrack heavily. The language
gate counts known words first and calls py3langid only when the counts are inconclusive. This
module does not import spaCy.
"""

import html
import math
import pathlib
import re
import tomllib

from data_prep.captions.lexicon import FUNCTION_WORDS, VAGUE_NOUNS, word_set

_TAG = re.compile(r"<[^<>]{1,200}>")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "\u00ad": None})
_LINK = re.compile(r"(?:https?://|www\.)\S+|\bpic\.twitter\.com/\S+", re.IGNORECASE)
_LINK_PARTS = ("://", "www.", "WWW.", "twitter.com")
_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64})+")
_LETTER = re.compile(r"[^\W\d_]")

_FILE_NAME = re.compile(
    r"""
      .*\w\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|avif|cr2|nef|raw|psd|eps|ai|pdf
            |mp4|mov|avi)
    | (?:img|image|dsc[nf]?|pict?|photo|picture|pxl|vid|mvi|gopr|scan|screen[ ]?shot|wp|fb|capture
        |untitled|whatsapp[ ]image)
      [\s_-]*\d(?:[\d\s_.():-]|copy|edited|\b[a-z]{1,3}\b)*
    | (?:[a-z]{1,4}[_-]?\d{4,}|\d{6,})[\w-]*
    | [\w.+-]*\w_\w[\w.+-]*
    | \w+(?:-\w+){4,}
    | [a-f\d-]{16,}
    """,
    re.IGNORECASE | re.VERBOSE,
)
_URL = re.compile(
    r"(?:(?:https?|ftp)://|www\.)\S+"
    r"|(?:[\w-]+\.)+(?:com|net|org|edu|gov|info|biz|shop|io|co|uk|de|fr|us|ca|au|jp|cn|ru|eu)(?:/\S*)?",
    re.IGNORECASE,
)

# Captions stored as tokens separated by spaces: "it 's", "do n't", "t - shirt", "snow - covered".
_CLITIC = re.compile(r" '(s|m|re|ve|d|ll)\b| (?=n't\b)", re.IGNORECASE)
_SPACED_HYPHEN = re.compile(
    r"""
      \b(t|v|x|e|self|still|semi|non|multi|mid|pre|post|anti|co|ex|re|well|high|low|long|short|full
        |half|two|three|four|single|pro|off|ultra|mini|super|under|over)[ ]-[ ](?=[a-z])
    | (?<=[a-z])[ ]-[ ](?=(?:up|down|out|off|free|like|style|styled|sized?|length|chic|shirts?|term
        |key|road|screen|end|class|century|old|year|foot|friendly|time|tech|quality|looking|winning
        |saving|fitting|\w+[^e]ed)\b)
    """,
    re.VERBOSE,
)

# Words after a spaced hyphen that mark it as a dash rather than as a hyphen inside a word.
_DASH = re.compile(
    r"""
    [ ]-[ ](?=(?:an?|the|this|that|these|those|it|its|he|she|they|we|you|i|my|your|his|her|their|our
      |with|on|in|at|from|for|if|but|not|no|what|how|who|which|where|when|is|are|was)\b)
    """,
    re.VERBOSE,
)

_CLOSE_UP = re.compile(r"\bclose(?: - | )up\b", re.IGNORECASE)
_IMAGE_TALK = re.compile(
    r"(?:the |this )?(?:image|photo|picture)s? may (?:also )?contain\s*:?\s*", re.IGNORECASE
)
# A picture number ends the phrase before it: "property image # large pool".
_PICTURE_NUMBER = re.compile(r"\b(image|photo|picture) ?# ?\d* (?=\w)", re.IGNORECASE)
_TAG_JOINT = re.compile(r" ?, (?:and )?| and ")
_LIST_NUMBER = re.compile(r"(?:\#\s*)?\d{1,3}\s*[.):]\s+(?=\D)")
# Two-letter US states after a place name. Case-sensitive.
_STATE = re.compile(
    r",\s*(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI"
    r"|S[CD]|T[NX]|UT|V[AT]|W[AIVY])(?:\s+\d{5})?(?=\s*(?:$|[,.;|)–-]))"
)
# Text that shops and picture agencies append to captions.
_SALES_TAIL = re.compile(
    r"""
    [\s,;:|*!~.\#®™–—-]*
    (?:\bfree[ ](?:\w+[ ])?(?:shipping|delivery|returns?)
      |\b(?:buy|shop|order)[ ](?:it[ ])?(?:now|online|here)
      |\b(?:in|out[ ]of|limited|while|low)[ ]stock
      |\bstock[ ](?:photo|image|picture|vector|illustration|footage)s?
      |\b(?:best|great|low|wholesale)[ ](?:price|seller|offer|deal)s?
      |\bnew[ ]arrivals?|\b(?:hot|clearance)[ ]sale|\bon[ ]sale
      |(?:\bup[ ]to[ ])?\b\d+\s?%[ ](?:off|discount)|[$£€]\s?\d[\d.,]*
      |\bsize[ ]?:?[ ]?(?:\d[\w./]*|x*[sml]|small|medium|large)
      |\broyalty[ -]free(?:[ ]\w+){0,3}|\bshutterstock(?:[ ]\d+)?
      |\b(?:getty|istock)(?:[ ]images)?|\balamy|\bdreamstime|\bdepositphotos|\bpinterest
      |©.*)
    [\s.,;:|*!~\#®™–—-]*$
    """,
    re.IGNORECASE | re.VERBOSE,
)
# `_SALES_TAIL` can match only if one of these occurs; checking them first is ten times faster.
_SALES_WORDS = word_set("""
    % $ £ € © alamy arrival deal depositphotos dreamstime free getty here now offer online
    pinterest price sale seller shutterstock size stock
""")
_TAIL_CHARS = 60
_MOTION_TAIL = re.compile(r"(?<!\bin)(?<!\bof)(?:\s*,)? slow motion(?: \w+)?\W*$", re.IGNORECASE)
_FIRST_PERSON = re.compile(r"\bi(?=[' ])")

_MAX_CHARS = 1000
_MAX_RAW_CHARS = 64 * _MAX_CHARS
_FOLD_CAPITALS = 0.6
_FOLD_TITLE = 0.8
# Words that Title Case leaves in lower case.
_TITLE_LOWER = word_set("and for from the with")


# The language gate.
_WORD = re.compile(r"[^\W\d_]+")
_ENGLISH = FUNCTION_WORDS | word_set(
    "across am among beside both everyone gets having onto someone t whose why"
)
# Function words of other languages, by language.
_FOREIGN_FILE = pathlib.Path(__file__).with_name("foreign_words.toml")
_FOREIGN = word_set(" ".join(tomllib.loads(_FOREIGN_FILE.read_text("utf-8")).values()))
# Particles of foreign names, which also occur in English captions ("Rio de Janeiro").
_PARTICLES = word_set("al da de del den des di do dos du el la las le les los van von y")
_CLEARLY_ENGLISH = 0.5
_MIN_LETTERS = 5
_FOREIGN_SHARE = 1 / 3
# Largest lead of another language's score over English, per square root of the number of letters.
# The smaller one applies if a foreign function word occurs. Ours, tuned on short captions.
_DOUBT = 0.5
_DOUBT_OF_NAMES = 3.0


def gate_caption(caption: str, lexicon: frozenset[str] = frozenset()) -> tuple[str, str | None]:
    """Cleans a caption or rejects it.

    Args:
      caption: the raw caption.
      lexicon: lower-case base forms of English words, used by the language gate.

    Returns:
      (text, None) with the text to parse, or ("", reason) with a reason from
      `graph.GATE_REASONS`.
    """
    text = _unwrap(caption)
    if _URL.fullmatch(text):
        return "", "url"
    if _FILE_NAME.fullmatch(text):
        return "", "file_name"
    without_links = _LINK.sub(" ", text) if any(map(text.__contains__, _LINK_PARTS)) else text
    if "@" in without_links:
        without_links = _MAIL.sub(" ", without_links)
    if without_links != text and not _LETTER.search(without_links):
        return "", "url"
    text = fold_case(_strip_talk(_join_tokens(without_links)))
    if not _LETTER.search(text):
        return "", "empty"
    if not is_english(text, lexicon):
        return "", "not_english"
    # The tagger reads a lower-case first word as an imperative, and "i" as a noun.
    if not text[1:2].isupper():
        text = text[0].upper() + text[1:]
    return _FIRST_PERSON.sub("I", text), None


def _unwrap(caption: str) -> str:
    """Removes markup, normalises quotes and whitespace, and truncates long text.

    Ours: keeps at most 1,000 characters, four times the capacity of CLIP's 77 tokens. Raw text is
    first cut to 64,000 characters, because a caption may hold megabytes.
    """
    text = caption
    if len(text) > _MAX_RAW_CHARS:
        text = text.lstrip()[:_MAX_RAW_CHARS]
    if not text.isascii():
        # A lone surrogate is not a character, and spaCy cannot store it.
        text = text.encode("utf-8", "ignore").decode("utf-8")
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", re.sub(r"<person>", "person", text, flags=re.IGNORECASE))
    text = " ".join(text.translate(_QUOTES).split())
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS].rpartition(" ")[0] or text[:_MAX_CHARS]
    return text


def _join_tokens(text: str) -> str:
    text = _CLITIC.sub(lambda match: f"'{match[1]}" if match[1] else "", text)
    text = _CLOSE_UP.sub("close-up", text)
    # In text with capitals, a spaced hyphen is always a dash.
    if " - " in text and text.islower():
        text = _SPACED_HYPHEN.sub(lambda match: f"{match[1] or ''}-", text)
        text = _DASH.sub(" -- ", text)
    if "#" in text or "_" in text:
        text = _PICTURE_NUMBER.sub(r"\1 : ", text)
        text = text.replace("#", " ").replace("_", " ")
    return " ".join(text.split())


def _strip_talk(text: str) -> str:
    """Removes words about the picture or an offer, which describe nothing visible."""
    text = _LIST_NUMBER.sub("", text, count=1) if text[:1].isdigit() else text
    text = _STATE.sub("", text)
    talk = _IMAGE_TALK.match(text)
    if talk:
        text = _part_tags(text[talk.end() :])
    if text[-_TAIL_CHARS:].lower().find(" slow motion") > 0:
        text = _MOTION_TAIL.sub("", text)
    while any(map(text[-_TAIL_CHARS:].lower().__contains__, _SALES_WORDS)):
        tail = _SALES_TAIL.search(text, max(0, len(text) - _TAIL_CHARS))
        if not tail or tail.start() == 0:
            break
        text = text[: tail.start()]
    return text


def _part_tags(text: str) -> str:
    """Moves the bare nouns in a list of what the image may contain behind its longer phrases.

    "Person , riding on a horse , sky and outdoor" must not become a horse and sky that are ridden.
    """
    items = [item for item in _TAG_JOINT.split(text.rstrip(" .")) if item]
    bare = [item for item in items[1:] if " " not in item and not item.endswith("ing")]
    if not bare or len(bare) == len(items) - 1:
        return text
    things = [item for item in bare if item not in VAGUE_NOUNS]
    deeds = " , ".join(item for item in items if item not in bare)
    return f"{deeds} . {' , '.join(things)}" if things else deeds


def fold_case(text: str) -> str:
    """Lower-cases text in capitals or in Title Case, which the tagger would misread.

    Returns:
      The text, in lower case if 60% of its letters are capitals or 80% of the words after the
      first start with one (ours).
    """
    capitals = sum(map(str.isupper, text))
    if capitals < 2:
        return text
    if capitals >= _FOLD_CAPITALS * sum(map(str.isalpha, text)):
        return text.lower()
    words = [word for word in text.split()[1:] if len(word) > 2 and word[0].isalpha()]
    titled = sum(word[0].isupper() for word in words)
    lower = len(words) - titled - len(_TITLE_LOWER.intersection(words))
    return text.lower() if titled and titled >= _FOLD_TITLE * (titled + lower) else text


def is_english(text: str, lexicon: frozenset[str] = frozenset()) -> bool:
    """Returns whether a caption is written in English.

    Counts English words, foreign function words and words of the lexicon; py3langid decides if the
    counts are inconclusive. A short text without evidence (such as a name) passes, because a wrong
    rejection costs more than a caption without an action.
    """
    words = _WORD.findall(text.lower())
    letters = "".join(words)
    if not text.isascii():
        foreign = sum(c > "\u024f" and not "\u1e00" <= c <= "\u1eff" for c in letters)
        if _FOREIGN_SHARE * len(letters) < foreign:
            return False
    english = foreign = 0
    for word in words:
        if word in _ENGLISH:
            english += 1
        elif word in _PARTICLES:
            pass
        elif word in _FOREIGN:
            foreign += 1
        elif _is_listed(word, lexicon):
            english += 1
    if english - 2 * foreign >= _CLEARLY_ENGLISH * len(words):
        return True
    if len(letters) < _MIN_LETTERS:
        return True
    return _classify_english(" ".join(words), _DOUBT if foreign else _DOUBT_OF_NAMES)


def _is_listed(word: str, lexicon: frozenset[str]) -> bool:
    if word in lexicon:
        return True
    if word.endswith("s"):
        return word[:-1] in lexicon or (word.endswith("es") and word[:-2] in lexicon)
    if word.endswith("ing"):
        return word[:-3] in lexicon or word[:-3] + "e" in lexicon or word[:-4] in lexicon
    if word.endswith("ed"):
        return word[:-2] in lexicon or word[:-1] in lexicon or word[:-3] in lexicon
    return False


def _classify_english(text: str, doubt: float) -> bool:
    # Imported here: loading the model takes time, and most shards never need it.
    import py3langid

    scores = dict(py3langid.rank(text))
    english = max(scores[language] for language in ("en", "pcm") if language in scores)
    # Scores are sums over correlated features, hence the square root.
    return max(scores.values()) - english < doubt * math.sqrt(len(text))
