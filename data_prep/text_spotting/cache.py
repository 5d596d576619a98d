"""A cache on disk of the text read in each picture, so that thresholds can be replayed.

A file belongs to one input shard and one set of OCR settings; an entry belongs to the bytes of one
picture. Thresholds of the decision are no part of
it. The files are appended to and never rewritten: a killed run keeps what it had spotted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from data_prep.text_spotting.ocr import Box
from diht_jax.storage.files import add_checksum, parse_object, write_bytes
from diht_jax.storage.stores import naming_output


@dataclasses.dataclass
class Lines:
    """The lines of text that one look found.

    Attributes:
        boxes: in px.
        texts: for each box, text and confidence; None for a box that was not read.
    """

    boxes: list[Box]
    texts: list[tuple[str, float] | None]


@dataclasses.dataclass
class Reading:
    """Everything read in one picture.

    Attributes:
        peaks: px of the longer side -> highest character score at that resolution.
        looks: likewise -> the lines that were found.
    """

    peaks: dict[int, float] = dataclasses.field(default_factory=dict)
    looks: dict[int, Lines] = dataclasses.field(default_factory=dict)


def hash_image(data: bytes) -> str:
    """The name of a picture in the cache: 32 hexadecimal digits of its encoded bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class SpotCache:
    """The readings of one shard.

    Two shards of one name share a file; entries are added in whole lines, so that this costs
    memory only.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], shard: str):
        """Opens the file of a shard and of settings that all readings depend on, or begins one."""
        text = json.dumps(settings, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory = pathlib.Path(folder) / digest
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "settings.json").exists():  # for people
            write_bytes(directory / "settings.json", f"{text}\n".encode())
        self.path = directory / f"{shard}.jsonl"
        self._readings: dict[str, Reading] = {}
        self._lines: list[str] = []
        if self.path.exists():
            self._load(self.path.read_bytes())

    def __len__(self) -> int:
        return len(self._readings)

    def get(self, image: str) -> Reading:
        """A reading to be completed by the caller; an empty one for an unknown `hash_image`."""
        return copy.deepcopy(self._readings.get(image, Reading()))

    def put(self, image: str, reading: Reading) -> None:
        """Replaces what is known of a picture, on disk after the next `flush`."""
        if self._readings.get(image) == reading:
            return
        self._readings[image] = copy.deepcopy(reading)
        entry = add_checksum({"image": image, **dataclasses.asdict(reading)})
        self._lines.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Appends what is new to the file."""
        if self._lines:
            with naming_output(self.path), open(self.path, "ab", buffering=0) as file:
                file.write("".join(self._lines).encode())
            self._lines = []

    def _load(self, data: bytes) -> None:
        for line in data.splitlines():
            try:
                entry = parse_object(line) or {}
                reading = Reading({int(side): score for side, score in entry["peaks"].items()})
                for side, look in entry["looks"].items():
                    boxes = [tuple(box) for box in look["boxes"]]
                    texts = [None if text is None else tuple(text) for text in look["texts"]]
                    reading.looks[int(side)] = Lines(boxes, texts)
                self._readings[entry["image"]] = reading
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # The end of a killed run, or damage; what it held is spotted again.
        if data and not data.endswith(b"\n"):
            self._lines.append("\n")
