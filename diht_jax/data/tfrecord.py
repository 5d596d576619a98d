"""Public names of `diht_jax.records.formats`, kept at this path for users."""

from diht_jax.records.formats import TFRecordSource, TFRecordWriter

__all__ = ["TFRecordSource", "TFRecordWriter"]
