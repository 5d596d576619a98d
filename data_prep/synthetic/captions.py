"""Text of the synthetic web: captions that describe a scene, and captions without information.

The sentences use verbs that a dependency parser reads as actions, so a caption filter (CAT) should
keep them. It should drop the product titles and the uninformative captions. Pictures and files do
not belong here.
"""

import numpy as np

from data_prep.synthetic.scenes import Scene, SceneObject

# (present tense, -ing form, words before the object). The present tense is empty if parsers often
# mistake it for a plural noun ("the red circle hovers").
_Verb = tuple[str, str, str]
SINGLE_VERBS: dict[str, tuple[_Verb, ...]] = {
    "floating": (
        ("", "floating", "in the air"),
        ("", "hovering", "in the air"),
        ("drifts", "drifting", "through the air"),
        ("", "flying", "through the air"),
    ),
    "standing": (
        ("stands", "standing", "on the ground"),
        ("sits", "sitting", "on the ground"),
        ("rests", "resting", "on the floor"),
        ("", "waiting", "on the floor"),
    ),
    "falling": (
        ("falls", "falling", "to the ground"),
        ("drops", "dropping", "to the floor"),
        ("falls", "falling", "from the sky"),
        ("", "tumbling", "to the ground"),
    ),
}
PAIR_VERBS: dict[str, tuple[_Verb, ...]] = {
    "on": (
        ("sits", "sitting", "on"),
        ("rests", "resting", "on"),
        ("stands", "standing", "on top of"),
    ),
    "above": (
        ("", "hovering", "above"),
        ("", "floating", "above"),
        ("", "flying", "over"),
    ),
    "beside": (
        ("stands", "standing", "next to"),
        ("sits", "sitting", "beside"),
        ("", "waiting", "near"),
        ("rests", "resting", "next to"),
    ),
    "against": (
        ("", "leaning", "against"),
        ("presses", "pressing", "against"),
        ("", "leaning", "on"),
    ),
    "behind": (
        ("hides", "hiding", "behind"),
        ("", "peeking", "out from behind"),
        ("sits", "sitting", "behind"),
    ),
    "inside": (
        ("sits", "sitting", "inside"),
        ("rests", "resting", "inside"),
        ("hides", "hiding", "inside"),
    ),
    "chasing": (
        ("", "chasing", ""),
        ("pursues", "pursuing", ""),
        ("", "running", "after"),
    ),
    "dropping": (
        ("falls", "falling", "onto"),
        ("drops", "dropping", "onto"),
        ("", "tumbling", "onto"),
    ),
    "hanging": (
        ("hangs", "hanging", "from"),
        ("", "dangling", "from"),
        ("", "swinging", "from"),
    ),
}
# The same relations, from the point of view of the other object.
CONVERSE_VERBS: dict[str, tuple[_Verb, ...]] = {
    "on": (("carries", "carrying", ""), ("supports", "supporting", ""), ("lifts", "lifting", "")),
    "above": (("", "waiting", "below"), ("stands", "standing", "under")),
    "against": (("props", "propping", "up"),),
    "behind": (("covers", "covering", ""), ("blocks", "blocking", "")),
    "inside": (("encloses", "enclosing", ""),),
    "chasing": (("", "fleeing", "from"), ("", "running", "away from")),
    "dropping": (("catches", "catching", ""),),
    "hanging": (("pulls", "pulling", "up"), ("tows", "towing", "")),
}
# Passive participles before "by". PASSIVES keep the order of the objects, the others swap it.
PASSIVES: dict[str, tuple[str, ...]] = {
    "on": ("carried", "supported", "lifted"),
    "against": ("propped up",),
    "behind": ("blocked",),
    "inside": ("enclosed",),
    "hanging": ("pulled up", "towed"),
}
CONVERSE_PASSIVES: dict[str, tuple[str, ...]] = {"chasing": ("chased", "pursued")}

# Prompts for zero-shot classification of scenes with one object.
SHAPE_TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "a small {} floating in the air",
    "a large {} standing on the ground",
    "a {} falling to the ground",
)
COLOR_TEMPLATES = (
    "a {} shape",
    "a picture of a {} shape",
    "a small {} shape floating in the air",
    "a large {} shape standing on the ground",
    "a {} shape falling to the ground",
)

# Probability that a colour is named. If all were, a contrastive loss would hardly need shapes.
_COLOR_SHARE = 0.75
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_TEXTURE_WORDS = {
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered",),
}
_ADVERBS = ("quietly", "slowly", "gently", "happily", "carefully")
_FRAGMENT_OPENINGS = ("a picture of", "a drawing of", "an image of", "illustration of")
_SENTENCE_OPENINGS = ("in this picture", "here", "in this drawing", "on a pale background")


def describe_scene(rng: np.random.Generator, scene: Scene, *, complete: bool = False) -> str:
    """Returns a sentence or participle fragment that is true of the scene.

    Args:
        rng: random generator for the phrasing.
        complete: whether to name every size, texture and colour in plain words without an
            opening, for evaluation. Otherwise some are omitted or replaced by synonyms.
    """
    phrases = [_noun_phrase(rng, o, complete) for o in scene.objects]
    if len(phrases) == 1:
        present, gerund, where = _pick(rng, SINGLE_VERBS[scene.relation])
        text, is_sentence = _clause(rng, phrases[0], present, gerund, where, plain=complete)
    else:
        text, is_sentence = _describe_pair(rng, scene.relation, *phrases, plain=complete)
    if not complete:
        text = _vary(rng, text, is_sentence)
    return text


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _describe_pair(
    rng: np.random.Generator, relation: str, subject: str, other: str, plain: bool
) -> tuple[str, bool]:
    if relation == "beside" and rng.random() < 0.5:
        subject, other = other, subject
    form = rng.random()
    if form < 0.2 and relation in CONVERSE_VERBS:
        present, gerund, link = _pick(rng, CONVERSE_VERBS[relation])
        return _clause(rng, other, present, gerund, f"{link} {subject}".strip(), plain)
    if form < 0.35 and relation in PASSIVES:
        return _passive(rng, subject, _pick(rng, PASSIVES[relation]), other)
    if form < 0.35 and relation in CONVERSE_PASSIVES:
        return _passive(rng, other, _pick(rng, CONVERSE_PASSIVES[relation]), subject)
    present, gerund, link = _pick(rng, PAIR_VERBS[relation])
    return _clause(rng, subject, present, gerund, f"{link} {other}".strip(), plain)


def _clause(
    rng: np.random.Generator, subject: str, present: str, gerund: str, rest: str, plain: bool
) -> tuple[str, bool]:
    """Returns a clause, and whether it is a sentence rather than a participle fragment."""
    adverb = "" if plain or rng.random() < 0.9 else f"{_pick(rng, _ADVERBS)} "
    form = rng.random()
    if form < 0.4:
        return f"{subject} is {adverb}{gerund} {rest}", True
    if form < 0.6 and present:
        return f"{subject} {adverb}{present} {rest}", True
    return f"{subject} {adverb}{gerund} {rest}", False


def _passive(
    rng: np.random.Generator, patient: str, participle: str, agent: str
) -> tuple[str, bool]:
    auxiliary = _pick(rng, ("is", "is being", "being"))
    return f"{patient} {auxiliary} {participle} by {agent}", auxiliary != "being"


def _noun_phrase(rng: np.random.Generator, item: SceneObject, complete: bool) -> str:
    words = []
    if complete:
        words.append(item.size)
    elif rng.random() < 0.7:
        words.append(item.size if rng.random() < 0.7 else _pick(rng, _SIZE_WORDS[item.size]))
    if item.texture != "plain" and (complete or rng.random() < 0.8):
        words.append(item.texture if complete else _pick(rng, _TEXTURE_WORDS[item.texture]))
    if complete or rng.random() < _COLOR_SHARE:
        words.append(item.color)
    words.append(item.shape)
    article = "an" if words[0][0] in "aeio" else "a"
    return " ".join([article, *words])


def _vary(rng: np.random.Generator, text: str, is_sentence: bool) -> str:
    if rng.random() < 0.15:
        opening = _pick(rng, _SENTENCE_OPENINGS if is_sentence else _FRAGMENT_OPENINGS)
        text = f"{opening}, {text}" if is_sentence else f"{opening} {text}"
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
        if is_sentence and rng.random() < 0.6:
            text += "."
    return text


def _listed(text: str) -> tuple[str, ...]:
    """Splits a list of phrases at its semicolons."""
    return tuple(phrase.strip() for phrase in text.split(";"))


_AUDIENCES = ("Mens", "Womens", "Unisex", "Baby", "Toddler", "Junior", "Adult", "Pet")
_MATERIALS = _listed(
    """
    Leather; Cotton; Stainless Steel; Silicone; Wooden; Ceramic; Nylon; Velvet; Canvas; Bamboo;
    Silver; Crystal; Polyester; Aluminum
    """
)
_GOODS = _listed(
    """
    Wallet; Phone Case; T-Shirt; Handbag; Earrings; Water Bottle; Backpack; Wall Clock; Desk Lamp;
    Coffee Mug; Sneakers; Bracelet; Pillow Case; Jacket; Curtain Panel; Phone Charger;
    Storage Box; Yoga Mat; Hoodie; Tablet Holder
    """
)
_QUALITIES = _listed(
    """
    RFID; Vintage; Waterproof; Slim; Portable; Luxury; Mini; Heavy Duty; Ultra Thin; Adjustable;
    Wireless; Classic; Deluxe; Eco Friendly; Premium
    """
)
_GOODS_COLORS = ("Brown", "Black", "Navy", "Beige", "Red", "Pink", "Grey", "White", "Multicolor")
_AMOUNTS = ("Set of 4", "Pack of 10", "2 Pcs", "Size XL", "Size 42", "12 oz", "16 inch", "3-Pack")
_OFFERS = ("FREE SHIPPING", "Free Shipping", "Sale", "50% OFF", "Best Price", "w/ Box", "NWT")
_TITLE_FORMS = (
    "NEW {audience} {material} {goods} {quality} {color} {year} {offer}",
    "{audience} {quality} {material} {goods} - {color} {amount}",
    "{material} {goods} {amount} {color} {offer}",
    "{quality} {goods} for {audience}, {color} {material}, {amount}",
    "{year} New {quality} {color} {material} {goods} {audience}",
    "{goods} {material} {quality} {color} {code} {offer}",
    "{code} {audience} {goods} {color} | {amount} | {offer}",
    "Lot of {number} {quality} {material} {goods} {color} {year}",
)


def write_product_title(rng: np.random.Generator) -> str:
    """Returns a caption in the style of a shop: nouns, adjectives and offers, without an action."""
    title = _pick(rng, _TITLE_FORMS).format(
        audience=_pick(rng, _AUDIENCES),
        material=_pick(rng, _MATERIALS),
        goods=_pick(rng, _GOODS),
        quality=_pick(rng, _QUALITIES),
        color=_pick(rng, _GOODS_COLORS),
        amount=_pick(rng, _AMOUNTS),
        offer=_pick(rng, _OFFERS),
        year=2012 + int(rng.integers(13)),
        number=2 + int(rng.integers(30)),
        code=f"{_pick(rng, ('OEM', 'SKU', 'HX', 'Model', 'Ref'))}-{rng.integers(100, 9999)}",
    )
    return title.upper() if rng.random() < 0.2 else title


_FILLERS = _listed(
    """
    untitled; Untitled; no description; stock photo; click to enlarge; thumbnail; Image; photo;
    placeholder; Default Title; n/a; slideshow image; logo; banner; main image; Featured Image;
    Picture; product image; Photo Gallery; alt text
    """
)
_FILE_FORMS = _listed(
    """
    IMG_{n:04d}.jpg; DSC{n:05d}; DSC_{n:04d}.JPG; image {small}; Image #{small};
    photo-{n:05d}.png; img-{n}-{small}.jpeg; Screenshot {date} at 10.{small:02d}.33; {date};
    Photo {small} of {small2}; http://www.example.com/img/{n}.jpg; P{n:07d}.jpg;
    www.example.org/gallery?id={n}; untitled ({small}); {date} {small:02d}:{small2:02d};
    figure {small}; {n:08x}.webp; slide {small}; Page {small}
    """
)


def write_uninformative(rng: np.random.Generator) -> str:
    """Returns a caption without information: a file name, date, URL or placeholder."""
    if rng.random() < 0.3:
        return _pick(rng, _FILLERS)
    year, month, day = rng.integers((2005, 1, 1), (2024, 13, 29)).tolist()
    dates = (f"{year}-{month:02d}-{day:02d}", f"{month:02d}/{day:02d}/{year}", f"{year}{month:02d}")
    return _pick(rng, _FILE_FORMS).format(
        n=int(rng.integers(1, 99999)),
        small=int(rng.integers(1, 20)),
        small2=int(rng.integers(20, 60)),
        date=_pick(rng, dates),
    )
