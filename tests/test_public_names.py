"""The names that other people's code relies on, at the paths and with the arguments they know."""

import inspect

import numpy as np

import diht_jax
from diht_jax.data.tfrecord import TFRecordSource, TFRecordWriter


def _parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_models():
    assert _parameters(diht_jax.load_model)[0] == "name_or_path"
    model = diht_jax.LoadedModel
    assert _parameters(model.encode_image)[:2] == ["self", "images"]
    assert _parameters(model.encode_text)[:2] == ["self", "texts"]
    assert _parameters(model.tokenize)[:2] == ["self", "texts"]
    assert _parameters(model.preprocess)[1:] and isinstance(model.logit_scale, property)
    assert diht_jax.load_model("clipart_tiny").config.model.overrides.image_size == 64


def test_losses():
    from diht_jax.losses import concept_loss, contrastive_loss

    signature = inspect.signature(contrastive_loss).parameters
    assert list(signature)[:3] == ["image_emb", "text_emb", "logit_scale"]
    keywords = {"alpha": 1.0, "beta": 0.0, "axis_name": None}
    assert {name: signature[name].default for name in keywords} == keywords
    assert [
        name for name in keywords if signature[name].kind is not inspect.Parameter.KEYWORD_ONLY
    ] == []
    assert signature["impl"].kind is inspect.Parameter.KEYWORD_ONLY
    assert _parameters(concept_loss) == ["logits", "ids", "probs"]


def test_tokenizer():
    from diht_jax.data.tokenizer import tokenize

    assert inspect.signature(tokenize).parameters["context_length"].default == 77
    tokens = tokenize(["a dog"])
    assert (tokens.shape, tokens.dtype) == ((1, 77), np.int32)
    assert tokens[0, :5].tolist() == [49406, 320, 1929, 49407, 0]  # of OpenAI's CLIP


def test_records_at_the_old_and_at_the_new_path(tmp_path):
    from diht_jax.records import formats

    assert (formats.TFRecordWriter, formats.TFRecordSource) == (TFRecordWriter, TFRecordSource)
    with TFRecordWriter(tmp_path / "a.tfrecord") as writer:
        writer.write(b"one")
        writer.write(b"two")
    assert list(TFRecordSource([tmp_path / "a.tfrecord"])) == [b"one", b"two"]


def test_records_of_pairs(tmp_path):
    from diht_jax.data import records

    pair = records.Pair("k", b"picture", "a dog", {"label": 3})
    with records.open_writer(tmp_path / "a.tfrecord") as writer:
        writer.write(records.encode_record(pair))
    source = records.open_source(records.find_shards(tmp_path))
    found = records.decode_record(source[0])
    assert (found.key, found.image, found.caption) == ("k", b"picture", "a dog")
    assert dict(found.metadata) == {"label": 3}


def test_captions():
    from data_prep.captions import CaptionGraph, Edge, parse_captions

    (graph,) = parse_captions(["a black dog chases a cat"])
    assert isinstance(graph, CaptionGraph)
    assert set(graph.objects) == {"dog", "cat"}
    assert list(graph.objects["dog"].attributes) == ["black"]
    assert graph.objects["dog"].complexity == graph.complexity
    assert (graph.actions, graph.relations) == ([Edge("dog", "chase", "cat")], [])
    assert graph.has_action and graph.drop_reason is None


def test_text_spotting():
    from data_prep.text_spotting import caption_matches

    assert inspect.signature(caption_matches).parameters["min_chars"].default == 5
    assert caption_matches(["FRESH BREAD"], "fresh bread every day")
    assert not caption_matches(["OPEN"], "a shop in the old town")
