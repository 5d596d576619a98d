"""Public API: the names that users rely on, with their paths and arguments."""

import inspect
import pydoc

import pytest

import diht_jax
from diht_jax.data import records
from diht_jax.records import formats

# Arguments that may be passed by position.
ARGUMENTS = {
    "diht_jax.load_model": ["name_or_path"],
    "diht_jax.LoadedModel.encode_image": ["self", "images"],
    "diht_jax.LoadedModel.encode_text": ["self", "texts"],
    "diht_jax.LoadedModel.tokenize": ["self", "texts"],
    "diht_jax.losses.contrastive_loss": ["image_emb", "text_emb", "logit_scale"],
    "diht_jax.losses.concept_loss": ["logits", "ids", "probs"],
    "diht_jax.data.tokenizer.tokenize": ["texts", "context_length"],
    "diht_jax.data.tfrecord.TFRecordWriter": ["path"],
    "diht_jax.data.tfrecord.TFRecordSource": ["paths"],
    "data_prep.captions.parse_captions": ["captions"],
    "data_prep.text_spotting.caption_matches": ["spotted_texts", "caption", "min_chars"],
}
DEFAULTS = {
    "diht_jax.losses.contrastive_loss": {
        "alpha": 1.0,
        "beta": 0.0,
        "axis_name": None,
        "impl": "streaming",
    },
    "diht_jax.data.tokenizer.tokenize": {"context_length": 77},
    "data_prep.text_spotting.caption_matches": {"min_chars": 5},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_and_their_defaults(name):
    signature = inspect.signature(pydoc.locate(name)).parameters
    assert list(signature)[: len(ARGUMENTS[name])] == ARGUMENTS[name]
    for argument, default in DEFAULTS.get(name, {}).items():
        assert signature[argument].default == default
        assert (signature[argument].kind is inspect.Parameter.KEYWORD_ONLY) == (
            argument not in ARGUMENTS[name]
        )


def test_other_names_of_a_model():
    assert isinstance(diht_jax.LoadedModel.logit_scale, property)
    assert diht_jax.LoadedModel.preprocess


def test_records_at_the_old_and_at_the_new_path(tmp_path):
    from diht_jax.data.tfrecord import TFRecordSource, TFRecordWriter

    assert (formats.TFRecordWriter, formats.TFRecordSource) == (TFRecordWriter, TFRecordSource)
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
