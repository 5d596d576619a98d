"""Decisions of the filter, a row for each pair, and queries over them: funnel, report, lists.

`table.py` describes the rows. A shard's rows are written while it is filtered (`log.py`), and the
rows of all shards are asked when it is done.
"""
