"""TFRecord shards: the schema of a record, the file format, indices, vocabularies."""
