"""`config.evaluation.tasks` as sections: the tasks of the texts, and errors that name the key."""

import pytest

from diht_jax.config import default_config, validate_config
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.task_parsing import SOURCE_OPTIONS, parse_config_tasks, parse_tasks

# Option -> (its text, the same as a value of a config), but for class names, which need a file.
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
    # None is a key that is not set.
    assert parse_config_tasks({"mine": {**section, "data_dir": None}}) == parse_config_tasks(
        {"mine": {key: value for key, value in section.items() if key != "data_dir"}}
    )


def test_built_in_tasks_and_folders_need_no_kind(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "test" / "0.tar").touch()
    (tmp_path / "classnames.txt").write_text("dog\ncat\n")
    folder = f"clip_benchmark:{tmp_path}"
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
    # A kind makes it another task than the built-in one.
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
