"""The filter's decisions, one row per pair, and queries over them: funnel, report, lists.

`table.py` describes the rows. `log.py` writes those of a shard while it is filtered. Queries read
the rows of all shards once filtering is done.
"""
