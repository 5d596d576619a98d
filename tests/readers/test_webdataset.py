"""Tars of pairs: every layout, and a counted reason for whatever is no pair."""

import gzip
import io
import json
import os
import pathlib
import tarfile

import pytest

from diht_jax.readers.base import SOURCE_REASONS
from diht_jax.readers.registry import open_source
from diht_jax.readers.webdataset import read_tar
from diht_jax.records.schema import Pair, encode_record
from tests.readers.inputs import JPEG, PNG, encoded_image, read_entries, skip_reasons, write_tar


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
        encode_record(pair)  # whatever a reader gives can be written


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
    marker = -(-ends[f"k3.{last}"] // 512) * 512  # of whose zeros one block is enough
    for cut in range(600, marker + 512, 56):
        path.write_bytes(whole.read_bytes()[:cut])
        found = []
        with pytest.raises(ValueError, match="cannot be read to its end"):
            found.extend(read_tar(str(path)))
        expected = [f"k{i}" for i in range(4) if ends[f"k{i}.{last}"] <= cut]
        if expected == ["k0"] and cut < starts["k1.png"]:
            continue  # nothing shows that the first one is whole
        assert [pair.key for pair in found] == expected, cut


def test_tar_counts_what_is_no_pair(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", PNG),
            ("good.txt", b"ok"),
            ("no_caption.png", PNG),
            ("empty_caption.png", PNG),
            ("empty_caption.txt", b" \n"),
            ("no_image.txt", b"text"),
            ("two_images.png", PNG),
            ("two_images.jpg", JPEG),
            ("two_images.txt", b"text"),
            ("twice.png", PNG),
            ("twice.txt", b"one"),
            ("twice.txt", b"two"),
            ("bad_json.png", PNG),
            ("bad_json.txt", b"text"),
            ("bad_json.json", b"{"),
            ("deep.png", PNG),
            ("deep.json", b"[" * 100_000),
            ("mask.seg.png", PNG),
            ("mask.txt", b"the image has another kind of name"),
            ("good.png", PNG),
            ("good.txt", b"the key again"),
            ("readme", b"no extension"),
            (".hidden.png", PNG),
            ("other.mp4", b"not ours"),
        ],
    )
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


def test_tar_never_writes_to_disk(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = write_tar(
        inside / "a.tar",
        [
            ("../escape.png", PNG),
            ("../escape.txt", b"up"),
            (f"{tmp_path}/absolute.png", PNG),
            (f"{tmp_path}/absolute.txt", b"root"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("link.txt")
        text.size = 4
        tar.addfile(text, io.BytesIO(b"text"))
    monkeypatch.chdir(inside)
    entries = read_entries(path)
    assert [e.key for e in entries if isinstance(e, Pair)] == [
        "../escape",
        f"{tmp_path}/absolute",
    ]
    assert skip_reasons(entries) == {"link": "no_image"}
    assert sorted(os.listdir(tmp_path)) == ["inside"]
    assert os.listdir(inside) == ["a.tar"]


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


def test_sparse_member_does_not_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("huge.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"00000000000\0", b"00000000000\0"
    block[483:495] = b"77777777777\0"  # real size: 8 GiB of zeros
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    good = write_tar(tmp_path / "good.tar", [("b.png", PNG), ("b.txt", b"text")])
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + pathlib.Path(good).read_bytes())
    source = open_source(str(path))
    assert [pair.key for pair in source] == ["b"]
    assert source.skipped == {"too_large": 1}


def test_compressed_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", [("k.png", PNG), ("k.txt", b"text")], "w:gz")
    assert [pair.caption for pair in open_source(path)] == ["text"]
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(gzip.compress(gzip.decompress(data)[:-10000]))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: the tar archive cannot be read"):
        list(open_source(path))


def test_real_tars(shared_data):
    source = open_source(str(shared_data / "emoji_*.tar"))
    pairs = list(source)
    assert len(pairs) == 2 * 3786
    assert not source.skipped
    assert {p.key for p in pairs[:3786]} == {p.key for p in pairs[3786:]}
    cifar = list(open_source(str(shared_data / "cifar10_test.tar")))
    assert len({p.metadata["label"] for p in cifar}) == 10
