"""Archives of packages: whole, cut anywhere, and with names that lead elsewhere."""

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


@pytest.mark.parametrize("suffix", KINDS)
def test_a_truncated_archive_is_an_error_wherever_it_ends(suffix, tmp_path):
    path, content = tmp_path / f"package{suffix}", KINDS[suffix](FILES)
    for size in range(0, len(content) - 1, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"package\{suffix}: damaged or truncated"):
            read_all(path)


@pytest.mark.parametrize("name", ["../b.txt", "a/../../b.txt", "/b.txt", "a\\..\\b.txt"])
@pytest.mark.parametrize("suffix", KINDS)
def test_a_name_that_leads_out_of_the_archive_is_refused(suffix, name, tmp_path):
    path = tmp_path / f"package{suffix}"
    path.write_bytes(KINDS[suffix]({"a/one.txt": b"1", name: b"2"}))
    if suffix == ".deb" and name.startswith("/"):
        name = f"./{name}"
    with pytest.raises(ValueError, match="leads out of the archive's folder"):
        read_all(path)
