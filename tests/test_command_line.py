"""Freed memory that is kept (counted in page faults), escaped names, URLs as outputs."""

import errno
import logging
import os
import platform
import subprocess
import sys

import pytest
from absl import flags

from diht_jax import command_line
from diht_jax.evaluate import evaluate_model
from diht_jax.export import export_model
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
    # 2^28 bytes are 2^16 pages, or 2^7 where the kernel takes large ones.
    assert faults["plain"] >= 100 and faults["keep"] < faults["plain"] / 10, faults


def test_keys_and_captions_in_logs_and_errors_are_escaped(capsys):
    key = "a.png\x1b[2J\n12:00:00 all is well \u202e"
    handler = command_line._TqdmHandler()
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


def test_an_argument_that_a_recipe_refuses_is_one_line():
    config = f"--config={REPOSITORY}/configs/diht_vitb16.py:topology=rtx4090:1"
    command = [sys.executable, "-m", "diht_jax.train", config, "--workdir=unused"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "rtx4090:1" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
