"""Prompts: templates, files of class names, and ImageNet's words without torch."""

import importlib.util
import json
import subprocess
import sys

import pytest

from diht_jax.evaluation.protocols import base
from diht_jax.evaluation.task_parsing import parse_tasks


def test_braces_in_names_and_captions_stay():
    assert base.fill_template("a photo of a {}.", "{0} {} {x}") == "a photo of a {0} {} {x}."
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


def test_imagenet_words_come_without_torch():
    if importlib.util.find_spec("clip_benchmark") is None:
        pytest.skip("clip_benchmark, which has the words, is absent")
    program = (
        "import json, sys\n"
        "from diht_jax.evaluation.protocols.base import parse_templates, read_class_names\n"
        "names, templates = read_class_names('imagenet'), parse_templates('imagenet')\n"
        "print(json.dumps([len(names), len(templates), names[0], names[999], templates[0],"
        " 'torch' in sys.modules or 'clip_benchmark' in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(output) == [1000, 80, "tench", "toilet paper", "a bad photo of a {}.", False]


def test_words_that_are_given_need_no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install clip-benchmark.*or give class_names=FILE"):
        parse_tasks(["country211=/data/x"])
    (tmp_path / "names.txt").write_text("Andorra\nAustria\n")
    (task,) = parse_tasks(
        [f"country211=/data/x?class_names={tmp_path}/names.txt&templates=in {{}}"]
    )
    assert (task.class_names, task.templates) == (("Andorra", "Austria"), ("in {}",))
