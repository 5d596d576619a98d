"""A work directory that cannot be written."""

import pytest

from diht_jax.training.loop import train


def test_a_file_in_the_way_is_reported(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: .*Not a directory"):
        train(config, tmp_path / "file" / "run")


def test_a_read_only_file_system_is_reported(config, mount_tmpfs):
    folder = mount_tmpfs("ro,size=1m")
    for workdir in (folder, folder / "run"):
        with pytest.raises(ValueError, match="cannot be written: .*Read-only file system"):
            train(config, workdir)
