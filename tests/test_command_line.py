"""Start of commands: memory, logs and errors, URLs as outputs, old spellings of flags, help.

Page faults show whether freed memory is reused; `--config.help` lists every key.
"""

import errno
import importlib
import logging
import os
import platform
import subprocess
import sys

import ml_collections
import pytest
from absl import flags

from diht_jax import command_line, terminal
from diht_jax.command_line import help_text
from diht_jax.config.checks import walk
from diht_jax.evaluate import evaluate_model
from diht_jax.export import export_model
from diht_jax.training.recipe import COMMENT_FILES, default_config
from tests.docs.commands import own_flags, parse_command
from tests.make import REPOSITORY

_PROGRAM = """
import ctypes, resource, sys
from diht_jax.command_line import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(1 << 28)
    ctypes.memset(block, 1, 1 << 28)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_freed_block_is_used_again():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", _PROGRAM, mode], text=True))
        for mode in ("keep", "plain")
    }
    # 2^28 bytes are 2^16 pages, or 2^7 huge pages.
    assert faults["plain"] >= 100 and faults["keep"] < faults["plain"] / 10, faults


def test_keys_and_captions_in_logs_and_errors_are_escaped(capsys):
    key = "a.png\x1b[2J\n12:00:00 all is well \u202e"
    handler = terminal.LogHandler()
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "bad record '%s'", (key,), None)
    handler.emit(record)
    with pytest.raises(SystemExit):
        command_line._fail(f"{key} cannot be read", 1)
    expected = "a.png\\x1b[2J\n{}12:00:00 all is well \\u202e"
    assert capsys.readouterr().err == (
        f"bad record '{expected.format('  ')}'\nerror: {expected.format('')} cannot be read\n"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ELOOP])
def test_an_error_of_a_disk_is_one_line(monkeypatch, capsys, number):
    monkeypatch.setattr(command_line, "_log_beside_progress_bars", lambda verbose: None)

    def main() -> None:
        raise OSError(number, os.strerror(number), "/data/a")

    with pytest.raises(SystemExit) as caught:
        command_line._call(main)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "/data/a" in error and error.count("\n") == 1


@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://bucket/a/b.json", "memory://x"])
def test_no_command_writes_to_a_url_as_if_it_were_a_folder(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    flags.DEFINE_string("output", url, "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(command_line, "_log_beside_progress_bars", lambda verbose: None)
    with pytest.raises(SystemExit) as caught:
        command_line._call(lambda: pytest.fail("the command began"))
    assert caught.value.code == 1
    assert f"error: --output={url}: this is written to local" in capsys.readouterr().err
    for write in (
        lambda: export_model("no model", "clip", url),
        lambda: evaluate_model("no model", [], url),
    ):
        with pytest.raises(ValueError, match=f"output={url}: "):
            write()
    assert not list(tmp_path.iterdir())


OLD_SPELLINGS = [
    ("diht_jax.compile", "global_batch", "batch_size", "64"),
    ("diht_jax.evaluate", "bootstrap", "num_resamples", "0"),
    ("diht_jax.fewshot", "draws", "num_draws", "3"),
    ("diht_jax.fewshot", "fit_steps", "num_steps", "7"),
    ("diht_jax.search", "images", "input", "photos"),
    ("diht_jax.search", "count", "num_matches", "2"),
    ("diht_jax.search", "template", "caption_template", "a {caption}"),
    ("data_prep.reports.__main__", "inputs", "input", "a,b"),
    ("data_prep.synthetic.__main__", "workers", "num_workers", "2"),
    ("data_prep.synthetic.teacher", "images", "input", "a.tar"),
    ("data_prep.synthetic.teacher", "epochs", "num_epochs", "2"),
]


@pytest.fixture
def no_flags():
    """Hides the flags of other tests during the test, and removes the flags that it defines."""
    with own_flags():
        yield


@pytest.mark.parametrize(("command", "old", "new", "text"), OLD_SPELLINGS)
def test_old_spellings_still_work(command, old, new, text, no_flags):
    importlib.import_module(command).define_flags()
    flags.FLAGS[old].parse(text)
    parsed = flags.FLAGS[new].parser.parse(text)
    assert flags.FLAGS[new].value == flags.FLAGS[old].value == parsed


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("diht_jax.train", [f"--config={REPOSITORY}/configs/emoji.py", "--workdir="], "workdir"),
        ("data_prep.reports.__main__", ["--input="], "input"),
        ("data_prep.synthetic.__main__", ["--output="], "output"),
    ],
)
def test_an_empty_flag_is_one_that_is_missing(command, arguments, name, no_flags, monkeypatch):
    module, argv = importlib.import_module(command), ["command", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    module.define_flags()
    flags.FLAGS(argv)
    with pytest.raises(ValueError, match=f"^--{name} is required$"):
        module.main()


def listed_keys(text):
    names = (line.split("=")[0].strip() for line in text.splitlines() if "=" in line)
    return [name for name in names if name in walk(default_config())]


def test_the_sections_have_every_key_once():
    config, found = default_config(), []
    known = walk(config)
    sections = [
        name
        for name, (value, _) in known.items()
        if isinstance(value, ml_collections.ConfigDict) and len(value)
    ]
    for section in ["", *sections]:
        found += listed_keys(help_text.describe_keys(config, section, {}))
    assert sorted(found) == sorted(set(known) - set(sections))


def answer(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        command_line.parse_flags(
            ["train", *arguments], config_defaults=default_config, comment_files=COMMENT_FILES
        )
    captured = capsys.readouterr()
    return caught.value.code, captured.out + captured.err


def test_keys_have_the_values_of_the_recipe(capsys):
    status, text = answer(capsys, "--config=emoji", "--config.help", "optimizer")
    assert status == 0
    assert "optimizer.weight_decay=0.2" in text  # set by the recipe; the default is 0.1
    assert help_text.read_comments(COMMENT_FILES)["optimizer.weight_decay"] in text


@pytest.mark.parametrize(
    ("command", "recipe", "key", "default"),
    [
        ("data_prep.filter", "prep/cat", "examples_per_shard", 10_000),
        ("data_prep.label", "prep/concepts", "teacher.swag.architecture", "vit_h_14"),
    ],
)
def test_keys_with_a_default_that_may_be_unset(command, recipe, key, default):
    found = []

    def check(options):
        for config in (options["config_defaults"](), flags.FLAGS.config):
            found.append(walk(config)[key][0])

    parse_command(command, [f"--config={recipe}", f"--config.{key}=None"], check)
    assert found == [default, None]  # `--config.help` shows the default


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.help=optimiser"], "did you mean 'optimizer'?"),
        (["--config=diht_vitb16:topology=rtx4090:1", "--config.help"], "rtx4090:1"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, named):
    status, text = answer(capsys, *arguments)
    assert status == 2 and named in text and len(text.splitlines()) == 1


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch, no_flags):
    monkeypatch.setenv("HOME", "/home/\\1")  # would be a group reference in `re.sub`
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for name in ("output", "input", "text"):
        flags.DEFINE_string(name, None, "")
    given = ["command", "--output=~/kept", "--input=~", "--text=~people"]
    command_line.parse_flags(given)
    assert flags.FLAGS.output == "/home/\\1/kept" and flags.FLAGS.input == "/home/\\1"
    assert flags.FLAGS.text == "~people"


def test_help_after_a_double_dash_is_an_argument(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert answer(capsys, "--help")[0] == 0
    assert answer(capsys, "--", "--help")[0] == 2
