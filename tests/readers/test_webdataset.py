"""Tars of pairs: every layout, and a counted reason for everything that is not a pair."""

import json
import pathlib
import tarfile

import pytest

from diht_jax.readers.base import SOURCE_REASONS
from diht_jax.readers.registry import open_source
from diht_jax.readers.shard_formats import read_tar
from diht_jax.records.schema import encode_record
from tests.readers.inputs import (
    JPEG,
    ODD_MEMBERS,
    PNG,
    encoded_image,
    read_entries,
    skip_reasons,
    write_tar,
)


def test_tar_as_img2dataset_writes_it(tmp_path):
    first = {"key": "000", "caption": "from json", "url": "http://x", "status": "success"}
    path = write_tar(
        tmp_path / "00000.tar",
        [
            ("000.jpg", JPEG),
            ("000.txt", b"from txt\n"),
            ("000.json", json.dumps(first).encode()),
            ("dir/001.webp", encoded_image("WEBP")),
            ("dir/001.json", b'{"caption": " only json ", "label": 4}'),
            ("dir/002.PNG", PNG),
            ("dir/002.txt", "\ufeffcafé".encode()),
            ("003.jpeg", JPEG),
            ("003.json", b'{"captions": ["a", "b", "a"], "similarity": NaN, "x": 1e999}'),
        ],
    )
    pairs = list(open_source(path))
    assert [(p.key, p.caption) for p in pairs] == [
        ("000", "from txt"),
        ("dir/001", "only json"),
        ("dir/002", "café"),
        ("003", "a"),
    ]
    assert [p.image for p in pairs] == [JPEG, encoded_image("WEBP"), PNG, JPEG]
    assert pairs[0].metadata == {"url": "http://x", "status": "success"}
    assert pairs[1].metadata == {"label": 4}
    assert pairs[3].metadata == {"captions": ["a", "b"], "similarity": None, "x": None}
    for pair in pairs:
        encode_record(pair)  # whatever a reader returns can be written


@pytest.mark.parametrize("with_json", [True, False])
def test_of_a_tar_that_is_cut_off_all_pairs_before_the_cut_come_first(tmp_path, with_json):
    members = []
    for i in range(4):
        members += [(f"k{i}.png", PNG * (3 * i + 1)), (f"k{i}.txt", b"a caption")]
        members += [(f"k{i}.json", b'{"width": 4}')] if with_json else []
    whole = pathlib.Path(write_tar(tmp_path / "whole.tar", members))
    with tarfile.open(whole) as tar:
        ends = {m.name: m.offset_data + m.size for m in tar}
        starts = {m.name: m.offset_data for m in tar}
    last = "json" if with_json else "txt"
    path = tmp_path / "cut.tar"
    marker = -(-ends[f"k3.{last}"] // 512) * 512  # end marker, of which one zero block is enough
    for cut in range(600, marker + 512, 56):
        path.write_bytes(whole.read_bytes()[:cut])
        found = []
        with pytest.raises(ValueError, match="cannot be read to its end"):
            found.extend(read_tar(str(path)))
        expected = [f"k{i}" for i in range(4) if ends[f"k{i}.{last}"] <= cut]
        if expected == ["k0"] and cut < starts["k1.png"]:
            continue  # nothing shows that the first pair is complete
        assert [pair.key for pair in found] == expected, cut


def test_tar_counts_what_is_no_pair(tmp_path):
    path = write_tar(tmp_path / "a.tar", ODD_MEMBERS)
    source = open_source(path)
    assert [pair.key for pair in source] == ["good"]
    assert skip_reasons(read_entries(path)) == {
        "no_caption": "no_caption",
        "empty_caption": "no_caption",
        "no_image": "no_image",
        "two_images": "duplicate",
        "twice": "duplicate",
        "bad_json": "bad_json",
        "deep": "bad_json",
        "mask": "no_image",
        "good": "duplicate",
    }
    assert source.skipped == {"no_caption": 2, "no_image": 2, "duplicate": 3, "bad_json": 2}
    assert set(source.skipped) <= set(SOURCE_REASONS)


def test_a_tar_without_any_picture_says_so(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("README.md", b"no pair")])
    assert list(read_tar(path)) == []
    assert any(path in record.getMessage() for record in caplog.records)


def test_names_that_are_no_utf8(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k\udce9.png", PNG), ("k\udce9.txt", b"text \xe9")])
    folder = tmp_path / "classes" / "cl\udce9"
    folder.mkdir(parents=True)
    (folder / "x\udce9.png").write_bytes(PNG)
    pairs = [*open_source(path), *open_source(str(tmp_path / "classes"))]
    assert [(p.key, p.caption) for p in pairs] == [
        ("k\ufffd", "text \ufffd"),
        ("cl\ufffd/x\ufffd.png", "cl\ufffd"),
    ]
    for pair in pairs:
        encode_record(pair)
