"""The command that makes the examples: what it lists, fetches and says."""

import pytest

from data_prep.example_data.registry import EXAMPLES
from tests.data_prep.example_data import small_packages as small
from tests.docs.commands import run_commands
from tests.serving import FileServer

COMMAND = "data_prep.examples"


def make(*arguments):
    run_commands([(COMMAND, [str(text) for text in arguments])])


def test_several_examples_come_from_a_mirror_with_their_licences(tmp_path, monkeypatch, capsys):
    files = small.replace_packages(monkeypatch, small.small_packages())
    names = ["emoji", "pictures", "photos", "cifar10"]
    flags = ["--output", tmp_path / "data", "--packages", tmp_path / "packages"]
    with FileServer(files) as server:
        make(*names, *flags, f"--mirror={server.url}/all/")
    printed = capsys.readouterr().out
    for name in names:
        assert EXAMPLES[name].licence in printed
        wanted = EXAMPLES[name].files
        assert [file for file in wanted if not (tmp_path / "data" / file).is_file()] == []
    made = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    make(*names, *flags, "--mirror=http://127.0.0.1:9")  # again, without a network
    assert made == {path: path.read_bytes() for path in made}


def test_an_unknown_name_makes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make("emoji", "cifar", "--output", tmp_path / "data", "--packages", tmp_path)
    assert "'cifar': did you mean 'cifar10'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
