"""Commands around a work directory, as a user runs them."""

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from diht_jax import load_model
from tests.compiling import xla_flags


def _run(command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"diht_jax.{command}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": xla_flags()},
        timeout=900,
    )


@pytest.fixture
def pictures(tmp_path, photos):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, photo in enumerate(photos):
        (folder / f"{number}.png").write_bytes(photo)
    return folder


def test_help_lists_the_flags_that_commands_share():
    for command in ("export", "embed"):
        listed = _run(command, "--help").stdout
        sizes = ("image_size", "context_length")
        for flag in ("model", "step", "[no]ema", *sizes, "architecture", "output"):
            assert f"--{flag}" in listed, (command, flag)
    assert "--coordinator_address" in _run("train", "--help").stdout


def test_embed_writes_what_the_model_embeds(workdir, pictures, tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for path in sorted(pictures.iterdir()):
            file.add(path, path.name)
            caption = tmp_path / f"{path.stem}.txt"
            caption.write_text(f"picture {path.stem}")
            file.add(caption, caption.name)
    output = tmp_path / "embedded"
    done = _run("embed", "--model", workdir, "--input", tar, "--output", output, "--batch_size", 8)
    assert done.returncode == 0, done.stderr
    assert " 5/5 [" in done.stderr
    part = np.load(output / "embeddings-00000-00000.npz")
    assert part["key"].tolist() == list("01234")
    model = load_model(workdir, batch_size=8)
    images = [Image.open(pictures / f"{i}.png").convert("RGB") for i in range(5)]
    np.testing.assert_allclose(part["image_emb"], model.encode_image(images), atol=1e-5)
    texts = model.encode_text([f"picture {i}" for i in range(5)])
    np.testing.assert_allclose(part["text_emb"], texts, atol=1e-5)


def test_export_writes_what_loads_to_the_same_model(workdir, tmp_path):
    output = tmp_path / "exported"
    arguments = ("--model", workdir, "--format", "safetensors", "--output", output)
    done = _run("export", *arguments)
    assert done.returncode == 0, done.stderr
    assert workdir.name in (output / "README.md").read_text()
    texts = ["a dog", "a red car"]
    expected = load_model(workdir, batch_size=8).encode_text(texts)
    np.testing.assert_array_equal(load_model(output, batch_size=8).encode_text(texts), expected)
    done = _run("export", *arguments)
    assert done.returncode == 1
    assert str(output) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        (
            "evaluate",
            ("--architecture", "activation=gelu"),
            "a work directory knows its architecture",
        ),
        (
            "fewshot",
            ("--architecture", "activation=gelu"),
            "a work directory knows its architecture",
        ),
        ("evaluate", ("--dim", 10_000), "dim=10000; expected 1 to"),
        ("search", ("--dim", 10_000), "dim=10000; expected 1 to"),
        ("fewshot", ("--image_size", 33), "image_size 33 is no multiple of patch_size"),
        ("search", ("--image_size", 33), "image_size 33 is no multiple of patch_size"),
    ],
)
def test_what_the_model_does_not_tell_reaches_the_loading(
    command, flag, message, workdir, pictures, tmp_path
):
    rows = [{"image": f"{i}.png", "caption": "x", "label": i % 2} for i in range(4)]
    (pictures / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pictures / "a.jsonl"
    arguments = {
        "evaluate": ["--tasks", f"retrieval:{table}", "--output", tmp_path / "o.json"],
        "fewshot": ["--train", table, "--test", table, "--output", tmp_path / "o.json"],
        "search": ["--images", pictures, "a dog"],
    }[command]
    done = _run(command, "--model", workdir, *flag, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
