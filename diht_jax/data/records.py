"""The public API for record shards: find, read, write and decode them.

source = open_source("/data/kept")       # TFRecord shards, ArrayRecord shards or tars
record = source.decode(source[0])        # Record(key, image, caption, metadata, ...)
picture = decode_rgb(record.image)       # PIL.Image in RGB, as displayed
with open_writer("/data/own/pairs-00000.tfrecord") as writer:
    writer.write(encode_record(record))
"""

from diht_jax.input.transforms import decode_rgb
from diht_jax.records.catalog import find_shards
from diht_jax.records.formats import open_source, open_writer
from diht_jax.records.schema import Pair, Record, decode_record, encode_record

__all__ = [
    "Pair",
    "Record",
    "decode_record",
    "decode_rgb",
    "encode_record",
    "find_shards",
    "open_source",
    "open_writer",
]
