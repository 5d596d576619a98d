"""The text form of tasks."""

import pytest

from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.suite import TASKS_BY_NAME
from diht_jax.evaluation.task_parsing import check_source, parse_tasks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "cifar10?templates={}",
            Task(
                "cifar10",
                "classification",
                "tfds:cifar10:test",
                class_names=TASKS_BY_NAME["cifar10"].class_names,
                templates=("{}",),
            ),
        ),
        ("retrieval:/d/emoji.twitter.tar", Task("emoji", "retrieval", "/d/emoji.twitter.tar")),
        (
            "retrieval:tfds:coco_captions:val[:10%]?caption_feature=captions/text&data_dir=/t",
            Task(
                "coco_captions_val_10",
                "retrieval",
                "tfds:coco_captions:val[:10%]",
                source_options={"caption_feature": "captions/text", "data_dir": "/t"},
            ),
        ),
        # A "?" of a glob starts no options, and a "=" in a path no name.
        (
            "shape=classification:/d=1/0?-*.tar?label=shape&templates={}",
            Task(
                "shape", "classification", "/d=1/0?-*.tar", templates=("{}",), label_field="shape"
            ),
        ),
    ],
)
def test_text_form(text, expected):
    assert parse_tasks([text]) == [expected]
    assert parse_tasks(text) == [expected]


def test_defaults_reach_the_tasks_they_belong_to():
    tasks = parse_tasks(
        ["cifar10", "retrieval:/a.tar", "retrieval:/b.tar?caption_template=x {caption}"],
        templates=("the {}",),
        caption_template="{caption}",
        class_names=("a", "b"),
    )
    assert tasks[0].templates == ("the {}",)
    assert tasks[0].class_names == ("a", "b")
    assert [task.caption_template for task in tasks[1:]] == ["{caption}", "x {caption}"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cifar01"], "unknown task 'cifar01'; did you mean 'cifar10'"),
        (["retreival:/a.tar"], "did you mean 'retrieval:/a.tar'?"),
        (["mine=clasification:/a.tar"], "did you mean 'classification:/a.tar'?"),
        (["retreival"], "did you mean 'retrieval:SOURCE'?"),
        (["retrieval:/a.tar?caption_templat=x"], "did you mean 'caption_template'"),
        (["retrieval:/a.tar", "retrieval:/b/a.tar"], "two tasks are called 'a'"),
    ],
)
def test_mistakes_are_explained(texts, message):
    with pytest.raises(ValueError) as raised:
        parse_tasks(texts)
    assert message in str(raised.value)


def test_a_task_like_no_other_is_told_the_form_before_the_names():
    with pytest.raises(ValueError) as raised:
        parse_tasks("/data/pairs.tar")
    message = str(raised.value)
    assert message.index("KIND:SOURCE") < message.index("cifar10")


def test_columns_are_named_as_they_are_typed(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("picture,caption\na.png,a cat\n")
    (task,) = parse_tasks(f"mine=retrieval:{table}")
    message = r"task 'mine': .*'picture'.* set \?image_column=, \?caption_column= or \?key_column="
    with pytest.raises(ValueError, match=message):
        check_source(task)
