"""Records as webdataset tars, which open_clip and `readers.webdataset` read.

A record becomes `KEY.jpg` (or `png`, `webp`, by its image's first bytes), `KEY.txt` with the
caption and `KEY.json` with the metadata and the key. In KEY, what would divide the name otherwise
is percent-encoded (every dot, and what no path can have), and a key that was there before gets
`~2`, `~3` and so on. Headers hold no owner and no time, so that equal records give equal bytes.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import tarfile

from diht_jax.records import schema
from diht_jax.records.formats import tar_records
from diht_jax.records.formats.writer import RecordWriter

# How the files of the formats begin that webdataset knows.
_SIGNATURES = ((b"\xff\xd8", 0, "jpg"), (b"\x89PNG", 0, "png"), (b"WEBP", 8, "webp"))
_MAX_KEY_LETTERS = 200


class TarWriter(RecordWriter):
    """Writes one tar of records, and its index."""

    index = tar_records.INDEX

    def _open(self, path: pathlib.Path) -> None:
        self._tar = tarfile.open(path, "x", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._seen: collections.Counter[str] = collections.Counter()

    def _append(self, data: bytes) -> None:
        record = schema.decode_record(data)
        if any(
            getattr(record, name) is not None for pair in schema.CONCEPT_FIELDS for name in pair
        ):
            raise ValueError(
                f"record '{record.key}': its concepts cannot be kept in a tar; write labelled "
                'records with config.output_format="tfrecord" or "array_record"'
            )
        extension = image_extension(record.image)
        if extension is None:
            raise ValueError(f"record '{record.key}': tars hold images in JPEG, PNG and WebP only")
        stem = self._unique_stem(record.key)
        self._offsets.append(self._tar.offset)
        metadata = dict(record.metadata) | {"key": record.key}
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
        self._add(f"{stem}.{extension}", record.image)
        self._add(f"{stem}.txt", record.caption.encode())
        self._add(f"{stem}.json", text.encode())

    def _finish(self) -> None:
        self._tar.close()

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # kept for reading, which nobody does here

    def _unique_stem(self, key: str) -> str:
        stem = member_stem(key)
        self._seen[stem] += 1
        # No other stem has a tilde.
        return stem if self._seen[stem] == 1 else f"{stem}~{self._seen[stem]}"


def image_extension(image: bytes) -> str | None:
    """The extension by which webdataset knows an image: jpg, png or webp; None for others."""
    for signature, start, extension in _SIGNATURES:
        if image[start : start + len(signature)] == signature:
            return extension
    return None


def member_stem(key: str) -> str:
    """The name of a record's members, without their extension."""
    encoded = "".join(letter if _is_plain(letter) else _percent(letter) for letter in key)
    if encoded != encoded.strip():
        encoded = encoded.replace(" ", "%20")
    # No path in the archive leads out of the folder that it is unpacked in.
    stem = "/".join(part or "%2F" for part in encoded.split("/"))
    return stem if len(stem) <= _MAX_KEY_LETTERS else stem[:_MAX_KEY_LETTERS].rstrip("/")


def _is_plain(letter: str) -> bool:
    return letter not in ".%~\\" and letter.isprintable() and letter != "\ufeff"


def _percent(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode())
