"""A parsed caption as plain lists, and a lemmatizer for captions.

Rules and repairs work on the lists. `CaptionLemmatizer` replaces spaCy's lemmatizer in the
pipeline. It reads the same tables (which also serve the rules as the list of English words), needs
only the tagger, and does not turn "riding" into "rid". Rules about meaning do not belong here.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from spacy.attrs import DEP, HEAD, LEMMA, LOWER, ORTH, TAG
from spacy.language import Language
from spacy.lookups import Lookups
from spacy.tokens import Doc

from data_prep.captions.lexicon import word_set

NOUN_TAGS = frozenset(("NN", "NNS", "NNP", "NNPS"))
VERB_TAGS = frozenset(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"))
FINITE_TAGS = frozenset(("VBD", "VBP", "VBZ"))
ADJECTIVE_TAGS = frozenset(("JJ", "JJR", "JJS"))
PARTICIPLE_TAGS = frozenset(("VBN", "VBD", "VBG"))
MODIFIERS = frozenset(("amod", "compound", "nmod"))


class Sentence:
    """The tokens of a caption, hyphenated words joined, as lists that are faster than spaCy's Doc.

    Attributes, all indexed by token:
      low: lower-case text.        lemma: dictionary form, lower case.
      tag: Penn Treebank tag.      dep: label of the dependency on the head.
      head: index of the head; the root is its own head.
      kids: indices of the dependents, ascending.
      is_object: whether the token is the head noun of a thing or a person.
      is_hidden: whether a noun stands for the one after its "of" and is not an object itself.
    `nouns.mark_objects` sets the last two.
    """

    __slots__ = ("low", "lemma", "tag", "dep", "head", "kids", "is_object", "is_hidden")
    low: list[str]
    lemma: list[str]
    tag: list[str]
    dep: list[str]
    is_object: list[bool]
    is_hidden: list[bool]

    def __init__(self, doc: Doc):
        # Read by column: creating token objects would take longer than all rules together.
        tags, deps, lows, lemmas = doc.to_array([TAG, DEP, LOWER, LEMMA]).T.tolist()
        text_of: Any = doc.vocab.strings.__getitem__  # of hashes
        self.tag, self.dep = list(map(text_of, tags)), list(map(text_of, deps))
        self.low, self.lemma = list(map(text_of, lows)), list(map(text_of, lemmas))
        offsets = doc.to_array(HEAD).astype("int64")
        self.head = (np.arange(len(offsets)) + offsets).tolist()
        if "-" in self.low:
            self._join_hyphens([token.whitespace_ == "" for token in doc])
        self.kids: list[list[int]] = [[] for _ in self.low]
        for i, head in enumerate(self.head):
            if head != i:
                self.kids[head].append(i)

    def has_kid(self, i: int, *labels: str) -> bool:
        """Returns whether a token has a dependent with one of the labels."""
        dep = self.dep
        for kid in self.kids[i]:  # noqa: SIM110 (hot path; a generator takes twice as long)
            if dep[kid] in labels:
                return True
        return False

    def kids_of(self, i: int, *labels: str) -> list[int]:
        """Returns the dependents of a token that have one of the labels, ascending."""
        dep = self.dep
        return [kid for kid in self.kids[i] if dep[kid] in labels]

    def attach(self, i: int, head: int, dep: str) -> None:
        """Moves a token to another head, or makes it the root if it is its own head.

        Ignores a move that would create a cycle.
        """
        above = head
        while above != i and self.head[above] != above:
            above = self.head[above]
        if above == i and head != i:
            return
        if self.head[i] != i:
            self.kids[self.head[i]].remove(i)
        self.head[i] = head
        self.dep[i] = dep
        if head != i:
            self.kids[head] = sorted((*self.kids[head], i))

    def replace(self, old: int, new: int) -> None:
        """Puts token `new` in the place of token `old` in the tree, with its dependents."""
        at_root = self.head[old] == old
        self.attach(new, new if at_root else self.head[old], self.dep[old])
        for kid in list(self.kids[old]):
            if kid != new:
                self.attach(kid, new, self.dep[kid])

    def _join_hyphens(self, glued: list[bool]) -> None:
        """Joins the tokens of each hyphenated word ("hand-painted", "t-shirt", "close-up")."""
        groups: list[list[int]] = []
        i = 0
        while i < len(self.low):
            group = [i]
            while i + 2 < len(self.low) and self.low[i + 1] == "-" and glued[i] and glued[i + 1]:
                group += [i + 1, i + 2]
                i += 2
            groups.append(group)
            i += 1
        index = {i: new for new, group in enumerate(groups) for i in group}
        joined = [self._join(group) for group in groups]
        self.low, self.lemma, self.tag, self.dep, heads = map(list, zip(*joined, strict=True))
        self.head = [index[head] for head in heads]

    def _join(self, group: list[int]) -> tuple[str, str, str, str, int]:
        """Returns (low, lemma, tag, dep, old head) of the word that joins a group of tokens."""
        # The token with no ancestor in the group. The head of any other may hang below a later
        # token of the group, and the joined word would then be its own ancestor.
        words = range(group[0], group[-1] + 1)
        root = next(i for i in words if not any(above in words for above in self._heads_above(i)))
        head = self.head[root]
        tag, dep = self.tag[root], self.dep[root]
        low = "".join(self.low[i] for i in group)
        lemma = "".join(self.low[i] for i in group[:-1]) + self.lemma[group[-1]]
        if len(group) > 1 and head > group[-1] and self.tag[head] in NOUN_TAGS:
            # A modifier before a noun: names a kind ("x-ray machine"), counts, or describes.
            if all(self.tag[i] in NOUN_TAGS for i in group[::2]):
                tag, dep = "NN", "compound"
            elif self.tag[group[0]] == "CD" or low[0].isdigit():
                tag, dep = "CD", "nummod"
            else:
                tag, dep, lemma = "JJ", "amod", low
        return low, lemma, tag, dep, head

    def _heads_above(self, i: int) -> Iterator[int]:
        """Yields the ancestors of a token, from its head up to the root."""
        while self.head[i] != i:
            i = self.head[i]
            yield i


_CACHE_SIZE = 100_000
_KINDS = {
    **dict.fromkeys(("NNS", "NNPS"), "noun"),
    **dict.fromkeys(("VBD", "VBG", "VBN", "VBZ"), "verb"),
    **dict.fromkeys(("JJR", "JJS"), "adj"),
}
# Words with misleading table entries: plural forms that name one thing, Latin plurals that have
# become singular, and verbs close to a rare verb.
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
# Verbs common in captions that are missing from the tables.
_NEW_VERBS = word_set("""
    barbecue bodyboard breakdance crowdsurf grill headbang kitesurf livestream longboard moonwalk
    paraglide parasail photobomb sandboard showcase slackline snorkel text vlog wakeboard
""")
# Clitics and present forms of auxiliaries, which lemmatization by their tag VBP leaves unchanged.
_AUXILIARIES = {
    **dict.fromkeys(("am", "are", "is", "was", "were", "'m", "'re", "'s"), "be"),
    **dict.fromkeys(("has", "had", "'ve", "'d"), "have"),
    "ca": "can",
    "wo": "will",
}
# One syllable with a single vowel letter and a single final consonant: "rid", "star", "quit".
_CLOSED_SYLLABLE = re.compile(r"(?:qu|[^aeiou])*[aeiouy][^aeiouwxy]")
_NEEDS_E = re.compile(r"(?:v|[^s]s|[^z]z|u|[aeiou]c|nc|rc|dg|rg|[^aeiou]l)$")
_DOUBLED = re.compile(r"([bdgkmnprtv])\1$")


@Language.factory("caption_lemmatizer", assigns=["token.lemma"], requires=["token.tag"])
class CaptionLemmatizer:
    """Sets `token.lemma_` in lower case, from the word and its tag.

    Attributes:
      nouns, verbs, adjectives, adverbs: lower-case base forms of English words.
      lexicon: the union of nouns, verbs and adjectives.
    """

    def __init__(self, nlp: Language, name: str):
        """Reads the tables of the pipeline's "lemmatizer" component, which must exist."""
        del name
        lemmatizer: Any = nlp.get_pipe("lemmatizer")
        lookups: Lookups = lemmatizer.lookups
        index = lookups.get_table("lemma_index")
        exceptions = lookups.get_table("lemma_exc")
        rules = lookups.get_table("lemma_rules")
        self._index, self._rules, self._exceptions = {}, {}, {}
        for kind, own in _EXCEPTIONS.items():
            self._index[kind] = frozenset(index[kind])
            self._rules[kind] = list(map(tuple, rules[kind]))
            known = {word: forms[0] for word, forms in exceptions[kind].items()}
            self._exceptions[kind] = known | own
        self._index["verb"] |= _NEW_VERBS
        self.nouns, self.verbs = self._index["noun"], self._index["verb"]
        self.adjectives, self.adverbs = self._index["adj"], frozenset(index["adv"])
        self.lexicon = self.nouns | self.verbs | self.adjectives
        self._cached = functools.lru_cache(_CACHE_SIZE)(self.lemmatize)

    def __call__(self, doc: Doc) -> Doc:
        """Sets the lemmas of a tagged document."""
        strings = doc.vocab.strings
        # Read by column: creating token objects would take longer than everything else.
        keys = doc.to_array([ORTH, TAG]).tolist()
        lemmas = [strings.add(self._cached(strings[word], strings[tag])) for word, tag in keys]
        values: Any = np.array(lemmas, np.uint64)  # hashes; spaCy declares thinc's array type
        return doc.from_array([LEMMA], values)

    def lemmatize(self, word: str, tag: str) -> str:
        """Returns the dictionary form of a word, in lower case, or the word if its tag has none."""
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
    """Chooses the base of an -ed or -ing form by spelling if the tables allow several.

    A verb like "rid" doubles its consonant ("ridding"), so "riding" must come from "ride".
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
