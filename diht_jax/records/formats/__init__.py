"""Shards of other formats than our TFRecords: webdataset tars and ArrayRecord."""
