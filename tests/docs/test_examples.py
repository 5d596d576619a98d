"""The Python code on the pages runs; `test_readme.py` has that of README and quickstart."""

import os
import subprocess
import sys

import pytest

from tests.docs.pages import REPOSITORY, python_blocks

LIBRARY = python_blocks(REPOSITORY / "docs/explained/library.md")

# Appended to the block with the loss: compares its result with the dense form on one device.
COMPARISON = """
assert jax.device_count() == 4 and not loss.sharding.device_set - set(mesh.devices.flat)


def single_device_loss(params):
    image_emb, text_emb = embed(params["image"], images), embed(params["text"], texts)
    scale = jnp.exp(params["log_logit_scale"])
    return contrastive_loss(image_emb, text_emb, scale, beta=0.25, impl="gathered")


expected_loss, expected_grads = jax.jit(jax.value_and_grad(single_device_loss))(params)
assert jnp.allclose(loss, expected_loss, rtol=1e-5), (loss, expected_loss)
for name, value in expected_grads.items():
    assert jnp.allclose(grads[name], value, rtol=1e-4, atol=1e-5), name
"""


def test_loss_of_the_library_page_is_that_of_one_device(tmp_path):
    """Runs in another process, which has four devices."""
    block = next(block for block in LIBRARY if "contrastive_loss" in block)
    done = subprocess.run(
        [sys.executable, "-c", block + COMPARISON],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    claimed = block.rpartition("# ")[2].strip().split(", ")
    assert [number for number in claimed if number not in done.stdout] == [], done.stdout


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a code block in a folder without files of the checkout."""
    monkeypatch.chdir(tmp_path)
    return lambda block: exec(block, {"__name__": "__main__"})


def test_records_of_the_library_page_come_through_grain(run):
    block = next(block for block in LIBRARY if "TFRecordSource" in block)
    run(block + "\nassert len(source) == 4\n")


def test_tokens_of_the_library_page(run, capsys):
    run(next(block for block in LIBRARY if "tokenizer.decode" in block))
    printed = capsys.readouterr().out
    assert printed.endswith("fish & chips\n") and printed.startswith("[49406   320  1125")


@pytest.mark.parametrize("block", python_blocks(REPOSITORY / "docs/explained/how_it_works.md"))
def test_order_of_how_it_works(block, run):
    run(block)
