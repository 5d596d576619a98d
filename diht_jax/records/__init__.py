"""Record shards: the record schema, shard formats and their indices, labels and vocabularies."""
