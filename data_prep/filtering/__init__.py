"""CAT filtering: the config, the plan of a job, a shard, metadata alone, output shards, replay."""
