"""A spaCy component that gives words their dictionary form, and the English word list behind it.

It stands in the pipeline in place of spaCy's own lemmatizer: it reads the same tables, needs only
the tagger, and does not turn "riding" into "rid". No rule about captions comes in here.
"""

import functools
import re
from typing import Any

import numpy as np
from spacy.attrs import LEMMA, ORTH, TAG
from spacy.language import Language
from spacy.lookups import Lookups
from spacy.tokens import Doc

from data_prep.captions.lexicon import word_set

_CACHE_SIZE = 100_000
_KINDS = {
    "NNS": "noun",
    "NNPS": "noun",
    "VBD": "verb",
    "VBG": "verb",
    "VBN": "verb",
    "VBZ": "verb",
    "JJR": "adj",
    "JJS": "adj",
}
# Words whose table entry misleads: names of one thing in a plural form, Latin plurals that have
# become singular, and verbs that have a rare neighbour.
_UNCHANGED = word_set("""
    binoculars clothes data fries glasses goggles headphones jeans leggings media pajamas pants
    people pyjamas scissors series shorts species sunglasses tights trousers
""")
_EXCEPTIONS = {
    "noun": {
        **{word: word for word in _UNCHANGED},
        "bunches": "bunch",
        "leaves": "leaf",
        "lenses": "lens",
        "lives": "life",
    },
    "verb": {
        "bathed": "bathe",
        "bathing": "bathe",
        "lay": "lie",
        "routed": "route",
        "routing": "route",
    },
    "adj": {},
}
# Verbs of captions that the tables, older than them, lack.
_NEW_VERBS = word_set("""
    barbecue bodyboard breakdance crowdsurf grill headbang kitesurf livestream longboard moonwalk
    paraglide parasail photobomb sandboard showcase slackline snorkel text vlog wakeboard
""")
# The clitics and present forms of the auxiliaries; their tag VBP would leave them as they are.
_AUXILIARIES = {
    "am": "be",
    "are": "be",
    "is": "be",
    "was": "be",
    "were": "be",
    "'m": "be",
    "'re": "be",
    "'s": "be",
    "has": "have",
    "had": "have",
    "'ve": "have",
    "'d": "have",
    "ca": "can",
    "wo": "will",
}
# One syllable with one vowel letter and one consonant behind it: "rid", "star", "quit".
_CLOSED_SYLLABLE = re.compile(r"(?:qu|[^aeiou])*[aeiouy][^aeiouwxy]")
_NEEDS_E = re.compile(r"(?:v|[^s]s|[^z]z|u|[aeiou]c|nc|rc|dg|rg|[^aeiou]l)$")
_DOUBLED = re.compile(r"([bdgkmnprtv])\1$")


class CaptionLemmatizer:
    """Sets `token.lemma_` from the word and its tag, in lower case.

    Attributes:
      nouns, verbs, adjectives, adverbs: lower-case base forms of English words.
      lexicon: the first three.
    """

    def __init__(self, lookups: Lookups):
        index = lookups.get_table("lemma_index")
        exceptions = lookups.get_table("lemma_exc")
        rules = lookups.get_table("lemma_rules")
        self._index = {kind: frozenset(index[kind]) for kind in _EXCEPTIONS}
        self._index["verb"] |= _NEW_VERBS
        self._rules = {kind: [tuple(rule) for rule in rules[kind]] for kind in _EXCEPTIONS}
        self._exceptions = {
            kind: {word: forms[0] for word, forms in exceptions[kind].items()} | _EXCEPTIONS[kind]
            for kind in _EXCEPTIONS
        }
        index_of = self._index.__getitem__
        self.nouns, self.verbs, self.adjectives = map(index_of, ("noun", "verb", "adj"))
        self.adverbs = frozenset(index["adv"])
        self.lexicon = self.nouns | self.verbs | self.adjectives
        self._cached = functools.lru_cache(_CACHE_SIZE)(self.lemmatize)

    def __call__(self, doc: Doc) -> Doc:
        """Sets the lemmas of a tagged document."""
        strings = doc.vocab.strings
        # By columns: token objects would take longer to make than all the rest.
        keys = doc.to_array([ORTH, TAG]).tolist()
        lemmas = [strings.add(self._cached(strings[word], strings[tag])) for word, tag in keys]
        values: Any = np.array(lemmas, np.uint64)  # hashes; spaCy declares thinc's own array type
        return doc.from_array([LEMMA], values)

    def lemmatize(self, word: str, tag: str) -> str:
        """The dictionary form of a word, in lower case; the word itself where its tag has none."""
        word = word.lower().replace("’", "'")
        if word in _AUXILIARIES and tag[:2] in ("VB", "MD"):
            return _AUXILIARIES[word]
        kind = _KINDS.get(tag)
        if kind is None:
            return word
        known = self._exceptions[kind].get(word)
        bare = word.removesuffix("ed").removesuffix("ing")
        if known is not None and (
            bare == word or not bare.endswith("ll") or bare not in self._index[kind]
        ):
            return known
        stems = [
            word[: -len(old)] + new
            for old, new in self._rules[kind]
            if word.endswith(old) and len(word) > len(old) + 1
        ]
        listed = [stem for stem in stems if stem in self._index[kind]]
        if kind != "verb" or not word.endswith(("ed", "ing")):
            return (listed or stems or [word])[0]
        return _choose_verb(word, listed, stems)


def _choose_verb(word: str, listed: list[str], stems: list[str]) -> str:
    """Chooses the base of an -ed or -ing form by spelling where the tables leave a choice.

    A verb such as "rid" doubles its consonant ("ridding"), so "riding" comes from "ride".
    """
    if len(set(listed)) == 1:
        return listed[0]
    if not stems:
        return word
    bare = word[:-2] if word.endswith("ed") else word[:-3]
    if not listed and _DOUBLED.search(bare):
        return bare[:-1]
    if _CLOSED_SYLLABLE.fullmatch(bare) or (not listed and _NEEDS_E.search(bare)):
        return bare + "e"
    return bare


@Language.factory("caption_lemmatizer", assigns=["token.lemma"], requires=["token.tag"])
def create_caption_lemmatizer(nlp: Language, name: str) -> CaptionLemmatizer:
    """Makes the component from the tables of the pipeline's own lemmatizer, which must be there."""
    lemmatizer: Any = nlp.get_pipe("lemmatizer")
    return CaptionLemmatizer(lemmatizer.lookups)
