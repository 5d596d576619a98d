"""EasyOCR's English networks, run fast: heat maps, boxes, and the text in a box.

The networks, their weights and everything around them are EasyOCR's
(CRAFT and a CRNN), so that boxes and texts are those of `easyocr.Reader.readtext` on the same
array at the same settings, up to rounding. Ours is how they are run: normalisation folded into the
convolutions, channels last, bfloat16 where the processor has it, batches of one shape, and no
work for boxes that nobody asks about. Captions and decisions must not come in; torch and easyocr
are imported when the networks are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.text_spotting.weights import find_weights, import_easyocr

PRECISIONS = ("auto", "float32", "bfloat16")

_CROP_HEIGHT = 64  # px; what the recogniser was trained on
_MIN_BOX_SIDE = 20  # px, of the longer side; EasyOCR's `min_size`
_CONTRAST_BELOW = 0.1  # confidence under which a box is read again with more contrast
_TARGET_CONTRAST = 0.5
# EasyOCR's grouping of words into lines.
_GROUPING = {
    "slope_ths": 0.1,
    "ycenter_ths": 0.5,
    "height_ths": 0.5,
    "width_ths": 0.5,
    "add_margin": 0.1,
}

# A line that lies level is x_min, x_max, y_min, y_max; any other is x, y of its four corners.
Box = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class OcrSettings:
    """What boxes and texts depend on.

    Attributes:
        canvas_size: px of the longer side at which text is detected; larger pictures are shrunk,
            smaller ones stay. `canvas_size` of `Reader.readtext`.
        text_threshold: least peak of the character score in a box, as EasyOCR's.
        low_text: character score at which a box ends, as EasyOCR's.
        link_threshold: affinity at which characters are linked, as EasyOCR's.
        precision: of the convolutions; "auto" is bfloat16 where the device multiplies it natively.
        device: "cpu", "cuda" (or "cuda:1", "mps"), or "auto" for a GPU where there is one.
    """

    canvas_size: int = 256
    text_threshold: float = 0.7
    low_text: float = 0.4
    link_threshold: float = 0.4
    precision: str = "auto"
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A picture at the size at which text is looked for.

    Attributes:
        pixels: uint8 [h, w, 3], blue first.
        scale: px of the picture per px of the shrunk one.
    """

    pixels: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """The detector's output for one picture.

    Attributes:
        text: float32 [h/2, w/2] of the shrunk picture, score of being inside a character.
        link: likewise, of being between two characters of a word.
        scale: px of the picture per px of the shrunk one.
    """

    text: np.ndarray
    link: np.ndarray
    scale: float


def resolve(settings: OcrSettings) -> OcrSettings:
    """The settings with "auto" replaced by what it means on this machine.

    Raises:
        ValueError: an unknown precision, or a device that is not there.
    """
    import torch

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device='{device}'; expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device='{device}', but torch {torch.__version__} sees no CUDA device")
    precision = settings.precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision='{precision}'; expected one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bfloat16" if _multiplies_bfloat16(kind) else "float32"
    return dataclasses.replace(settings, device=device, precision=precision)


@functools.lru_cache(maxsize=1)
def load_ocr(settings: OcrSettings) -> Ocr:
    """The networks, loaded once per process."""
    return Ocr(settings)


class Ocr:
    """Detector and recogniser on one device."""

    def __init__(self, settings: OcrSettings):
        """Loads the networks.

        Args:
            settings: `resolve` is applied to them.

        Raises:
            ValueError: EasyOCR or its weights are missing, or a setting cannot be met.
        """
        easyocr = import_easyocr()
        import torch

        self.settings = resolve(settings)
        self._device = torch.device(self.settings.device)
        self._dtype = getattr(torch, self.settings.precision)
        detector_file, recognizer_file = find_weights()
        self._detector = self._place(easyocr.craft.CRAFT(), detector_file)
        model = easyocr.config.recognition_models["gen2"]["english_g2"]
        self._converter = easyocr.utils.CTCLabelConverter(model["characters"])
        self._recognizer = self._place(
            easyocr.model.vgg_model.Model(
                input_channel=1,
                output_channel=256,
                hidden_size=256,
                num_class=len(self._converter.character),
            ),
            recognizer_file,
        )
        # The recurrent layers stay in float32: they are cheap, and decide on the characters.
        self._recognizer.SequenceModeling.float()
        self._recognizer.Prediction.float()

    def heat_maps(self, pictures: Sequence[Shrunk], batch_size: int = 8) -> list[HeatMaps]:
        """Runs the detector, on batches of pictures of one size.

        Args:
            pictures: of `shrink`.
            batch_size: most pictures in one batch.

        Returns:
            In the order of the pictures.
        """
        import torch
        from easyocr.imgproc import normalizeMeanVariance

        inputs = [normalizeMeanVariance(_pad(picture.pixels)) for picture in pictures]
        maps: list[Any] = [None] * len(pictures)
        for batch in _like_batches([x.shape for x in inputs], batch_size):
            x = torch.from_numpy(np.stack([inputs[i] for i in batch])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                y, _ = self._detector(x.to(self._device, self._dtype))
            y = y.float().cpu().numpy()
            for i, out in zip(batch, y, strict=True):
                text, link = (np.ascontiguousarray(out[..., k]) for k in range(2))
                maps[i] = HeatMaps(text, link, pictures[i].scale)
        return maps

    def find_boxes(self, maps: HeatMaps) -> list[Box]:
        """The lines of text, in the px of the picture, as `Reader.detect` finds them."""
        from easyocr.craft_utils import adjustResultCoordinates, getDetBoxes
        from easyocr.utils import group_text_box

        s = self.settings
        quads, _, _ = getDetBoxes(
            maps.text, maps.link, s.text_threshold, s.link_threshold, s.low_text, False, False
        )
        quads = adjustResultCoordinates(quads, maps.scale, maps.scale)
        corners = [np.array(quad).astype(np.int32).reshape(-1) for quad in quads]
        if not corners:
            return []
        level, turned = group_text_box(corners, sort_output=True, **_GROUPING)
        boxes = [tuple(int(v) for v in box) for box in level]
        boxes += [tuple(float(v) for corner in box for v in corner) for box in turned]
        return [box for box in boxes if max(box_size(box)) > _MIN_BOX_SIDE]

    def read(
        self, crops: Sequence[tuple[np.ndarray, int] | None], batch_size: int = 16
    ) -> list[tuple[str, float]]:
        """Reads lines, in batches of crops that are padded to the same width.

        Args:
            crops: of `crop_line`.
            batch_size: most crops in one batch.

        Returns:
            Text and confidence (0 to 1, EasyOCR's product over the line) of each; ("", 0.0) for
            None.
        """
        results = [("", 0.0)] * len(crops)
        present = [i for i, crop in enumerate(crops) if crop is not None]
        for batch in _like_batches([crops[i][1] for i in present], batch_size):
            indices = [present[i] for i in batch]
            width = crops[indices[0]][1]
            images = [crops[i][0] for i in indices]
            read = self._read_batch(images, width, 0.0)
            faint = [k for k, (_, confidence) in enumerate(read) if confidence < _CONTRAST_BELOW]
            if faint:
                again = self._read_batch([images[k] for k in faint], width, _TARGET_CONTRAST)
                for k, second in zip(faint, again, strict=True):
                    if second[1] >= read[k][1]:
                        read[k] = second
            for i, result in zip(indices, read, strict=True):
                results[i] = result
        return results

    def _read_batch(
        self, images: Sequence[np.ndarray], width: int, contrast: float
    ) -> list[tuple[str, float]]:
        import torch
        from easyocr.recognition import AlignCollate, recognizer_predict
        from PIL import Image

        collate = AlignCollate(_CROP_HEIGHT, width, adjust_contrast=contrast)
        batch = collate([Image.fromarray(image) for image in images])
        with torch.inference_mode():
            # All characters of the network belong to English: none is ignored.
            read = recognizer_predict(
                self._recognize, self._converter, [batch], width // 10, [], {}, device=self._device
            )
        return [(text, float(confidence)) for text, confidence in read]

    @property
    def _recognize(self) -> _Recognize:
        return _Recognize(self._recognizer, self._dtype)

    def _place(self, network: Any, path: pathlib.Path) -> Any:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        network.load_state_dict(state)
        network = _fold_normalization(network.eval()).requires_grad_(False)
        return network.to(self._device, self._dtype, memory_format=torch.channels_last)


class _Recognize:
    """The recogniser as `recognizer_predict` calls it, with the convolutions in their dtype."""

    def __init__(self, network: Any, dtype: Any):
        self._network = network
        self._dtype = dtype

    def eval(self) -> None:
        """Nothing to do; EasyOCR asks for it before every batch."""

    def __call__(self, images: Any, _: Any) -> Any:
        features = self._network.FeatureExtraction(images.to(self._dtype)).float()
        return self._network.Prediction(
            self._network.SequenceModeling(features.mean(dim=2).permute(0, 2, 1)).contiguous()
        )


def shrink(image: np.ndarray, side: int) -> Shrunk:
    """Shrinks a picture, as EasyOCR does, so that its longer side has at most `side` px.

    It samples and does not average, which keeps thin strokes dark: at 160 px the detector then
    sees more of small text than after any smoothing.

    Args:
        image: uint8 [h, w, 3], blue first, as EasyOCR takes arrays.
        side: px.
    """
    import cv2

    height, width = image.shape[:2]
    ratio = min(side, max(height, width)) / max(height, width)
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    return Shrunk(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), 1 / ratio)


def crop_line(grey: np.ndarray, box: Box) -> tuple[np.ndarray, int] | None:
    """Cuts out one line as EasyOCR does: 64 px high, and the width to which it will be padded.

    Args:
        grey: uint8 [h, w].
        box: of `Ocr.find_boxes`.

    Returns:
        None for a box without a pixel.
    """
    from easyocr.utils import get_image_list

    if len(box) == 4:
        x_min, x_max, y_min, y_max = box
        height, width = grey.shape
        if min(x_max, width) <= max(x_min, 0) or min(y_max, height) <= max(y_min, 0):
            return None
        level, turned = [list(box)], []
    else:
        if min(box_size(box)) < 2:
            return None
        level, turned = [], [np.reshape(box, (4, 2)).tolist()]
    crops, width = get_image_list(level, turned, grey, model_height=_CROP_HEIGHT)
    return (crops[0][1], int(width)) if crops else None


def box_size(box: Box) -> tuple[float, float]:
    """Width and height of the upright rectangle around a box, in px."""
    if len(box) == 4:
        return box[1] - box[0], box[3] - box[2]
    return max(box[::2]) - min(box[::2]), max(box[1::2]) - min(box[1::2])


def _pad(pixels: np.ndarray) -> np.ndarray:
    """Black at the right and below, up to the multiple of 32 that the detector needs."""
    bottom, right = (-length % 32 for length in pixels.shape[:2])
    return np.pad(pixels, ((0, bottom), (0, right), (0, 0))).astype(np.float32)


def _like_batches(likes: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    """Indices of equal values, in order of appearance, at most `batch_size` together."""
    groups: dict[Any, list[int]] = {}
    for index, like in enumerate(likes):
        groups.setdefault(like, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _fold_normalization(module: Any) -> Any:
    """Multiplies every batch normalisation into the convolution before it."""
    import torch

    before_name, before = "", None
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.BatchNorm2d) and isinstance(before, torch.nn.Conv2d):
            folded = torch.nn.utils.fusion.fuse_conv_bn_eval(before, child)
            setattr(module, before_name, folded)
            setattr(module, name, torch.nn.Identity())
        else:
            _fold_normalization(child)
        before_name, before = name, child
    return module


def _multiplies_bfloat16(kind: str) -> bool:
    import torch

    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
