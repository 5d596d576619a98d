"""What happens to a caption before the parse: cleaning, and the gates that refuse it.

`data_prep.captions` calls `gate_caption` once per caption. The text comes from anywhere, so no
regular expression in here may take long on any input. No spaCy comes in here.
"""

import html
import re

from data_prep.captions.language import is_english
from data_prep.captions.lexicon import word_set

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

# Text split into tokens by a corpus: "it 's", "do n't", "t - shirt", "snow - covered".
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

_CLOSE_UP = re.compile(r"\bclose(?: - | )up\b", re.IGNORECASE)
_IMAGE_TALK = re.compile(
    r"(?:the |this )?(?:image|photo|picture)s? may (?:also )?contain\s*:?\s*", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?:\#\s*)?\d{1,3}\s*[.):]\s+(?=\D)")
# Two-letter states behind a place name; only in the text's own capitals.
_STATE = re.compile(
    r",\s*(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI"
    r"|S[CD]|T[NX]|UT|V[AT]|W[AIVY])(?:\s+\d{5})?(?=\s*(?:$|[,.;|)–-]))"
)
# What shops and picture agencies put behind a caption.
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
# The pattern needs one of these, and they are found in a tenth of its time.
_SALES_WORDS = word_set("""
    % $ £ € © alamy arrival deal depositphotos dreamstime free getty here now offer online
    pinterest price sale seller shutterstock size stock
""")
_TAIL_CHARS = 60
_FIRST_PERSON = re.compile(r"\bi(?=[' ])")

_MAX_CHARS = 1000
_FOLD_CAPITALS = 0.6
_FOLD_TITLE = 0.8
# Words that titles leave in lower case.
_TITLE_LOWER = word_set("and for from the with")


def gate_caption(caption: str, lexicon: frozenset[str] = frozenset()) -> tuple[str, str | None]:
    """Cleans a caption, or refuses it.

    Args:
      caption: the caption as it came.
      lexicon: lower-case base forms of English words, a help to the language gate.

    Returns:
      (text, None) with the text to parse, or ("", reason) with a reason of
      `caption_graph.GATE_REASONS`.
    """
    text = _unwrap(caption)
    if _URL.fullmatch(text):
        return "", "url"
    if _FILE_NAME.fullmatch(text):
        return "", "file_name"
    without_links = _LINK.sub(" ", text) if any(part in text for part in _LINK_PARTS) else text
    if "@" in without_links:
        without_links = _MAIL.sub(" ", without_links)
    if without_links != text and not _LETTER.search(without_links):
        return "", "url"
    text = fold_case(_strip_talk(_join_tokens(without_links)))
    if not _LETTER.search(text):
        return "", "empty"
    if not is_english(text, lexicon):
        return "", "not_english"
    # The tagger reads a small first letter as the start of a command, and "i" as a noun.
    if not text[1:2].isupper():
        text = text[0].upper() + text[1:]
    return _FIRST_PERSON.sub("I", text), None


def _unwrap(caption: str) -> str:
    """Removes markup and odd quotes, and cuts a text that is no caption any more.

    Ours: at most 1,000 characters are read, four times what CLIP's 77 tokens hold.
    """
    text = caption
    if not text.isascii():
        # Half of a surrogate pair is no character, and spaCy cannot store it.
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
    # In text with capitals a spaced hyphen is a dash.
    if " - " in text and text.islower():
        text = _SPACED_HYPHEN.sub(lambda match: f"{match[1] or ''}-", text)
    if "#" in text or "_" in text:
        text = text.replace("#", " ").replace("_", " ")
    return " ".join(text.split())


def _strip_talk(text: str) -> str:
    """Removes what is said about the picture or the offer, not about what can be seen."""
    text = _LIST_NUMBER.sub("", text, count=1) if text[:1].isdigit() else text
    text = _STATE.sub("", text)
    talk = _IMAGE_TALK.match(text)
    if talk:
        text = text[talk.end() :]
    while any(word in text[-_TAIL_CHARS:].lower() for word in _SALES_WORDS):
        tail = _SALES_TAIL.search(text, max(0, len(text) - _TAIL_CHARS))
        if not tail or tail.start() == 0:
            break
        text = text[: tail.start()]
    return text


def fold_case(text: str) -> str:
    """Lower-cases text that is written in capitals or in Title Case, for the tagger's sake.

    Args:
      text: any text.

    Returns:
      The text, in lower case when capitals are the rule in it (Ours: 60% of the letters, or 80% of
      the words after the first).
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
