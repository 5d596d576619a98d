"""The work directory: one run at a time, and what is said where nothing can be written."""

import signal
import subprocess
import sys

import pytest
from etils import epath

from diht_jax.storage.workdir_lock import lock_directory
from diht_jax.training.loop import train

HOLD = """
import sys, time
from etils import epath
from diht_jax.storage.workdir_lock import lock_directory
with lock_directory(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_leaves_nothing_behind(tmp_path):
    run = epath.Path(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=f"another run works in {run}: process {process.pid} on "),
        lock_directory(run),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock_directory(run):
        pass
    with lock_directory(run):  # and so does one that ends
        pass


def test_a_file_in_the_way_is_reported(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: .*Not a directory"):
        train(config, tmp_path / "file" / "run")


def test_a_read_only_file_system_is_reported(config, mount_tmpfs):
    folder = mount_tmpfs("ro,size=1m")
    for workdir in (folder, folder / "run"):
        with pytest.raises(ValueError, match="cannot be written: .*Read-only file system"):
            train(config, workdir)
