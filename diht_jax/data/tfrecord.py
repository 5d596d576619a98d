"""The public names of `diht_jax.data.records.tfrecord`, at the path that users know."""

from diht_jax.data.records.tfrecord import TFRecordSource, TFRecordWriter

__all__ = ["TFRecordSource", "TFRecordWriter"]
