"""Architecture and preprocessing of a model, and checks of the configs that they are read from.

The configs of other libraries are read by `open_clip_config.py` and `huggingface.py`, with the
checks that stand here. A setting that would change what the model computes and that our model does
not have is an error, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diht_jax.input.transforms import CLIP_MEAN, CLIP_STD, INTERPOLATIONS, Preprocessing
from diht_jax.models.zoo import Architecture

# Far above any model's sizes, and small enough to be multiplied.
_LARGEST_SIZE = 2**24


class ConfigSection:
    """One JSON object of another library's config, whose values are checked when they are taken.

    Attributes:
        values: the object itself; empty where it is absent.
    """

    def __init__(self, values: Any, name: str, path: str):
        """Checks that part `name` ("" for the whole) of the file `path` is an object, or None."""
        self.values = {} if values is None else values
        self._path, self._name = path, name
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{path}: {name or 'config'} is {values!r:.80}; expected an object")

    def section(self, name: str) -> ConfigSection:
        """A part of it by name."""
        return ConfigSection(self.values.get(name), name, self._path)

    def require(self, *names: str) -> None:
        """Raises ValueError if fields are missing."""
        missing = [name for name in names if name not in self.values]
        if missing:
            raise ValueError(
                f"{self._path}: the model config lacks {', '.join(map(repr, missing))}"
            )

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; raises ValueError if invalid or out of range."""
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self._error(name, value, f"an integer from {least} to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; raises ValueError if invalid."""
        value = self.values.get(name, default)
        if not _is_number(value) or not 0 < value <= _LARGEST_SIZE:
            raise self._error(name, value, "a positive number")
        return value

    def side(self, name: str, default: int | None = None) -> int:
        """The side of a square: one number, or the same one several times."""
        value = self.values.get(name, default)
        if isinstance(value, list | tuple) and value:
            if any(side != value[0] for side in value):
                raise self._error(name, value, "equal sides; our pictures and patches are squares")
            return ConfigSection({name: value[0]}, self._name, self._path).integer(name)
        return self.integer(name, default)

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        where = f"{self._name}.{name}" if self._name else name
        return ValueError(f"{self._path}: {where} is {value!r:.80}; expected {expected}")


def make_architecture(path: str, **fields: Any) -> Architecture:
    """The architecture; an error names the file."""
    fields["vision_heads"] = max(1, fields["vision_heads"])
    try:
        return Architecture(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_preprocessor(config: Mapping[str, Any], path: str) -> Preprocessing:
    """The preprocessing of an image processor of transformers, from its config at a path.

    What the file leaves out is as in its image processor: that of SigLIP, or else of CLIP.

    Raises:
        ValueError: a step is left out, or is one that ours does not have.
    """
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "CLIP")))
    if kind.startswith("Siglip2"):
        raise ValueError(
            f"{path}: image_processor_type={kind!r:.80}: pictures of many shapes (NaFlex), while "
            "our models take squares; use a checkpoint of fixed resolution"
        )
    is_siglip = kind.startswith("Siglip")
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    _require_values(config, steps, path)
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor={factor!r:.80}; our preprocessing has 1/255 only")
    numbers = {2: "bilinear", 3: "bicubic"}  # of Pillow's filters
    resample = config.get("resample", 3)
    if not isinstance(resample, int) or resample not in numbers:
        raise ValueError(
            f"{path}: resample={resample!r:.80}; our preprocessing has 3 (bicubic) and 2 (bilinear)"
        )
    default = ((0.5,) * 3, (0.5,) * 3) if is_siglip else (CLIP_MEAN, CLIP_STD)
    return _make_preprocessing(
        config.get("image_mean"),
        config.get("image_std"),
        default,
        path,
        resize=_read_resize(config, is_siglip, path),
        interpolation=numbers[resample],
    )


def _read_resize(config: Mapping[str, Any], is_siglip: bool, path: str) -> str:
    """Reads from a config of transformers how a square is made of a picture."""
    size = config.get("size", {"height": 0, "width": 0} if is_siglip else {"shortest_edge": 0})
    side = _side(size, "size", path)
    crops = bool(config.get("do_center_crop", not is_siglip))
    is_squashed = isinstance(size, Mapping) and "shortest_edge" not in size
    both = crops and "crop_size" in config and "size" in config
    if both and _side(config["crop_size"], "crop_size", path) != side:
        raise ValueError(
            f"{path}: crop_size={config['crop_size']!r:.80} differs from size={size!r:.80}; our "
            "preprocessing crops pictures to the size that their short side is scaled to"
        )
    if not (crops or is_squashed):
        raise ValueError(
            f"{path}: do_center_crop=False with size={size!r:.80}; our preprocessing makes "
            "squares: by a crop, or from a size with 'height' and 'width'"
        )
    return "squash" if is_squashed else "crop"


def make_preprocessor(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Contents of `preprocessor_config.json`, which transformers' image processors read."""
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
    """The preprocessing in "preprocess_cfg" of open_clip; CLIP's where a field is missing.

    Raises:
        ValueError: pictures are padded, or resized by another filter; or it is no object.
    """
    values = ConfigSection(config, "preprocessing", path).values
    _require_values(values, {"mode": "RGB"}, path)
    resize, interpolation = (values.get("resize_mode") or "shortest"), values.get("interpolation")
    if resize not in ("shortest", "squash"):
        raise ValueError(
            f"{path}: resize_mode={resize!r:.80}; our preprocessing has 'shortest' and 'squash'"
        )
    if interpolation in (None, "random"):  # open_clip evaluates those with the bicubic filter
        interpolation = "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"{path}: interpolation={interpolation!r:.80}; our preprocessing has "
            f"{' and '.join(map(repr, INTERPOLATIONS))}"
        )
    return _make_preprocessing(
        values.get("mean"),
        values.get("std"),
        (CLIP_MEAN, CLIP_STD),
        path,
        resize="crop" if resize == "shortest" else "squash",
        interpolation=interpolation,
    )


def make_preprocess_cfg(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """The "preprocess_cfg" of `open_clip_config.json`."""
    return {
        "size": arch.image_size,
        "mode": "RGB",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "resize_mode": "shortest" if preprocessing.resize == "crop" else "squash",
    }


def _require_values(config: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={config[name]!r:.80}; our preprocessing has {value!r} only"
            )


def _side(size: Any, name: str, path: str) -> Any:
    """The one side of a square in a config of transformers."""
    values = list(size.values()) if isinstance(size, Mapping) else [size]
    known = ({"shortest_edge"}, {"height", "width"})
    is_known = not isinstance(size, Mapping) or set(size) in known
    if not is_known or any(value != values[0] for value in values):
        raise ValueError(
            f"{path}: {name}={size!r:.80}; our preprocessing makes squares: expected a number, "
            "'shortest_edge', or equal 'height' and 'width'"
        )
    return values[0]


def _make_preprocessing(
    mean: Any, std: Any, default: tuple[Any, Any], path: str, *, resize: str, interpolation: str
) -> Preprocessing:
    mean, std = default[0] if mean is None else mean, default[1] if std is None else std
    for values in (mean, std):
        is_triple = isinstance(values, list | tuple) and len(values) == 3
        if not is_triple or not all(map(_is_number, values)):
            raise ValueError(f"{path}: expected three means and deviations, got {values!r:.80}")
    if min(std) <= 0:
        raise ValueError(f"{path}: expected positive deviations, got {std}")
    return Preprocessing(tuple(mean), tuple(std), resize, interpolation)


def only_value(values: set[Any], what: str, path: str) -> Any:
    """The one value of both towers; raises ValueError where they differ."""
    if len(values) != 1:
        raise ValueError(f"{path}: several {what}, {sorted(values)!s:.200}; our model has one")
    return next(iter(values))


def mlp_width_unless_usual(mlp_width: int, width: int) -> int | None:
    """The inner width of the MLPs; None where it is four times the width."""
    return None if mlp_width == 4 * width else mlp_width


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (isinstance(value, int) or math.isfinite(value))
