"""The files in the archives of packages."""

import pytest

from data_prep.example_data.archives import read_archive
from tests.data_prep.example_data import small_packages as small

FILES = {"a/one.txt": b"1" * 3000, "a/two.txt": bytes(range(256)) * 9, "b/three.txt": b"3"}
KINDS = {".tgz": small.tgz, ".deb": small.deb, ".whl": small.whl}


def read_all(path):
    return dict(read_archive(path, lambda name: True))


@pytest.mark.parametrize("suffix", KINDS)
def test_files_are_read_and_others_left_out(suffix, tmp_path):
    path = tmp_path / f"package{suffix}"
    path.write_bytes(KINDS[suffix](FILES))
    assert read_all(path) == FILES
    assert dict(read_archive(path, "a/two.txt".__eq__)) == {"a/two.txt": FILES["a/two.txt"]}
