"""Text search over real images."""

import sys

import numpy as np
import pytest
from PIL import Image

from diht_jax import search
from diht_jax.evaluation.embedding.inputs import list_inputs
from diht_jax.evaluation.embedding.search import (
    draw_matches,
    format_matches,
    load_pictures,
    search_pictures,
)
from tests import make
from tests.docs.commands import parse_command
from tests.readers.inputs import write_tar


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of six images, one of them damaged."""
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(6):
        (path / f"{i}.png").write_bytes(make.png(i, (30, 20 + i)))
    (path / "2.png").write_bytes((path / "2.png").read_bytes()[:50])
    return path


def test_matches_are_the_closest_pictures(tiny_model, folder):
    shards = list_inputs(str(folder))
    queries = ["a dog", "red car", "a dog"]
    found, encoded = search_pictures(tiny_model, shards, queries, count=3, template="see {caption}")
    names = [f"{i}.png" for i in (0, 1, 3, 4, 5)]
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    cosines = tiny_model.encode_text(["see a dog", "see red car"]) @ (
        tiny_model.encode_image(pictures).T
    )
    assert list(found) == ["a dog", "red car"]
    for matches, row in zip(found.values(), cosines, strict=True):
        assert [match.key for match in matches] == [names[i] for i in np.argsort(-row)[:3]]
        assert [match.similarity for match in matches] == pytest.approx(-np.sort(-row)[:3])
    assert encoded.dropped == {"image_unreadable": 1}
    first = found["a dog"][0]
    loaded = load_pictures(shards, [first])
    expected = np.asarray(Image.open(folder / first.key))
    np.testing.assert_array_equal(np.asarray(loaded[first.place]), expected)


@pytest.mark.parametrize("left", [6, 1, 0])
def test_no_other_picture_is_shown_for_a_match(left, folder):
    shards = list_inputs(str(folder))
    found = search_pictures(make.HashedModel(), shards, ["a dog"], count=5)[0]["a dog"]
    for path in sorted(folder.glob("*.png"))[left:]:
        path.unlink()
    (folder / "!.png").write_bytes(make.png(7))  # sorts first
    with pytest.raises(ValueError, match="source has changed"):
        load_pictures(shards, found[-1:])


def test_pictures_without_a_caption_are_searched_with_those_that_have_one(folder):
    (folder / "4.txt").write_text("a red car")
    shards = list_inputs(str(folder), needs_caption=False)
    found, encoded = search_pictures(make.HashedModel(), shards, ["a dog"], count=9)
    assert {match.key for match in found["a dog"]} == {"0", "1", "3", "4", "5"}
    assert encoded.dropped == {"image_unreadable": 1}


def test_a_hostile_tar_is_searched_printed_and_drawn(folder, tmp_path):
    image = (folder / "0.png").read_bytes()
    texts = [
        "\x1b[2J\x1b]0;owned\x07",
        "gpj.\u202egnp",
        "two\nlines\x00",
        "x" * 2 * 10**6,
        "\u2028",
    ]
    members = []
    for number, text in enumerate(texts):
        key = f"{number}{text.replace(chr(0), '').replace('.', '')[:80]}"
        members += [(f"{key}.png", image), (f"{key}.txt", text.encode())]
    shards = list_inputs(write_tar(tmp_path / "hostile.tar", members))
    queries = ["a \x1b[31mdog", "y" * 10**6]
    found, _ = search_pictures(make.HashedModel(), shards, queries)
    assert sum(map(len, found.values())) == 2 * (len(texts) - 1)  # one has no caption
    printed = format_matches(found)
    assert len(printed.splitlines()) == 2 * len(texts)
    assert [line for line in printed.splitlines() if not line.isprintable()] == []
    assert r"\x1b[2J" in printed and r"gpj.\u202egnp" in printed
    assert [line for line in printed.splitlines() if "yyy" not in line and len(line) >= 1100] == []
    pictures = load_pictures(shards, found[queries[0]])
    page = tmp_path / "new" / "page.html"
    draw_matches(found, pictures, page, title="\x1b[0m", note="<script>")
    text = page.read_text()
    assert text.count('src="data:image') == 2 * (len(texts) - 1) and "<script" not in text


def test_a_page_is_written_on_request_only(workdir, folder, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = [f"--model={workdir}", f"--input={folder}"]
    parse_command("diht_jax.search", arguments, lambda _: search.main(["a dog"]))
    assert capsys.readouterr().out.startswith("a dog\n")
    assert not list(here.iterdir())


def test_a_missing_usearch_is_found_before_anything_is_embedded(folder, tmp_path, monkeypatch):
    for name in ("usearch", "usearch.index"):
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    arguments = ["--model=/none", f"--input={folder}", f"--index={tmp_path}/index"]
    with pytest.raises(ValueError, match="pip install usearch"):
        parse_command("diht_jax.search", arguments, lambda _: search.main(["a dog"]))
    assert not (tmp_path / "index").exists()
