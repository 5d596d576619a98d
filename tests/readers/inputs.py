"""Small inputs of the readers' tests, and what is read of them."""

import io
import pathlib
import tarfile

from PIL import Image

from diht_jax.readers.registry import Skipped, list_shards, read_pairs
from diht_jax.records.schema import Pair


def encoded_image(name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, name)
    return buffer.getvalue()


PNG, JPEG = encoded_image(), encoded_image("JPEG")


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read_entries(spec, **options) -> list[Pair | Skipped]:
    return [entry for shard in list_shards(spec, **options) for entry in read_pairs(shard)]


def skip_reasons(entries) -> dict[str, str]:
    return {entry.key: entry.reason for entry in entries if isinstance(entry, Skipped)}
