"""The public names of `diht_jax.records.formats`, at the path that users know."""

from diht_jax.records.formats import TFRecordSource, TFRecordWriter

__all__ = ["TFRecordSource", "TFRecordWriter"]
