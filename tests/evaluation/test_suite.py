"""The 29 zero-shot numbers of DiHT by name."""

import pytest

from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.suite import NO_SOURCE, SUITE
from diht_jax.evaluation.task_parsing import parse_tasks

_KINDS_OF_CLASSIFICATION = ("classification", "multilabel", "binary")


def test_seventeen_ten_and_two():
    def numbers(*kinds):
        return sum(entry.numbers for entry in SUITE.values() if entry.kind in kinds)

    assert numbers(*_KINDS_OF_CLASSIFICATION) == 17
    assert numbers("retrieval", "winoground") == 10
    assert numbers("entailment", "vqa") == 2
    assert numbers(*PROTOCOLS) == 29


def test_every_task_with_a_source_can_be_named():
    pytest.importorskip("clip_benchmark")
    for name, entry in SUITE.items():
        if entry.source != NO_SOURCE:
            (task,) = parse_tasks([name])
            assert (task.name, task.kind, task.source) == (name, entry.kind, entry.source)
    assert len(parse_tasks("dtd")[0].templates) == 8
    assert len(parse_tasks("country211=/data/x")[0].class_names) == 211


def test_options_of_a_task_by_name(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"testlist0{number}.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    source = f"ucf101=list:{tmp_path}/testlist{{:02}}.txt"
    assert parse_tasks([source])[0].source_options == {"splits": "1,2,3"}
    assert parse_tasks([f"{source}?splits=1"])[0].source_options == {"splits": "1"}
    # As a comma-separated flag cuts it apart.
    (first, second) = parse_tasks([f"{source}?splits=1", "3", "voc2007=voc:/data"])
    assert first.source_options == {"splits": "1,3"}
    assert second.options == {"interpolation": "11"} and len(second.class_names) == 20
    (second,) = parse_tasks("voc2007=voc:/data?interpolation=all")
    assert second.options == {"interpolation": "all"}
    with pytest.raises(ValueError, match="splits=0: expected numbers, such as 1 or 1,2,3"):
        parse_tasks([f"{source}?splits=0"])
