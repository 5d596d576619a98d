"""What the card of a distilled model states of its data and concepts."""

import json

import pytest

from diht_jax.models.zoo import get_architecture
from diht_jax.records.labels.concepts import NO_CONCEPTS
from diht_jax.records.vocabulary import ConceptList, Vocabulary
from diht_jax.weights.model_card import Origin, model_card, read_concepts, read_data_facts
from tests.make import write_records
from tests.records.labels import write_labels

VOCABULARY = Vocabulary(
    ConceptList("objects", ("cat", "dog", "car"), (5, 70, 20)),
    ConceptList("attributes", tuple(f"a{n}" for n in range(60)), tuple(range(60))),
)
FILTERED = {"counts": {"read": 100, "kept": 60, "dropped": {"caption": {"no_action": 40}}}}
LABELLED = {"teacher": {"kind": "swag"}, "labelled": 59, "config": {"input": "elsewhere"}}


@pytest.fixture
def folders(tmp_path):
    """Filtered records, and a folder with their labels alone."""
    for name, stats in (("filtered", FILTERED), ("labelled", LABELLED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stats.json").write_text(json.dumps(stats))
    write_records(tmp_path / "filtered", 2)
    nothing = [[NO_CONCEPTS, NO_CONCEPTS]] * 2
    write_labels(tmp_path / "labelled", tmp_path / "filtered", nothing, VOCABULARY)
    return tmp_path


def card(train, labels=None, **sections):
    model = {"dtype": "float32", "param_dtype": "float32"}
    config = {"data": {"train": train, "labels": labels}, "model": model, "seed": 0, **sections}
    return model_card(
        "huggingface",
        arch=get_architecture("tiny_32px"),
        params={},
        origin=Origin("run", 7, False, None),
        config=config,
        data=read_data_facts(train, labels),
        concepts=read_concepts(train, labels),
        results=[],
    )


@pytest.mark.parametrize("given", [("labelled",), ("filtered", "labelled")])
def test_labels_lead_to_the_statistics_of_what_was_labelled(folders, given):
    text = card(*(str(folders / name) for name in given))
    for line in (
        "| pairs kept | 60 |",
        "| dropped, caption: no_action | 40 |",
        "Teacher of the labels: swag; labelled 59.",
        "objects (3): dog, car, cat; attributes (60): a59, a58, ",
    ):
        assert line in text, text
    assert "a20 ..." in text and "a19" not in text
    assert "ftfy" in text and "Compose transparent pictures on white" in text
