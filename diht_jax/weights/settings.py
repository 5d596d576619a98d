"""Architecture and preprocessing of a model, and validation of the configs that define them.

`open_clip_layout.py` and `huggingface.py` read the configs of other libraries, using the checks of
this module. A setting that changes the computation and that our model lacks is an error; it is
never ignored.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from diht_jax.data.tokenizer import VOCAB_SIZE
from diht_jax.input.transforms import CLIP_MEAN, CLIP_STD, INTERPOLATIONS, Preprocessing
from diht_jax.models.zoo import Architecture
from diht_jax.storage.files import check_object

# Far above the sizes of any model, and small enough for products.
_LARGEST_SIZE = 2**24


class ConfigSection:
    """A JSON object of another library's config, whose values are checked on access.

    `values` is the object itself, empty if it is absent.
    """

    def __init__(self, values: Any, name: str, path: str):
        """Checks that part `name` ("" for the whole) of the file `path` is an object, or None."""
        self.values = {} if values is None else values
        self._path, self._name = path, name
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{path}: {name or 'config'} is {values!r:.80}; expected an object")

    def section(self, name: str) -> ConfigSection:
        """Returns a nested section."""
        return ConfigSection(self.values.get(name), name, self._path)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Returns an integer; a list of equal integers, the sides of a square, counts as one."""
        value = self.values.get(name, default)
        if isinstance(value, list) and value and all(side == value[0] for side in value):
            value = value[0]
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self.error(name, f"an integer from {least} to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a positive number."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_SIZE:
            raise self.error(name, "a positive number")
        return value

    def one_of(self, name: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """Maps a known name to its meaning; a missing value means the default."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in known:
            raise self.error(name, " or ".join(map(repr, known)))
        return known[value]

    def error(self, name: str, expected: str) -> ValueError:
        """Returns the error for an unsupported value."""
        where = f"{self._name}.{name}" if self._name else name
        value = self.values.get(name)
        return ValueError(f"{self._path}: {where} is {value!r:.80}; expected {expected}")


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object in a file; empty without a file, ValueError for other content."""
    return check_object(path.read_bytes(), path) if path.is_file() else {}


def make_architecture(path: str, *, text_epsilon: float, **fields: Any) -> Architecture:
    """Creates an architecture from a config's fields; None means the usual value.

    Raises:
        ValueError: the towers' epsilons differ, or the sizes are inconsistent.
    """
    epsilon = fields["layer_norm_epsilon"]
    if epsilon != text_epsilon:
        raise ValueError(f"{path}: LayerNorm epsilons {epsilon} and {text_epsilon}; ours has one")
    for tower in ("vision", "text"):
        if fields[f"{tower}_mlp_width"] == 4 * fields[f"{tower}_width"]:
            fields[f"{tower}_mlp_width"] = None
    if fields["text_activation"] == fields["activation"]:
        fields["text_activation"] = None
    try:
        return Architecture(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def field_value(arch: Architecture, field: str) -> Any:
    """Returns a field of an architecture in a canonical form, equal for equivalent models."""
    value = getattr(arch, field)
    if value is None and field.endswith("_mlp_width"):
        return 4 * getattr(arch, field.replace("_mlp", ""))
    if field == "end_of_text_id" and value == min(arch.vocab_size, VOCAB_SIZE) - 1:
        return None  # equivalent to no id, since this is the end of text in CLIP's vocabulary
    return value


def read_preprocessor(config: Mapping[str, Any], path: str) -> Preprocessing:
    """Reads the preprocessing from the config of an image processor of transformers.

    Missing values default to those of the image processor: SigLIP's, or else CLIP's.

    Raises:
        ValueError: a step is disabled, or unsupported.
    """
    section = ConfigSection(config, "", path)
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "CLIP")))
    is_siglip = kind.startswith("Siglip")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step, True) is not True:
            raise section.error(step, "True, as our preprocessing does it")
    if not math.isclose(section.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise section.error("rescale_factor", "1/255")
    filters = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    resample = section.integer("resample", 3, least=0)
    if resample not in filters:
        raise section.error("resample", "3 (bicubic) or 2 (bilinear)")
    halves = (0.5, 0.5, 0.5)
    return _make_preprocessing(
        path,
        config.get("image_mean") or (halves if is_siglip else CLIP_MEAN),
        config.get("image_std") or (halves if is_siglip else CLIP_STD),
        resize=_read_resize(section, is_siglip),
        interpolation=filters[resample],
    )


def _read_resize(section: ConfigSection, is_siglip: bool) -> str:
    """Reads how a config of transformers makes a picture square."""
    values = section.values
    size = _side(section, "size")
    is_squashed = is_siglip
    if size is not None:
        is_squashed = isinstance(values["size"], Mapping) and "height" in values["size"]
    crops = bool(values.get("do_center_crop", not is_siglip))
    crop_size = _side(section, "crop_size") if crops else None
    if None not in (size, crop_size) and size != crop_size:
        raise section.error("crop_size", f"size, {values['size']!r:.80}, which our pictures have")
    if not (crops or is_squashed):
        raise section.error("do_center_crop", "True, or a size with 'height' and 'width'")
    return "squash" if is_squashed else "crop"


def make_preprocessor(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns the contents of `preprocessor_config.json` for transformers' image processors."""
    square = {"height": arch.image_size, "width": arch.image_size}
    crops = preprocessing.resize == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": arch.image_size} if crops else square,
        "resample": 3 if preprocessing.interpolation == "bicubic" else 2,
        **({"do_center_crop": True, "crop_size": square} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def read_preprocess_cfg(config: Any, path: str) -> Preprocessing:
    """Reads the preprocessing from open_clip's "preprocess_cfg"; CLIP's for missing fields.

    Raises:
        ValueError: it pads pictures, resizes with another filter, or is no object.
    """
    section = ConfigSection(config, "preprocess_cfg", path)
    section.one_of("mode", {"RGB": None}, "RGB")
    # open_clip uses the bicubic filter to evaluate models that were trained with random filters.
    filters = {**{name: name for name in INTERPOLATIONS}, "random": "bicubic"}
    return _make_preprocessing(
        path,
        section.values.get("mean") or CLIP_MEAN,
        section.values.get("std") or CLIP_STD,
        resize=section.one_of("resize_mode", {"shortest": "crop", "squash": "squash"}, "shortest"),
        interpolation=section.one_of("interpolation", filters, "bicubic"),
    )


def make_preprocess_cfg(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns the "preprocess_cfg" of `open_clip_config.json`."""
    return {
        "size": arch.image_size,
        "mode": "RGB",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "resize_mode": "shortest" if preprocessing.resize == "crop" else "squash",
    }


def _side(section: ConfigSection, name: str) -> Any:
    """Returns the side of a square from a config of transformers; None if not stated."""
    size = section.values.get(name)
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    known = ({"shortest_edge"}, {"height", "width"})
    is_known = not isinstance(size, Mapping) or set(size) in known
    if not is_known or any(side != sides[0] for side in sides):
        raise section.error(name, "a number, 'shortest_edge', or equal 'height' and 'width'")
    return sides[0]


def _make_preprocessing(path: str, mean: Any, std: Any, **steps: str) -> Preprocessing:
    """Creates a preprocessing from a config's mean and deviation, which may have any type."""
    try:
        numbers: list[Any] = [tuple(map(float, values)) for values in (mean, std)]
        return Preprocessing(*numbers, **steps)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: mean and std of the pictures: {error}") from error
