"""CAT filtering: a shard, a whole job, metadata alone, and the output shards."""
