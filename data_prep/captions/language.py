"""The language gate: whether a caption is written in English.

`gates` calls `is_english` on every caption, so it counts words first and asks the
language model (py3langid) only about captions that stay in doubt.
"""

import math
import re

from data_prep.captions.lexicon import word_set

_WORD = re.compile(r"[^\W\d_]+")
_ENGLISH = word_set("""
    a about above across after against all along am among an and any are around as at away back be
    because been before behind being below beside between both but by can could did do does down
    during each every everyone few for from front get gets had has have having he her here him his
    how i if in inside into is it its just like made make many me more most my near new next no not
    now of off on one onto or other our out outside over own s she should so some someone such t
    than that the their them then there these they this those three through to together too top two
    under until up us very was we were what when where which while who whose why will with without
    would you your
""")
# Function words of other languages, those left out that are English words too ("son", "met").
_FOREIGN = frozenset().union(
    *map(
        word_set,
        (
            # German
            "der das und ein eine einen einem einer mit auf für ist nicht auch dem vom zum zur bei "
            "nach aus über sich wird sind oder wie ich beim im ihr sein wir",
            # French
            "les des une dans avec sur est sont qui aux où ce cette ces ses leur leurs nous vous "
            "très chez sous entre être et au que",
            # Spanish
            "un una uno unos unas con para por como pero muy más este esta estos sobre sus está "
            "están desde hasta cuando donde en",
            # Italian
            "il gli della delle dello degli nel nella nei che sono questo questa anche più alla "
            "alle dei dalla sul sulla mentre per",
            # Portuguese
            "um uma não das nas seu sua com em ao à às pelo pela são isto você",
            # Dutch
            "het een te voor op zijn niet ook naar aan deze wordt uit tegen",
            # Swedish, Danish, Norwegian
            "och att som för på är av ett inte från hos eller det og af til ikke med fra",
            # Polish, Czech
            "się jest nie przez dla oraz po przy ze jak który która jako při jsou který",
            # Turkish
            "ve bir için ile olan çok gibi daha",
            # Indonesian, Malay
            "yang untuk dengan ini itu pada dari tidak ke sebuah seorang",
            # Romanian, Finnish, Hungarian, Vietnamese
            "și în cu pe din sau pentru ei että jossa kanssa és az egy nem hogy và của là một "
            "trong cho các người trên",
        ),
    )
)
# Particles of foreign names: they stand in English captions too ("Rio de Janeiro").
_PARTICLES = word_set("al da de del den des di do dos du el la las le les los van von y")
_CLEARLY_ENGLISH = 0.5
_MIN_LETTERS = 5
_FOREIGN_SHARE = 1 / 3
# How far another language's score may be ahead of English, per square root of the letters: less
# where one of its function words occurs, more where all may be names. Ours, set on short captions.
_DOUBT = 0.5
_DOUBT_OF_NAMES = 3.0


def is_english(text: str, lexicon: frozenset[str] = frozenset()) -> bool:
    """Tells whether a caption is written in English.

    Function words of English and of other languages and the words of the lexicon are counted; where
    they do not settle it, py3langid decides. A short text without evidence (a name) passes, since
    wrong refusals cost more than captions without an action.

    Args:
      text: a cleaned caption with at least one letter.
      lexicon: lower-case base forms of English words.

    Returns:
      False for a text in another language.
    """
    words = _WORD.findall(text.lower())
    letters = "".join(words)
    if not text.isascii() and _FOREIGN_SHARE * len(letters) < sum(map(_is_foreign_script, letters)):
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


def _is_foreign_script(letter: str) -> bool:
    return letter > "\u024f" and not "\u1e00" <= letter <= "\u1eff"


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
    # Imported here: the model takes a moment to load and most shards never ask for it.
    import py3langid

    scores = dict(py3langid.rank(text))
    english = max(scores[language] for language in ("en", "pcm") if language in scores)
    # The scores are sums over the text's features, which say much the same thing again and again.
    return max(scores.values()) - english < doubt * math.sqrt(len(text))
