"""Stored embeddings equal the model's, row by row, after any number of interruptions."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from diht_jax import embed, load_model, search
from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.weights.tensor_files import write_safetensors
from tests import make
from tests.docs.commands import parse_command

ARCH = make.small_architecture(embed_dim=24, context_length=8)
OPTIONS = EmbedOptions(shard_size=4, batch_size=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    write_safetensors(path, make.clip_tensors(ARCH))
    return path


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights, batch_size=8)


def picture(i):
    return make.noise(i, (16, 20 + i))


def png(i):
    return make.encoded(picture(i))


def write_tar(path, numbers, broken=(), silent=()):
    members = {}
    for i in numbers:
        members |= make.pair_members(f"{i:03d}", f"caption {i}", png(i))
        if i in broken:
            members[f"{i:03d}.png"] = b"no image"
        if i in silent:
            del members[f"{i:03d}.txt"]
    return make.write_tar(path, members)


def read_all(folder):
    rows = {}
    for path in sorted(folder.glob("*.npz")):
        part = np.load(path)
        for key, image_emb, text_emb in zip(
            part["key"], part["image_emb"], part["text_emb"], strict=True
        ):
            assert key not in rows
            rows[str(key)] = (image_emb, text_emb)
    return rows


def check_rows(model, rows, numbers):
    assert list(rows) == [f"{i:03d}" for i in numbers]
    image_emb, text_emb = (np.stack(column) for column in zip(*rows.values(), strict=True))
    assert image_emb.dtype == np.float32
    expected = model.encode_image([picture(i) for i in numbers])
    np.testing.assert_allclose(image_emb, expected, atol=1e-5)
    expected = model.encode_text([f"caption {i}" for i in numbers])
    np.testing.assert_allclose(text_emb, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(image_emb, axis=1), 1, atol=1e-5)


def assert_same_files(expected_folder, found_folder):
    """Compares all bytes, except for a part's duration and the checksum, which depends on it."""
    names = sorted(path.name for path in expected_folder.iterdir())
    assert names == sorted(path.name for path in found_folder.iterdir())
    for name in names:
        expected, found = ((f / name).read_bytes() for f in (expected_folder, found_folder))
        if name.endswith(".json"):
            expected, found = (
                json.loads(text) | {"seconds": 0, "checksum": ""} for text in (expected, found)
            )
        assert found == expected, name


def test_tars_with_unusable_entries(model, tmp_path):
    write_tar(tmp_path / "a.tar", range(11), broken=(4, 5, 6, 7), silent=(9,))
    write_tar(tmp_path / "b.tar", range(20, 24))
    out = tmp_path / "out"
    done = embed_source(model, str(tmp_path / "*.tar"), out, OPTIONS)
    assert done == {"pairs": 10, "dropped": {"image_unreadable": 4, "no_caption": 1}, "files": 4}
    check_rows(model, read_all(out), [0, 1, 2, 3, 8, 10, 20, 21, 22, 23])
    stats = json.loads((out / "embeddings-00000-00001.json").read_text())
    assert stats["pairs"] == 0 and stats["dropped_keys"] == ["004", "005", "006", "007"]
    assert not list(out.glob(".*"))


def test_interrupted_work_goes_on(model, tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", range(9))
    write_tar(tmp_path / "b.tar", range(9, 14))
    source, out = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], tmp_path / "out"
    calls, stops = [], [2]
    real = Encoder.images

    def count(*args, **options):
        if len(calls) in stops:
            raise KeyboardInterrupt
        encoded = real(*args, **options)
        calls.append([key for key, _ in encoded.notes])
        return encoded

    monkeypatch.setattr(Encoder, "images", count)
    with pytest.raises(KeyboardInterrupt):
        embed_source(model, source, out, OPTIONS)
    before = {path.name: path.read_bytes() for path in out.glob("*.npz")}
    assert len(before) == stops.pop()
    assert embed_source(model, source, out, OPTIONS)["pairs"] == 14
    # No image was embedded twice, and no finished part was written again.
    keys = [key for batch in calls for key in batch]
    assert sorted(keys) == [f"{i:03d}" for i in range(14)]
    for name, data in before.items():
        assert (out / name).read_bytes() == data
    check_rows(model, read_all(out), range(14))
    assert embed_source(model, source, out, OPTIONS)["files"] == 5
    assert len(calls) == 5


def test_a_cut_part_is_made_again_and_damaged_statistics_are_named(model, tmp_path):
    source, out = write_tar(tmp_path / "a.tar", range(9)), tmp_path / "out"
    embed_source(model, source, out, OPTIONS)
    shutil.copytree(out, tmp_path / "whole")
    cut = out / "embeddings-00000-00001.npz"
    cut.write_bytes(cut.read_bytes()[:-1])
    (out / "embeddings-00000-00000.npz").unlink()
    embed_source(model, source, out, OPTIONS)
    assert_same_files(tmp_path / "whole", out)
    names = ("embeddings-00000-00001.json", "embeddings-00000-00000.json", "embeddings.json")
    stats, other, settings = ((out / name).read_bytes() for name in names)
    for name, damaged in (
        (names[0], stats.replace(b'"pairs": 4', b'"pairs": 3')),
        (names[0], other),  # intact, but of another part
        (names[0], settings),
        (names[2], stats),
        (names[2], settings.replace(b"float32", b"float31", 1)),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(name)):
            embed_source(model, source, out, OPTIONS)
        (out / name).write_bytes(whole)


def test_a_replaced_picture_of_a_table_is_noticed(model, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n0.png,a\n1.png,b\n")
    out = tmp_path / "out"
    assert embed_source(model, str(table), out, OPTIONS)["pairs"] == 2
    assert embed_source(model, str(table), out, OPTIONS)["pairs"] == 2
    (tmp_path / "1.png").write_bytes(png(5))
    with pytest.raises(ValueError, match="other settings; changed: linked_files"):
        embed_source(model, str(table), out, OPTIONS)


def test_other_work_in_the_directory_is_refused(model, weights, tmp_path):
    write_tar(tmp_path / "a.tar", range(3))
    out = tmp_path / "out"
    embed_source(model, str(tmp_path / "a.tar"), out, OPTIONS)
    other = EmbedOptions(shard_size=5, batch_size=8, dtype="float16")
    with pytest.raises(ValueError, match="other settings; changed: dtype, shard_size"):
        embed_source(model, str(tmp_path / "a.tar"), out, other)
    write_tar(tmp_path / "a.tar", range(4))
    with pytest.raises(ValueError, match="changed: source"):
        embed_source(model, str(tmp_path / "a.tar"), out, OPTIONS)
    changed = load_model(weights, image_size=32, batch_size=8)
    assert changed.fingerprint() != model.fingerprint()


def test_parquet_of_half_precision_and_a_template(model, tmp_path):
    write_tar(tmp_path / "a.tar", range(6))
    options = EmbedOptions(
        format="parquet",
        dtype="float16",
        caption_template="a photo of {caption}.",
        modalities=("text",),
        shard_size=4,
        batch_size=4,
    )
    embed_source(model, str(tmp_path / "a.tar"), tmp_path / "out", options)
    table = pyarrow.parquet.read_table(tmp_path / "out" / "embeddings-00000-00001.parquet")
    assert table.column_names == ["key", "caption", "text_emb"]
    assert table["caption"].to_pylist() == ["caption 4", "caption 5"]
    assert str(table.schema.field("text_emb").type) == "fixed_size_list<element: halffloat>[24]"
    found = np.stack(table["text_emb"].to_numpy(zero_copy_only=False))
    expected = model.encode_text(["a photo of caption 4.", "a photo of caption 5."])
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=1e-3)


def test_pictures_without_captions_are_embedded_where_only_images_are_asked_for(model, tmp_path):
    source, out = tmp_path / "flat", tmp_path / "out"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.png").write_bytes(png(i))
    with pytest.raises(ValueError, match="pictures without captions, .* --modalities image"):
        embed_source(model, str(source), out, OPTIONS)
    assert not out.exists()
    image_only = EmbedOptions(modalities=("image",), batch_size=8)
    assert embed_source(model, str(source), out, image_only)["pairs"] == 5
    (path,) = out.glob("*.npz")
    part = np.load(path)
    assert part["key"].tolist() == [f"{i}.png" for i in range(5)]
    expected = model.encode_image([picture(i) for i in range(5)])
    np.testing.assert_allclose(part["image_emb"], expected, atol=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_tasks_divide_a_large_file(model, tmp_path, monkeypatch, count):
    write_tar(tmp_path / "a.tar", range(11), broken=(3,), silent=(6,))
    source = str(tmp_path / "a.tar")
    options = EmbedOptions(shard_size=3, batch_size=8)
    whole = embed_source(model, source, tmp_path / "whole", options)
    assert whole["files"] == 4
    embedded = []
    real = Encoder.images

    def encode(*args, **more):
        encoded = real(*args, **more)
        embedded.extend(key for key, _ in encoded.notes)
        return encoded

    monkeypatch.setattr(Encoder, "images", encode)
    shares = [
        dataclasses.replace(options, task_index=task, num_tasks=count)
        for task in reversed(range(count))
    ]
    done = [embed_source(model, source, tmp_path / "parts", share) for share in shares]
    assert sum(each["pairs"] for each in done) == whole["pairs"] == 9
    assert len(embedded) == len(set(embedded)) == 9  # no task embeds another's pairs
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    # One part is missing, and another number of tasks continues: only this part is made.
    embedded.clear()
    (tmp_path / "parts" / "embeddings-00000-00002.json").unlink()
    for task in range(3):
        share = dataclasses.replace(options, task_index=task, num_tasks=3)
        embed_source(model, source, tmp_path / "parts", share)
    assert embedded == ["007", "008"]
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("command", ["embed", "search"])
def test_an_input_of_which_all_is_left_out_is_an_error(command, weights, tmp_path):
    source = write_tar(tmp_path / "a.tar", range(3), broken=(0, 1), silent=(2,))
    main = {"embed": embed.main, "search": lambda: search.main([])}[command]
    where = {"embed": "output", "search": "index"}[command]
    arguments = [f"--model={weights}", f"--input={source}", f"--{where}={tmp_path / 'out'}"]
    arguments.append("--architecture=vision_heads=1,text_heads=1")
    with pytest.raises(ValueError, match=f"--input={source}.*image_unreadable 2"):
        parse_command(f"diht_jax.{command}", arguments, lambda _: main())
