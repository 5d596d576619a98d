"""Small images, tars, records, runs and a model for tests."""

from __future__ import annotations

import contextlib
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
# Arguments that a recipe requires.
REQUIRED_ARGUMENTS = {"own_data": "pairs=1000"}


def noise(seed: int, size: tuple[int, int] = (30, 24), cell: int = 1) -> Image.Image:
    """Returns an image of random colours.

    Args:
            seed: Each seed gives another picture.
            size: Width and height in pixels.
            cell: Side of the single-coloured squares in pixels; JPEG preserves large ones better.
    """
    width, height = size
    cells = (-(-height // cell), -(-width // cell), 3)
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, cells, np.uint8))
    large = small.resize((cells[1] * cell, cells[0] * cell), Image.Resampling.NEAREST)
    return large.crop((0, 0, width, height))


def plain(color: Any, size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Returns an image of one colour."""
    return Image.new("RGB", size, color)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Encodes an image as the bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (30, 24)) -> bytes:
    """Returns `noise` as PNG bytes."""
    return encoded(noise(seed, size))


def write_tar(
    path: str | pathlib.Path,
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    mode: str = "w",
    **options: Any,
) -> str:
    """Writes a tar and returns its path.

    Args:
            path: Path of the tar; its folder is created.
            members: Name and contents of each file. Pairs allow repeated names.
            mode: Mode of `tarfile.open`, such as "w:gz".
            **options: Options of `tarfile.open`, such as `format=tarfile.PAX_FORMAT`.
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
    """Returns the bytes of a .npy file."""
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
    """Writes a data set in CLIP_benchmark's layout and returns its source string.

    Args:
            root: Folder of the data set; is created.
            entries: Maps file extension -> bytes for each picture; picture i has the key "s/i".
            files: Maps name -> text of the other files.
            num_shards: Number of shards; entries are distributed round-robin.
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
    """Returns the files of one pair of a webdataset tar."""
    return {f"{key}.{suffix}": image, f"{key}.txt": caption.encode()}


def write_pair_tar(path: str | pathlib.Path, captions: Sequence[str]) -> str:
    """Writes a webdataset tar with one pair for each caption, and returns its path.

    Args:
            path: Path of the tar; its folder is created.
            captions: The index of a caption is its pair's key and its picture's seed.
    """
    members: dict[str, bytes] = {}
    for number, caption in enumerate(captions):
        members |= pair_members(f"{number:05d}", caption, png(number))
    return write_tar(path, members)


def record(number: int, **fields: Any) -> Record:
    """A record with a noise picture; its key and caption contain the number."""
    defaults = {"key": f"{number:05d}", "image": png(number), "caption": f"picture {number}"}
    return Record(**defaults | fields)


def write_shard(path: str | pathlib.Path, records: Iterable[Pair | bytes]) -> pathlib.Path:
    """Writes one shard in the format that its file name implies, and returns its path."""
    with open_writer(path) as writer:
        for each in records:
            writer.write(each if isinstance(each, bytes) else encode_record(each))
    return pathlib.Path(path)


class InMemory(ShardedRecords):
    """Records in memory as a data source; subclasses may override `__getitem__`, `__len__`."""

    paths = ["memory"]

    def __init__(self, records: Iterable[bytes] = ()):
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return self._records[index]

    @property
    def shard_lengths(self) -> list[int]:
        """The length of the single shard."""
        return [len(self)]

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the shard's path and the record's position, like a file-based source."""
        return "memory", index

    def make_offsets_local(self, cache_dir: str | None = None) -> None:
        """Does nothing, since nothing is remote."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def one_source(records: Any, decode: Any, seed: int = 0, order: Any = None) -> Any:
    """A `Mixture` of one source, in the given order or in the global order of a seed."""
    # Imported here because few tests need it.
    from diht_jax.input.mixing import Mixture, Source
    from diht_jax.input.order import GlobalOrder

    return Mixture([Source("", records, order or GlobalOrder(len(records), seed), decode)])


def train_iterator(
    records: Any, *, seed: int = 0, process_index: int = 0, process_count: int = 1, **data: Any
) -> Any:
    """A `TrainIterator` with the defaults of `config.data`, except for the given keys."""
    # Imported here because few tests need it.
    from diht_jax.input.pipeline import TrainIterator
    from diht_jax.training.recipe import default_config

    section = default_config().data
    section.update({name: value for name, value in data.items() if value is not None})
    hosts = {"process_index": process_index, "process_count": process_count}
    return TrainIterator(records, section, seed=seed, **hosts)


def take_batches(batches: Any, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the next batches of a `TrainIterator`, and closes it, also after an error."""
    with contextlib.closing(batches):
        return [next(batches) for _ in range(count)]


def write_records(
    folder: str | pathlib.Path, records: Sequence[Pair] | int, lengths: Sequence[int] | None = None
) -> pathlib.Path:
    """Writes TFRecord shards `train-00000.tfrecord` and so on, and returns their folder.

    Args:
            folder: Output folder; is created.
            records: The records, or a number n for the first n of `record`.
            lengths: Number of records in each shard; None for one shard.
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
    input: str | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Runs `python -m module` and captures its output; `("model", path)` becomes a flag."""
    flags = (f"--{a[0]}={a[1]}" if isinstance(a, tuple) else a for a in arguments)
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        input=input,
        env={**os.environ, "XLA_FLAGS": xla_flags(devices), **environment},
        timeout=900,  # protects against hanging only
    )


def small_architecture(**changes: Any) -> Any:
    """An `Architecture` with one layer per tower; `changes` sets its other fields."""
    from diht_jax.models import Architecture

    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "context_length": 12}
    for tower in ("vision", "text"):
        sizes |= {f"{tower}_layers": 1, f"{tower}_width": 64, f"{tower}_heads": 1}
    return Architecture(**sizes | changes)


def clip_tensors(arch: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters of an `Architecture`, named as in CLIP's layout."""
    from diht_jax.weights.clip_layout import layout, layout_shapes, our_shapes

    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.standard_normal(shape).astype(np.float32) * 0.1)
        for name, shape in layout_shapes(layout(arch), our_shapes(arch)).items()
    }


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """A config for training a one-layer model in seconds; set keys by `section__key=value`."""
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
    """Draws random parameters with the shapes of `init_params`, including biases.

    Compiles nothing, since compilation would take longer than most tests.
    """
    import jax

    from diht_jax.sharding import path_name

    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path_name(path)
        if not leaf.shape:
            return np.asarray(-np.log(0.07), leaf.dtype)  # initial value of the logit scale
        stddev = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.1
        values = stddev * rng.standard_normal(leaf.shape) + name.endswith("scale")
        return values.astype(leaf.dtype)

    shapes = jax.eval_shape(init_params, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_model(arch: Any, seed: int = 0, **fields: Any) -> Any:
    """A `ModelFiles` of randomly drawn float32 parameters; `fields` sets its other fields."""
    from diht_jax.models.parameters import ModelDefinition
    from diht_jax.weights.source import ModelFiles

    init_params = ModelDefinition(arch, "float32", "float32").init_params
    return ModelFiles(arch, draw_parameters(init_params, seed), "drawn", **fields)


def write_run(
    folder: str | pathlib.Path,
    config: ml_collections.ConfigDict,
    seed: int = 0,
    step: int = 7,
    **scalars: float,
) -> pathlib.Path:
    """Writes a work directory with one checkpoint of randomly drawn parameters.

    `scalars` sets scalar parameters, such as `log_logit_scale` or a loss's `logit_bias`. If
    `config.ema.decay` is set, the averaged parameters are drawn with `seed + 1`.
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
    folder.mkdir(parents=True, exist_ok=True)
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
    """Embeds a picture or a text as a random vector, seeded by its pixels or bytes."""

    logit_scale = 1.0

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Returns a digest of all pixels, since a resized picture could hide a wrong box."""
        digest = np.random.default_rng(list(np.asarray(image).tobytes())).integers(0, 255, 12)
        return digest.astype(np.uint8).reshape(2, 2, 3)

    def encode_image(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Returns float32 [b, 16], L2-normalised."""
        return np.stack([self.embed(image.tobytes()) for image in images])

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 [b, 16], L2-normalised."""
        return np.stack([self.embed(text.encode()) for text in texts])

    @staticmethod
    def embed(data: bytes) -> np.ndarray:
        """Returns the vector for the given bytes."""
        vector = np.random.default_rng(list(data)).normal(size=16).astype(np.float32)
        return vector / np.linalg.norm(vector)
