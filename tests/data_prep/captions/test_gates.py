"""Before the parse: captions refused by their text alone, and the cleaning of the others."""

import pytest

from data_prep.captions.gates import gate_caption
from data_prep.captions.parse import parse_captions

# Gates


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        ("!!! ... ???", "empty"),
        ("😀", "empty"),
        ("IMG_1234", "file_name"),
        ("P1010023.JPG", "file_name"),
        ("Screenshot 2019-01-01 at 10.22.33.png", "file_name"),
        ("black-dog-running-on-the-grass", "file_name"),
        ("9e107d9d372bb6826bd81d3542a419d6", "file_name"),
        ("https://example.com/a_b.html", "url"),
        ("example.co.uk/shop", "url"),
        ("see: http://a.example/b", None),
        ("photo 2 women running", None),
        ("A man reading a .jpg file", None),
    ],
)
def test_gates(caption, reason, lemmatizer):
    assert gate_caption(caption, lemmatizer.lexicon)[1] == reason


@pytest.mark.parametrize(
    "caption",
    [
        "Schwarzer Hund spielt im Garten",
        "Czarny pies biegnie po trawie",
        "黑色的狗在草地上奔跑",
    ],
)
def test_other_languages_are_refused(caption, lemmatizer):
    assert gate_caption(caption, lemmatizer.lexicon) == ("", "not_english")


@pytest.mark.parametrize(
    "caption",
    [
        "red car",
        "Rio de Janeiro carnival dancers",
        "Lamborghini Huracan Spyder",
    ],
)
def test_short_english_captions_pass(caption, lemmatizer):
    assert gate_caption(caption, lemmatizer.lexicon)[1] is None


def test_all_of_an_english_corpus_passes(web_captions, lemmatizer):
    refused = [text for text in web_captions if gate_caption(text, lemmatizer.lexicon)[1]]
    assert not refused


# Cleaning: two ways to write a caption have one graph


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
