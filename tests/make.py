"""Small pictures, tars, records, runs and a model for tests."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from diht_jax.data.records import open_writer
from diht_jax.records.schema import Pair, Record, encode_record
from diht_jax.records.sharded import ShardedRecords
from tests.compiling import xla_flags

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PREP_RECIPES = REPOSITORY / "configs" / "prep"
RECIPES = sorted(
    path
    for path in (REPOSITORY / "configs").rglob("*.py")
    if path.stem != "common" and path.parent != PREP_RECIPES
)
# Arguments that a recipe cannot do without.
REQUIRED_ARGUMENTS = {"own_data": "pairs=1000"}


def noise(seed: int, size: tuple[int, int] = (30, 24), cell: int = 1) -> Image.Image:
    """A picture of random colours.

    Args:
        seed: another one gives another picture.
        size: width and height in pixels.
        cell: side of the squares of one colour, so that JPEG keeps most of them.
    """
    width, height = size
    cells = (-(-height // cell), -(-width // cell), 3)
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, cells, np.uint8))
    large = small.resize((cells[1] * cell, cells[0] * cell), Image.Resampling.NEAREST)
    return large.crop((0, 0, width, height))


def plain(color: Any, size: tuple[int, int] = (40, 20)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, color)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (30, 24)) -> bytes:
    """`noise`, as PNG."""
    return encoded(noise(seed, size))


def write_tar(
    path: str | pathlib.Path,
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    mode: str = "w",
    **options: Any,
) -> str:
    """Writes a tar and returns its path.

    Args:
        path: of the tar; its folder is made.
        members: name and contents of each file. As pairs, names may repeat.
        mode: of `tarfile.open`, such as "w:gz".
        **options: of `tarfile.open`, such as `format=tarfile.PAX_FORMAT`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def npy(values: Any) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def write_benchmark_folder(
    root: str | pathlib.Path,
    entries: Sequence[Mapping[str, bytes]],
    files: Mapping[str, str] | None = None,
    *,
    num_shards: int = 1,
) -> str:
    """Writes a data set in CLIP_benchmark's layout, and returns it as a source.

    Args:
        root: of the data set; is made.
        entries: extension -> bytes of each picture, whose key is "s/" and its number.
        files: name -> text of the other files.
        num_shards: which share the entries in turn.
    """
    root = pathlib.Path(root)
    for shard in range(num_shards):
        members = {
            f"s/{number}.{extension}": data
            for number in range(shard, len(entries), num_shards)
            for extension, data in entries[number].items()
        }
        write_tar(root / "test" / f"{shard}.tar", members)
    for name, text in {"test/nshards.txt": f"{num_shards}\n", **(files or {})}.items():
        (root / name).write_text(text)
    return f"clip_benchmark:{root}"


def pair_members(key: str, caption: str, image: bytes, suffix: str = "png") -> dict[str, bytes]:
    """The files of one pair of a webdataset tar."""
    return {f"{key}.{suffix}": image, f"{key}.txt": caption.encode()}


def write_pair_tar(path: str | pathlib.Path, captions: Sequence[str]) -> str:
    """Writes a webdataset tar with one pair for each caption, and returns its path.

    Args:
        path: of the tar; its folder is made.
        captions: keys are their numbers, and so are the seeds of the pictures.
    """
    members: dict[str, bytes] = {}
    for number, caption in enumerate(captions):
        members |= pair_members(f"{number:05d}", caption, png(number))
    return write_tar(path, members)


def record(number: int, **fields: Any) -> Record:
    """A record of a picture of noise, with key and caption from its number."""
    defaults = {"key": f"{number:05d}", "image": png(number), "caption": f"picture {number}"}
    return Record(**defaults | fields)


def write_shard(path: str | pathlib.Path, records: Iterable[Pair | bytes]) -> pathlib.Path:
    """Writes one shard of the format that its name tells, and returns its path."""
    with open_writer(path) as writer:
        for each in records:
            writer.write(each if isinstance(each, bytes) else encode_record(each))
    return pathlib.Path(path)


class InMemory(ShardedRecords):
    """Records in memory as the source of a run; a subclass may give `__getitem__` and `__len__`."""

    paths = ["memory"]

    def __init__(self, records: Iterable[bytes] = ()):
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return self._records[index]

    @property
    def shard_lengths(self) -> list[int]:
        """Those of a single shard."""
        return [len(self)]

    def locate(self, index: int) -> tuple[str, int]:
        """As of a file."""
        return "memory", index

    def make_offsets_local(self, cache_dir: str | None = None) -> None:
        """Nothing is remote."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def one_source(records: Any, decode: Any, seed: int = 0, order: Any = None) -> Any:
    """The run of a source alone, in an order or in the global one of a seed."""
    # Not at the top: few tests need it.
    from diht_jax.input.mixing import Mixture, Source
    from diht_jax.input.order import GlobalOrder

    return Mixture([Source("", records, order or GlobalOrder(len(records), seed), decode)])


def train_iterator(
    records: Any, *, seed: int = 0, process_index: int = 0, process_count: int = 1, **data: Any
) -> Any:
    """The batches of a run, with the defaults of `config.data` but for what is given."""
    # Not at the top: few tests need it.
    from diht_jax.input.pipeline import TrainIterator
    from diht_jax.training.recipe import default_config

    section = default_config().data
    section.update({name: value for name, value in data.items() if value is not None})
    hosts = {"process_index": process_index, "process_count": process_count}
    return TrainIterator(records, section, seed=seed, **hosts)


def write_records(
    folder: str | pathlib.Path, records: Sequence[Pair] | int, lengths: Sequence[int] | None = None
) -> pathlib.Path:
    """Writes TFRecord shards `train-00000.tfrecord` and so on, and returns their folder.

    Args:
        folder: is made.
        records: what to write; a number stands for that many of `record`.
        lengths: records of each shard; None for one shard.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter([record(i) for i in range(records)] if isinstance(records, int) else records)
    total = records if isinstance(records, int) else len(records)
    for shard, length in enumerate([total] if lengths is None else lengths):
        write_shard(folder / f"train-{shard:05d}.tfrecord", itertools.islice(rest, length))
    return folder


def run_command(
    module: str,
    *arguments: Any,
    devices: int | None = None,
    folder: pathlib.Path = REPOSITORY,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Runs `python -m module` with flags such as `("model", path)`, and texts; keeps its output."""
    flags = (f"--{a[0]}={a[1]}" if isinstance(a, tuple) else a for a in arguments)
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": xla_flags(devices), **environment},
        timeout=900,  # only against hanging
    )


def small_architecture(**changes: Any) -> Any:
    """An `Architecture` of one layer a tower; `changes` are its other fields."""
    from diht_jax.models import Architecture

    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "context_length": 12}
    for tower in ("vision", "text"):
        sizes |= {f"{tower}_layers": 1, f"{tower}_width": 64, f"{tower}_heads": 1}
    return Architecture(**sizes | changes)


def clip_tensors(arch: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters of an `Architecture`, by their names in CLIP's layout."""
    from diht_jax.weights.clip_layout import layout, layout_shapes, our_shapes

    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32) * 0.1
        for name, shape in layout_shapes(layout(arch), our_shapes(arch)).items()
    }


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """A config that trains a model of one layer in seconds; `section__key=value` changes it."""
    from diht_jax.config import default_config, validate_config

    config = default_config()
    config.total_steps = 20
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(
        image_size=16,
        patch_size=8,
        vision_layers=1,
        vision_width=32,
        text_layers=1,
        text_width=32,
        embed_dim=16,
        context_length=24,
        vocab_size=700,
    )
    config.optimizer.warmup_steps = 0
    config.data.batch_size = 16
    config.data.num_workers = 0
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    validate_config(config, default_config())
    return config


def draw_parameters(init_params: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of the shapes that `init_params` makes, biases and all.

    Nothing is compiled for them, which would take longer than most of what they are for.
    """
    import jax

    from diht_jax.sharding import path_name

    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path_name(path)
        if not leaf.shape:
            return np.asarray(-np.log(0.07), leaf.dtype)  # of the scale, as it begins
        stddev = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.1
        values = stddev * rng.standard_normal(leaf.shape) + name.endswith("scale")
        return values.astype(leaf.dtype)

    shapes = jax.eval_shape(init_params, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_run(
    folder: str | pathlib.Path,
    config: ml_collections.ConfigDict,
    seed: int = 0,
    step: int = 7,
    **scalars: float,
) -> pathlib.Path:
    """Writes a work directory with drawn parameters of a config as its one checkpoint.

    Scalars, such as `log_logit_scale` or a loss's `logit_bias`, are added to them or replace them.
    Of a run with an average of its parameters that is drawn by the next seed.
    """
    import jax
    import orbax.checkpoint as ocp

    from diht_jax.models.parameters import ModelDefinition
    from diht_jax.models.zoo import get_architecture
    from diht_jax.training.workdir import saved_run

    folder = pathlib.Path(folder)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    init_params = ModelDefinition(arch, config.model.dtype, config.model.param_dtype).init_params
    params = draw_parameters(init_params, seed)
    state = {"params": params | {name: jax.numpy.float32(v) for name, v in scalars.items()}}
    if config.ema.decay is not None:
        state["ema_params"] = draw_parameters(init_params, seed + 1)
    saved_run.write_config(folder, config)
    directory = folder / saved_run.CHECKPOINT_DIRECTORY / str(step)
    with (
        ocp.StandardCheckpointer() as states,
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checks,
    ):
        states.save(directory / saved_run.STATE_ITEM, state)
        sums = {saved_run.CHECKSUMS: saved_run.tree_checksums(state)}
        checks.save(directory / saved_run.CHECKS_ITEM, args=ocp.args.JsonSave(sums))
    return folder


class HashedModel:
    """Embeds a picture's pixels, or a text, by a random vector that they alone decide."""

    logit_scale = 1.0

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """A digest of all pixels, since a resized picture could hide a wrong box."""
        digest = np.random.default_rng(list(np.asarray(image).tobytes())).integers(0, 255, 12)
        return digest.astype(np.uint8).reshape(2, 2, 3)

    def encode_image(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [b, 16], L2-normalised."""
        return np.stack([self.embed(image.tobytes()) for image in images])

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [b, 16], L2-normalised."""
        return np.stack([self.embed(text.encode()) for text in texts])

    @staticmethod
    def embed(data: bytes) -> np.ndarray:
        """The vector of some bytes."""
        vector = np.random.default_rng(list(data)).normal(size=16).astype(np.float32)
        return vector / np.linalg.norm(vector)
