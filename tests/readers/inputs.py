"""Small inputs of the readers' tests, and what is read of them."""

from diht_jax.readers.registry import Skipped, list_shards, read_pairs
from diht_jax.records.schema import Pair
from tests.make import encoded, plain, write_tar

__all__ = ["JPEG", "PNG", "encoded_image", "read_entries", "skip_reasons", "write_tar"]


def encoded_image(name: str = "PNG") -> bytes:
    return encoded(plain("red", (4, 3)), name)


PNG, JPEG = encoded_image(), encoded_image("JPEG")


def read_entries(spec, **options) -> list[Pair | Skipped]:
    return [entry for shard in list_shards(spec, **options) for entry in read_pairs(shard)]


def skip_reasons(entries) -> dict[str, str]:
    return {entry.key: entry.reason for entry in entries if isinstance(entry, Skipped)}
