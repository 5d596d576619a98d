"""The flag --task of the command: class names and prompts for the sources of the splits."""

import pytest

from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.fewshot import task_text


def parsed(task, source="train.tar", **defaults):
    (made,) = parse_tasks([task_text(task, source)], **defaults)
    return made


@pytest.mark.parametrize("task", ["pat=classification", "classification", None])
def test_options_of_the_task_and_of_the_source(task, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    made = parsed(f"{task or 'classification'}?class_names={names}", "a?.tar?label=shape")
    assert made.kind == "classification" and made.source == "a?.tar"
    assert made.class_names == ("cat", "dog") and made.label_field == "shape"
    assert made.name == ("pat" if task == "pat=classification" else "a")
    plain = parsed(task)
    assert (plain.kind, plain.source, plain.class_names) == ("classification", "train.tar", None)


def test_a_built_in_task_lends_its_words(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    made = parsed("cifar10")
    assert made.source == "train.tar" and made.class_names[0] == "airplane"
    assert parsed(f"cifar10?class_names={names}").class_names == tuple("abcdefghij")
    # What stands at the source counts.
    assert parsed("cifar10?label=a", "train.tar?label=b").label_field == "b"
