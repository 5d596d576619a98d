"""The 29 zero-shot numbers of DiHT by name."""

import re

import pytest

from diht_jax.evaluation import prompts
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


_WITHOUT_SOURCE = [name for name, entry in SUITE.items() if entry.source == NO_SOURCE]


@pytest.mark.parametrize("name", _WITHOUT_SOURCE)
def test_what_the_message_asks_for_can_be_given(name, tmp_path, monkeypatch):
    pytest.importorskip("clip_benchmark")
    with pytest.raises(ValueError) as raised:
        parse_tasks([name])
    message = str(raised.value)
    assert f"'{name}' has no source of its own" in message
    assert SUITE[name].split in message
    # The message ends with what to type and, behind a comma, what lies there.
    typed = re.search(f"Give that as '({name}=[^,]+)", message)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answer_list.json").write_text('["yes", "no"]')
    (tmp_path / "DIR" / "test").mkdir(parents=True)
    (tmp_path / "DIR" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "DIR" / "test" / "0.tar").touch()
    (tmp_path / "DIR" / "dataset_type.txt").write_text("multilabel")
    (tmp_path / "DIR" / "classnames.txt").write_text("dog\ncat\n")
    (tmp_path / "DIR" / "class-descriptions-boxable.csv").write_text("/m/011k07,Tortoise\n")
    (tmp_path / "objectnet-1.0" / "mappings").mkdir(parents=True)
    for mapping in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k"):
        path = tmp_path / "objectnet-1.0" / "mappings" / f"{mapping}.json"
        path.write_text('{"Chair": "Chair"}')
    for name_of_list in ("test_images.txt", *(f"testlist{n:02}.txt" for n in (1, 2, 3))):
        (tmp_path / "DIR" / name_of_list).write_text("YoYo/v_YoYo_g01_c01.avi\n")
    (task,) = parse_tasks([typed])
    assert (task.name, task.kind) == (name, SUITE[name].kind)


def test_names_and_prompts_of_ucf101_are_clips():
    assert len(set(prompts.UCF101_CLASSES)) == 101 and len(set(prompts.UCF101_TEMPLATES)) == 48
    assert prompts.UCF101_TEMPLATES[-1] == "a demonstration of the person practicing {}."


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
    with pytest.raises(ValueError, match="interpolation=10: expected 11 or all"):
        parse_tasks("voc2007=voc:/data?interpolation=10")
    with pytest.raises(ValueError, match="splits=0: expected numbers, such as 1 or 1,2,3"):
        parse_tasks([f"{source}?splits=0"])
    with pytest.raises(ValueError, match="2 splits in one list; expected a field for the number"):
        parse_tasks([f"ucf101=list:{tmp_path}/testlist01.txt?splits=1", "2"])
