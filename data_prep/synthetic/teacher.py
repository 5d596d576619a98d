"""The demo's image teacher: a small convolutional network trained on clean scenes only.

    python -m data_prep.synthetic.teacher --input '/tmp/web/train-*.tar' --output /tmp/teacher.npz

It learns to recognise the shapes, colours, sizes and textures in newly drawn scenes, with the
generator's labels and without captions. The features of the given pictures are then written as
`key` and `image_emb`, which `data_prep.label` reads as precomputed embeddings. Ours: it replaces
the paper's SWAG teacher where everything has to run in minutes.
"""

from __future__ import annotations

import functools
import io
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from PIL import Image

from data_prep.synthetic import drawing, sampling
from data_prep.synthetic.scenes import COLORS, SIZES, TEXTURES, Scene
from data_prep.synthetic.shapes import SHAPES
from data_prep.synthetic.web import map_in_processes
from diht_jax import command_line
from diht_jax.input import transforms
from diht_jax.readers.registry import open_source
from diht_jax.storage.files import write_bytes
from diht_jax.terminal import ProgressBar

CONCEPTS: tuple[str, ...] = (*SHAPES, *COLORS, *SIZES, *TEXTURES)

BATCH = 64  # scenes per step

_SIDE = 64  # px, side of the input pictures
_DRAWN_SIDE = 128
_LEARNING_RATE = 2e-3
_WIDTHS = (32, 64, 128, 128)


class Network(nnx.Module):
    """Strided convolutions, a maximum over positions, and a linear layer with a logit per concept.

    Maximum instead of mean: a shape is visible at one position, and a mean over the picture would
    only know its colour.
    """

    def __init__(self, rngs: nnx.Rngs):
        widths = (3, *_WIDTHS)
        self.convolutions = nnx.List(
            [
                nnx.Conv(n, m, (3, 3), strides=2, rngs=rngs)
                for n, m in zip(widths, widths[1:], strict=False)
            ]
        )
        self.norms = nnx.List([nnx.GroupNorm(m, num_groups=8, rngs=rngs) for m in _WIDTHS])
        self.head = nnx.Linear(_WIDTHS[-1], len(CONCEPTS), rngs=rngs)

    def features(self, pictures: jax.Array | np.ndarray) -> jax.Array:
        """Maps uint8 pictures [b, s, s, 3] to float32 features [b, d]."""
        x = pictures.astype(jnp.float32) / 127.5 - 1.0
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return x.max((1, 2))

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Returns logits [b, concepts]."""
        return self.head(self.features(pictures))


def train_teacher(num_scenes: int, epochs: int, seed: int, workers: int = 0) -> Network:
    """Trains a network on drawn scenes, of which at least every second one has a single object."""
    pictures, targets = draw_scenes(num_scenes, seed, workers)
    network = Network(nnx.Rngs(seed))
    steps = epochs * (num_scenes // BATCH)
    schedule = optax.cosine_onecycle_schedule(max(1, steps), _LEARNING_RATE)
    optimizer = nnx.Optimizer(network, optax.adam(schedule), wrt=nnx.Param)
    order = np.random.default_rng(seed)
    with ProgressBar(total=steps, unit="step", desc="teacher") as progress:
        for _ in range(epochs):
            indices = order.permutation(num_scenes)[: num_scenes // BATCH * BATCH]
            for batch in indices.reshape(-1, BATCH):
                loss = _update(network, optimizer, pictures[batch], targets[batch])
                progress.update()
                if progress.n % 20 == 0:
                    progress.set_postfix_str(f"loss {float(loss):.3f}")
    return network


@nnx.jit
def _update(network, optimizer, pictures, targets):
    def loss_of(network):
        logits = network(pictures)
        return optax.sigmoid_binary_cross_entropy(logits, targets).sum(1).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


def embed(network: Network, pictures: np.ndarray) -> np.ndarray:
    """Maps uint8 pictures [n, s, s, 3] to float32 embeddings [n, d]."""
    apply, size = nnx.jit(Network.features), 8 * BATCH
    starts = range(0, len(pictures), size)
    return np.concatenate([np.asarray(apply(network, pictures[i : i + size])) for i in starts])


def draw_scenes(num_scenes: int, seed: int, workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 pictures [n, s, s, 3], and float32 [n, concepts]: 1 if the concept is shown."""
    drawn = map_in_processes(functools.partial(_draw, seed), range(num_scenes), workers)
    progress = ProgressBar(drawn, total=num_scenes, desc="scenes", unit="scene")
    pictures, targets = zip(*progress, strict=True)
    return np.stack(pictures), np.stack(targets)


def _draw(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, zlib.crc32(b"teacher"), index])
    scene = sampling.sample_single(rng) if index % 2 else sampling.sample_scene(rng)
    return shrink(drawing.render_scene(rng, scene, _DRAWN_SIDE)), concepts_in(scene)


def concepts_in(scene: Scene) -> np.ndarray:
    """Returns float32 zeros and ones that mark the `CONCEPTS` in a scene."""
    shown = {
        name for item in scene.objects for name in (item.shape, item.color, item.size, item.texture)
    }
    return np.array([name in shown for name in CONCEPTS], np.float32)


def shrink(picture: Image.Image) -> np.ndarray:
    """Converts a picture to the input size of the network."""
    return np.asarray(picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX))


def write_embeddings(
    source: str, output: str | os.PathLike[str], *, num_scenes: int, epochs: int, seed: int
) -> int:
    """Writes key and image_emb of a source's pictures to an npz file, and returns their number."""
    network = train_teacher(num_scenes, epochs, seed)
    keys, pictures = [], []
    for pair in ProgressBar(open_source(source), unit="image", desc="embedding"):
        keys.append(pair.key)
        pictures.append(shrink(transforms.decode_rgb(pair.image)))
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(keys), image_emb=embed(network, np.stack(pictures)))
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, buffer.getvalue())
    return len(keys)


def main() -> None:
    """Writes the output, unless it exists."""
    given = flags.FLAGS
    if pathlib.Path(given.output).exists():
        logging.info("%s is there; delete it to have it made again", given.output)
        return
    number = write_embeddings(
        given.input,
        given.output,
        num_scenes=given.num_scenes,
        epochs=given.num_epochs,
        seed=given.seed,
    )
    logging.info("%d embeddings in %s", number, given.output)


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_string("input", None, "Pictures to embed, as config.input of the filter.")
    flags.DEFINE_alias("images", "input")
    flags.DEFINE_string("output", None, "The npz file.")
    flags.DEFINE_integer("num_scenes", 6000, "Scenes that the teacher is trained on.")
    flags.DEFINE_integer("num_epochs", 5, "Passes over these scenes.")
    flags.DEFINE_alias("epochs", "num_epochs")
    flags.DEFINE_integer("seed", 1, "Of scenes, parameters and order.")
    flags.mark_flags_as_required(["input", "output"])


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
