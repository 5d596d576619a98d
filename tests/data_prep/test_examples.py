"""The example data: their pictures, captions and order, and what a missing network says."""

import io
import json
import os
import pathlib
import tarfile

import pytest

from data_prep import examples
from tests import make

TABLE = [
    {
        "name": "CLOCK FACE ONE OCLOCK",
        "image": "1f550.png",
        "category": "Travel & Places",
        "subcategory": "time",
    },
    {
        "name": "MEN HOLDING HANDS",
        "image": "1f46c.png",
        "category": "People & Body",
        "subcategory": "family",
        "skin_variations": {
            "1F3FF-1F3FB": {"image": "1f46c-1f3ff-1f3fb.png"},
            "1F3FC": {"image": "1f46c-1f3fc.png"},
        },
    },
    {
        "name": "NOT DRAWN BY HER",
        "image": "1f000.png",
        "category": "Objects",
        "subcategory": "other",
    },
]
CAPTIONS = {
    "1f550": "clock face one o'clock",
    "1f46c": "men holding hands",
    "1f46c-1f3ff-1f3fb": "men holding hands with dark and light skin tone",
    "1f46c-1f3fc": "men holding hands with medium-light skin tone",
}


def write_package(path, artist, pictures):
    files = {"emoji.json": json.dumps(TABLE).encode()}
    files |= {f"img/{artist}/64/{name}.png": data for name, data in pictures.items()}
    files[f"img/{artist}/sheets/64.png"] = b"all of them"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_artists_have_equal_names_captions_and_order(tmp_path):
    read = {}
    for artist, color in (("ann", "red"), ("ben", "blue")):
        picture = make.encoded(make.plain(color))
        write_package(tmp_path / artist, artist, dict.fromkeys(CAPTIONS, picture))
        assert examples.write_emoji_tar(tmp_path / artist, artist, tmp_path / f"{artist}.tar") == 4
        read[artist] = read_tar(tmp_path / f"{artist}.tar")
        assert {read[artist][f"{name}.png"] for name in CAPTIONS} == {picture}
    assert list(read["ann"]) == list(read["ben"])
    texts = {name: data.decode() for name, data in read["ann"].items() if name.endswith(".txt")}
    assert texts == {f"{name}.txt": caption for name, caption in CAPTIONS.items()}
    assert json.loads(read["ben"]["1f46c-1f3fc.json"]) == {
        "key": "1f46c-1f3fc",
        "caption": "men holding hands with medium-light skin tone",
        "category": "People & Body",
        "subcategory": "family",
        "source": "ben",
    }


@pytest.mark.parametrize("artist", examples.EMOJI)
def test_the_downloaded_packages_give_the_test_data(artist, shared_data, tmp_path):
    cache = os.environ.get(examples.CACHE_VARIABLE) or "~/.cache/diht_jax"
    name = examples.EMOJI[artist].url.rpartition("/")[2]
    package = pathlib.Path(cache).expanduser() / name
    if not package.exists():
        pytest.skip(f"{package} has not been downloaded")
    examples.write_emoji_tar(package, artist, tmp_path / "made.tar")
    expected = shared_data / f"emoji_{artist}.tar"
    assert (tmp_path / "made.tar").read_bytes() == expected.read_bytes()


def test_without_a_network_the_package_and_its_folder_are_named(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/emoji-datasource-ann-1.tgz"
    monkeypatch.setattr(examples, "EMOJI", {"ann": examples.Package(url, "0" * 64, "none")})
    with pytest.raises(ValueError, match=rf"{url}.*{tmp_path / 'packages'} \(--packages\)"):
        examples.make_emoji(tmp_path / "packages", tmp_path)
    assert not (tmp_path / "emoji_ann.tar").exists()
