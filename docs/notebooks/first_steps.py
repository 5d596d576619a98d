# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps
#
# Search pictures with a small model, filter captions, train a smaller one on what the filter
# keeps, and compare. Five minutes on a laptop or on Colab without an accelerator; nothing is
# downloaded once `diht_jax` is installed.

# %%
# Where diht_jax is missing, as on Colab, it is installed from SOURCE: "git+https://..." of the
# repository, or the path of a wheel.
SOURCE = ""  # @param {type: "string"}

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("diht_jax") is None:
    if not SOURCE:
        raise ValueError("set SOURCE to the address of the repository, or to a wheel")
    requirement = f"diht_jax[prep] @ {SOURCE}" if "://" in SOURCE else f"{SOURCE}[prep]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", requirement], check=True)

# %%
import io
import os
import pathlib
import tarfile

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

FOLDER = pathlib.Path("first_steps")  # everything is written here
NUM_PAIRS = int(os.environ.get("FIRST_STEPS_PAIRS", 3000))
NUM_STEPS = int(os.environ.get("FIRST_STEPS_STEPS", 400))

# %% [markdown]
# ## Search
#
# `clipart_tiny` comes with the package: 2 million parameters, trained on the emoji of two
# artists. It finds pictures by names of emoji. With it come 60 that it was not trained on.

# %%
import diht_jax
from diht_jax.data.clipart_tiny import PICTURES


def read_pictures(path):
    """The pictures of a webdataset."""
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith((".png", ".jpg"))]
        return [Image.open(io.BytesIO(tar.extractfile(member).read())) for member in images]


def show_matches(model, pictures, queries, count=6):
    """A row of pictures for each query, the best first."""
    similarities = model.encode_text(queries) @ model.encode_image(pictures).T
    figure, axes = plt.subplots(len(queries), count, figsize=(count * 1.3, len(queries) * 1.6))
    for row, query, found in zip(axes, queries, similarities, strict=True):
        for axis, number in zip(row, np.argsort(-found), strict=False):
            axis.imshow(model.preprocess(pictures[number]))
            axis.set_title(f"{found[number]:.2f}", fontsize=8, pad=2)
            axis.axis("off")
        row[0].text(0, 1.3, query, transform=row[0].transAxes, fontsize=11)
    figure.tight_layout()
    plt.show()


model = diht_jax.load_model("clipart_tiny")
emoji = read_pictures(PICTURES)
show_matches(model, emoji, ["flag", "clock face", "yellow face", "tulip", "malaysia flag"])

# %% [markdown]
# The same in a terminal, with your own pictures:
#
#     python -m diht_jax.search --model clipart_tiny --input FOLDER "red heart" "clock face"

# %% [markdown]
# ## Filter captions
#
# The filter turns a caption into a graph: objects with their attributes, and actions between
# them. A pair is kept if an object has at least one attribute or relation (complexity 1) and
# something happens (an action).

# %%
from data_prep.captions import cat_reason, parse_captions

CAPTIONS = [
    "a black cat is chasing a small brown bird",
    "two men playing chess in a park",
    "woman riding a red bicycle along the river",
    "a child throws a yellow ball to the dog",
    "the old man reads a newspaper",
    "girls dancing on the beach at sunset",
    "a chef cuts vegetables with a sharp knife",
    "people waiting for a train",
    "a bird is sitting on a wooden fence",
    "dog catching a frisbee",
    "a red car",
    "sunset over the mountains",
    "the cat on the table",
    "portrait of a young woman with blue eyes",
    "a glass of water",
    "IMG_20190412_1837.jpg",
    "Men's Slim Fit Cotton T-Shirt, Size L, Navy Blue",
    "click here for more information",
    "stock photo",
    "New York",
]
graphs = parse_captions(CAPTIONS)


def draw_graph(axis, caption, graph):
    """Objects with their attributes below them; arrows are actions (red) and relations (grey)."""
    places = {name: place for place, name in enumerate(graph.objects)}
    for name, node in graph.objects.items():
        axis.text(
            places[name], 0, name, ha="center", va="center", bbox={"fc": "#dce6f2", "ec": "w"}
        )
        axis.text(places[name], -0.5, "\n".join(node.attributes), ha="center", va="top", size=8)
    edges = [(edge, "#b03030") for edge in graph.actions]
    edges += [(edge, "#888888") for edge in graph.relations]
    for number, (edge, color) in enumerate(edges):
        ends = [places[name] for name in (edge.subject, edge.object) if name is not None]
        if len(ends) == 2:
            arc = {
                "arrowstyle": "->",
                "connectionstyle": f"arc3,rad={-0.3 * np.sign(np.diff(ends)[0])}",
            }
            arc |= {"color": color, "shrinkA": 12, "shrinkB": 12}
            axis.annotate("", (ends[1], 0.1), (ends[0], 0.1), arrowprops=arc)
        label = {
            "ha": "center",
            "size": 8,
            "color": color,
            "bbox": {"fc": "w", "ec": "none", "pad": 1},
        }
        axis.text(np.mean(ends or [0]), 0.8 + 0.45 * number, edge.predicate, **label)
    axis.set(xlim=(-0.7, max(len(places), 2) - 0.3), ylim=(-1.6, 1.9))
    axis.axis("off")
    reason = cat_reason(graph)
    verdict = f"dropped: {reason.replace('_', ' ')}" if reason else "kept"
    axis.set_title(f"{caption}\n{verdict}", fontsize=8, color="#a33" if reason else "#282")


figure, axes = plt.subplots(10, 2, figsize=(11, 17))
for axis, caption, graph in zip(axes.flat, CAPTIONS, graphs, strict=True):
    draw_graph(axis, caption, graph)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Train
#
# The package draws a noisy web of its own: scenes of coloured shapes with captions, half of which
# are product titles, file names, pictures of text, or captions of other pictures.

# %%
from data_prep.synthetic import web

sets = web.Settings(num_pairs=NUM_PAIRS, num_retrieval=min(500, NUM_PAIRS), num_classification=0)
counts = web.write_dataset(sets, FOLDER / "web", workers=1)
print(dict(counts))

# %% [markdown]
# One student sees the raw pairs, with the usual loss (InfoNCE). The other sees those that the
# filter keeps, with hard negatives (HN-NCE). Both are tiny and see equally many samples: about a
# minute each on two cores.

# %%
from data_prep.filter import run_filter
from diht_jax.config import load_recipe
from diht_jax.training.loop import train

for name, recipe in {"raw": "convert", "kept": "cat"}.items():
    config = load_recipe(f"prep/{recipe}")
    config.input = str(FOLDER / "web" / "train-*.tar")
    config.output = str(FOLDER / name)
    config.text_spotting = False  # reading the texts in pictures takes minutes
    config.num_workers = 0
    run_filter(config)

# %%
for name, beta in {"raw": 0.0, "kept": 0.25}.items():
    config = load_recipe("demo")
    config.data.train = str(FOLDER / name)
    config.loss.beta = beta  # how much harder negatives count more; 0 is InfoNCE
    config.total_examples, config.total_steps = None, NUM_STEPS
    config.optimizer.warmup_steps = NUM_STEPS // 20
    train(config, FOLDER / f"student_{name}")

# %% [markdown]
# ## Compare
#
# Retrieval on scenes that no training pair shows: the share of captions whose picture is among
# the first ten found. `clipart_tiny` has never seen such a scene.

# %%
from diht_jax.evaluate import evaluate_model
from diht_jax.evaluation.task_parsing import parse_tasks

scenes = FOLDER / "web" / "val_retrieval.tar"
tasks = parse_tasks([f"scenes=retrieval:{scenes}?caption_template={{caption}}"])
models = {
    "clipart_tiny": "clipart_tiny",
    "student, raw pairs": str(FOLDER / "student_raw"),
    "student, kept pairs": str(FOLDER / "student_kept"),
}
found = {}
for number, (name, path) in enumerate(models.items()):
    results = evaluate_model(path, tasks, FOLDER / f"results_{number}.json", pages=False)
    found[name] = results["results"][0]["metrics"]

print(f"{'':20}    R@1   R@10")
print(f"{'chance':20} {1 / sets.num_retrieval:6.1%} {10 / sets.num_retrieval:6.1%}")
for name, metrics in found.items():
    print(f"{name:20} {metrics['t2i_r1']:6.1%} {metrics['t2i_r10']:6.1%}")

# %%
student = diht_jax.load_model(FOLDER / "student_kept")
show_matches(student, read_pictures(scenes), ["a red circle above a blue square", "a green star"])

# %% [markdown]
# From here: `python -m data_prep.filter --help`, `python -m diht_jax.train --help`, and the
# guides in `docs/`. Your own pictures with a table of captions are enough to train on:
# `configs/own_data.py`.
