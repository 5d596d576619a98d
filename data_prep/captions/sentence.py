"""A parsed caption as plain lists: what the caption rules read and the repairs correct.

No rule about meaning comes in here.
"""

from typing import Any

from spacy.attrs import DEP, HEAD, LEMMA, LOWER, TAG
from spacy.tokens import Doc

NOUN_TAGS = frozenset(("NN", "NNS", "NNP", "NNPS"))
VERB_TAGS = frozenset(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"))
FINITE_TAGS = frozenset(("VBD", "VBP", "VBZ"))
ADJECTIVE_TAGS = frozenset(("JJ", "JJR", "JJS"))
PARTICIPLE_TAGS = frozenset(("VBN", "VBD", "VBG"))
MODIFIERS = frozenset(("amod", "compound", "nmod"))


class Sentence:
    """The tokens of a caption, hyphenated words as one; lists are walked much faster than spaCy.

    Attributes, all indexed by token:
      low: lower-case text.        lemma: dictionary form, lower case.
      tag: Penn Treebank tag.      dep: label of the dependency on the head.
      head: index of the head, the token's own at the root.
      kids: indices of the dependents, ascending.
      is_object: whether the token is the head of a phrase that names a thing or a person.
      is_hidden: whether a noun leads on to the one behind its "of", and is no object of its own.
    The last two are filled in by `data_prep.captions.nouns.mark_objects`.
    """

    __slots__ = ("low", "lemma", "tag", "dep", "head", "kids", "is_object", "is_hidden")
    low: list[str]
    lemma: list[str]
    tag: list[str]
    dep: list[str]
    is_object: list[bool]
    is_hidden: list[bool]

    def __init__(self, doc: Doc):
        # By columns: token objects would take longer to make than all rules together.
        columns = doc.to_array([TAG, DEP, LOWER, LEMMA]).T.tolist()
        strings: Any = doc.vocab.strings  # of hashes
        self.tag, self.dep, self.low, self.lemma = (
            list(map(strings.__getitem__, c)) for c in columns
        )
        offsets = doc.to_array(HEAD).astype("int64").tolist()
        self.head = [i + offset for i, offset in enumerate(offsets)]
        if "-" in self.low:
            self._join_hyphens([token.whitespace_ == "" for token in doc])
        self.kids: list[list[int]] = [[] for _ in self.low]
        for i, head in enumerate(self.head):
            if head != i:
                self.kids[head].append(i)

    def __len__(self) -> int:
        return len(self.low)

    def has_kid(self, i: int, *labels: str) -> bool:
        """Returns whether a token has a dependent with one of the labels."""
        dep = self.dep
        for kid in self.kids[i]:  # noqa: SIM110 (half the time of a generator, and called most)
            if dep[kid] in labels:
                return True
        return False

    def kids_of(self, i: int, *labels: str) -> list[int]:
        """Dependents of a token with one of the labels, ascending."""
        dep = self.dep
        return [kid for kid in self.kids[i] if dep[kid] in labels]

    def attach(self, i: int, head: int, dep: str) -> None:
        """Moves a token to another head, or makes it the root when that is itself.

        A move that would close a circle is not made: the tree stays a tree on any text.
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
        """Gives the position of a token in the tree, and its dependents, to another."""
        at_root = self.head[old] == old
        self.attach(new, new if at_root else self.head[old], self.dep[old])
        for kid in list(self.kids[old]):
            if kid != new:
                self.attach(kid, new, self.dep[kid])

    def _join_hyphens(self, glued: list[bool]) -> None:
        """Makes one token of each hyphenated word ("hand-painted", "t-shirt", "close-up")."""
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
        """(low, lemma, tag, dep, old head) of the word that a group of tokens makes."""
        root = next((i for i in group if self.head[i] not in group or self.head[i] == i), group[0])
        head = self.head[root]
        tag, dep = self.tag[root], self.dep[root]
        low = "".join(self.low[i] for i in group)
        lemma = "".join(self.low[i] for i in group[:-1]) + self.lemma[group[-1]]
        if len(group) > 1 and head > group[-1] and self.tag[head] in NOUN_TAGS:
            # Before a noun it names a kind ("x-ray machine"), counts, or describes.
            if all(self.tag[i] in NOUN_TAGS for i in group[::2]):
                tag, dep = "NN", "compound"
            elif self.tag[group[0]] == "CD" or low[0].isdigit():
                tag, dep = "CD", "nummod"
            else:
                tag, dep, lemma = "JJ", "amod", low
        return low, lemma, tag, dep, head
