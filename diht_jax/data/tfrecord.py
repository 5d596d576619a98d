"""The public names of `diht_jax.records.tfrecord`, at the path that users know."""

from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter

__all__ = ["TFRecordSource", "TFRecordWriter"]
