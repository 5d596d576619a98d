"""Small inputs for the readers' tests, and functions that read them."""

import json
import pathlib
from collections.abc import Mapping

import pyarrow
import pyarrow.parquet

from diht_jax.readers.registry import Skipped, list_shards, read_pairs
from diht_jax.records.schema import Pair
from tests.make import encoded, plain, write_shard, write_tar

__all__ = ["JPEG", "PNG", "encoded_image", "read_entries", "skip_reasons", "write_tar"]


def encoded_image(name: str = "PNG") -> bytes:
    return encoded(plain("red", (4, 3)), name)


PNG, JPEG = encoded_image(), encoded_image("JPEG")
# Members of a tar with one pair, "good", and with everything that is no pair.
ODD_MEMBERS = [
    ("good.png", PNG),
    ("good.txt", b"ok"),
    ("no_caption.png", PNG),
    ("empty_caption.png", PNG),
    ("empty_caption.txt", b" \n"),
    ("no_image.txt", b"text"),
    ("two_images.png", PNG),
    ("two_images.jpg", JPEG),
    ("two_images.txt", b"text"),
    ("twice.png", PNG),
    ("twice.txt", b"one"),
    ("twice.txt", b"two"),
    ("bad_json.png", PNG),
    ("bad_json.txt", b"text"),
    ("bad_json.json", b"{"),
    ("deep.png", PNG),
    ("deep.json", b"[" * 100_000),
    ("mask.seg.png", PNG),
    ("mask.txt", b"the image has another kind of name"),
    ("good.png", PNG),
    ("good.txt", b"the key again"),
    ("readme", b"no extension"),
    (".hidden.png", PNG),
    ("other.mp4", b"not ours"),
]


def write_source(
    folder: pathlib.Path, form: str, images: Mapping[str, bytes], rows_per_group: int = 1000
) -> pathlib.Path:
    """Writes pairs in a form; returns the path of the file, or of the folder with one class.

    Args:
        folder: an existing folder.
        form: a file's suffix, or "classes".
        images: key -> image.
        rows_per_group: rows per row group of parquet.
    """
    path, captions = folder / f"a.{form}", {key: f"caption {key}" for key in images}
    if form == "classes":
        (folder / "classes" / "dog").mkdir(parents=True)
        for key, image in images.items():
            (folder / "classes" / "dog" / f"{key}.png").write_bytes(image)
        return folder / "classes"
    if form.startswith("tar"):
        members = [
            (f"{key}.{end}", data)
            for key, image in images.items()
            for end, data in (("png", image), ("txt", captions[key].encode()))
        ]
        write_tar(path, members, "w:gz" if form == "tar.gz" else "w")
    elif form == "parquet":
        columns = {"key": list(images), "png": list(images.values())}
        columns |= {"txt": list(captions.values()), "note": [f"note {key} " * 40 for key in images]}
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    elif form == "jsonl":
        (folder / "i").mkdir()
        rows = [{"id": key, "image": f"i/{key}.png", "caption": f'{key},\n"two"'} for key in images]
        for row in rows:
            (folder / row["image"]).write_bytes(images[row["id"]])
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        write_shard(path, (Pair(k, images[k], captions[k], {"n": k}) for k in images))
    return path


def read_entries(spec, **options) -> list[Pair | Skipped]:
    return [entry for shard in list_shards(spec, **options) for entry in read_pairs(shard)]


def skip_reasons(entries) -> dict[str, str]:
    return {entry.key: entry.reason for entry in entries if isinstance(entry, Skipped)}
