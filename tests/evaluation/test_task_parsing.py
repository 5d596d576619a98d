"""Parsing of tasks from texts and config sections, and the words of their prompts."""

import sys

import pytest

from diht_jax.config import default_config, validate_config
from diht_jax.evaluation.protocols import base
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.task_parsing import (
    SOURCE_OPTIONS,
    open_source,
    parse_config_tasks,
    parse_tasks,
)
from tests import make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
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
        # A "?" of a glob does not start options, and a "=" in a path does not end a name.
        (
            "shape=classification:/d=1/0?-*.tar?label=shape&templates={}",
            Task("shape", "classification", "/d=1/0?-*.tar", templates=("{}",), label="shape"),
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
        (["mine=clasification:/a.tar"], "did you mean 'classification'"),
        (["retreival"], "did you mean 'retrieval'"),
        (["retrieval:/a.tar?caption_templat=x"], "did you mean 'caption_template'"),
        (["retrieval:/a.tar", "retrieval:/b/a.tar"], "two tasks are called 'a'"),
    ],
)
def test_mistakes_are_explained(texts, message):
    with pytest.raises(ValueError) as raised:
        parse_tasks(texts)
    assert message in str(raised.value)


def test_columns_are_named_as_they_are_typed(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("picture,caption\na.png,a cat\n")
    (task,) = parse_tasks(f"mine=retrieval:{table}")
    message = r"task 'mine': .*'picture'.* set \?image_column=, \?caption_column= or \?key_column="
    with pytest.raises(ValueError, match=message):
        open_source(task)


# Option -> (its text, its config value); without class names, which need a file.
_VALUES = {
    "templates": ("a {};the {}, & more;{}", ["a {}", "the {}, & more", "{}"]),
    "label": ("shape", "shape"),
    "caption_template": ("x {caption}", "x {caption}"),
    "equal_captions": ("right", "right"),
    "answer_template": ("{question} {answer}", "{question} {answer}"),
    "interpolation": ("11", "11"),
    "candidates": ("with_images", "with_images"),
    "group": ("0", "0"),
    "f1": ("macro", "macro"),
    "ties": ("right", "right"),
}


def _sections(**sections):
    config = default_config()
    config.evaluation.tasks = sections
    return config.evaluation.tasks


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_every_option_of_every_kind_means_the_same_in_both_forms(kind, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    values = {**_VALUES, "class_names": (f"{tmp_path}/names.txt", ("ant", "bee"))}
    written = {name: values[name] for name in PROTOCOLS[kind].options}
    source_options = {name: f"s_{name}" for name in SOURCE_OPTIONS}
    text = "&".join(
        f"{name}={value}"
        for name, value in [
            *((name, text) for name, (text, _) in written.items()),
            *source_options.items(),
        ]
    )
    (expected,) = parse_tasks(f"mine={kind}:/data/0?.json?{text}")
    for form in (0, 1):
        section = {name: pair[form] for name, pair in written.items()}
        section |= {"kind": kind, "source": "/data/0?.json", **source_options}
        assert parse_config_tasks(_sections(mine=section)) == [expected]
    # None means that the key is not set.
    assert parse_config_tasks({"mine": {**section, "data_dir": None}}) == parse_config_tasks(
        {"mine": {key: value for key, value in section.items() if key != "data_dir"}}
    )


def test_built_in_tasks_and_folders_need_no_kind(tmp_path):
    folder = make.write_benchmark_folder(tmp_path, [], {"classnames.txt": "dog\ncat\n"})
    options = {"templates": "{}"}
    assert parse_config_tasks(
        _sections(
            cifar10=options,
            winoground={"source": "/d/examples.jsonl"},
            own={"source": folder},
            dtd={"source": "/d/dtd", **options},
        )
    ) == parse_tasks(
        [
            "cifar10?templates={}",
            "dtd=/d/dtd?templates={}",
            f"own={folder}",
            "winoground=/d/examples.jsonl",
        ]
    )
    # With a kind, it is a different task than the built-in one.
    (task,) = parse_config_tasks({"cifar10": {"kind": "retrieval", "source": "/d/a.tar"}})
    assert (task.kind, task.class_names) == ("retrieval", None)


_OWN = {"source": "/d"}
_RETRIEVAL = {"kind": "retrieval", **_OWN}
_CLASSIFICATION = {"kind": "classification", **_OWN}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "retrieval"}, "x.source: expected a source"),
        ({**_OWN, "kind": "retreival"}, "x.kind: unknown kind 'retreival'; .* 'retrieval'"),
        ({**_RETRIEVAL, "caption_templat": ""}, "x.caption_templat: .*mean 'caption_template'"),
        ({**_CLASSIFICATION, "templates": "y"}, "x.templates: template 'y': expected '{}' once"),
    ],
)
def test_mistakes_name_the_key(section, message):
    config = default_config()
    config.evaluation.tasks.x = section
    validate_config(config, default_config())
    with pytest.raises(ValueError, match=f"config.evaluation.tasks.{message}"):
        parse_config_tasks(config.evaluation.tasks)


def test_braces_in_captions_stay():
    assert base.fill_caption_template("a photo of {caption}.", "{} {caption}.") == (
        "a photo of {} {caption}.."
    )


def test_templates_of_a_command_line(tmp_path):
    assert base.parse_templates("a {}.; the {} ;") == ("a {}.", "the {}")
    (tmp_path / "t.txt").write_text("one {}\n\ntwo {}\n")
    assert base.parse_templates(f"@{tmp_path}/t.txt") == ("one {}", "two {}")


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("hot dog\n café \n\n", encoding="utf-8")
    assert base.read_class_names(path) == ("hot dog", "café")
    path.write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"names.txt.*line 2 is blank"):
        base.read_class_names(path)
    with pytest.raises(ValueError, match=r"missing.txt: cannot be read"):
        base.read_class_names(tmp_path / "missing.txt")


def test_imagenet_words_come_without_torch(monkeypatch):
    pytest.importorskip("clip_benchmark")
    monkeypatch.setitem(sys.modules, "torch", None)  # makes its import fail
    monkeypatch.delitem(sys.modules, "clip_benchmark")
    names, templates = base.read_class_names("imagenet"), base.parse_templates("imagenet")
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet paper")
    assert (len(templates), templates[0]) == (80, "a bad photo of a {}.")
    assert "clip_benchmark" not in sys.modules


def test_words_that_are_given_need_no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install clip-benchmark.*or give class_names=FILE"):
        parse_tasks(["country211=/data/x"])
    (tmp_path / "names.txt").write_text("Andorra\nAustria\n")
    (task,) = parse_tasks(
        [f"country211=/data/x?class_names={tmp_path}/names.txt&templates=in {{}}"]
    )
    assert (task.class_names, task.templates) == (("Andorra", "Austria"), ("in {}",))
